"""docs/training.md: verbs and launchers take every command; the snippets and the script for Slurm run or parse."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_runs import environment, make_corpus_and_tokenizer, pretrain_words
from torch.distributed.run import parse_args as torchrun_arguments

from fathom.scripts import cli
from fathom.scripts.arguments import parse
from fathom.scripts.pretrain import PretrainOptions
from fathom.scripts.sft import SftOptions, SftRunOptions
from fathom.training.options import RunOptions

ROOT = Path(__file__).parents[2]
PAGES = ("docs/training.md", "docs/training.zh-CN.md")
VERBS = {"pretrain": (PretrainOptions, RunOptions), "sft": (SftOptions, SftRunOptions)}


def blocks(language: str, page: str = PAGES[0]) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    script = blocks("sh")[0].split("exec ")[1].rstrip("'\n").replace("\\\n", "")
    for variable, value in {"$((SLURM_NNODES * 8))": 16, "$SLURM_NNODES": 2, "$SLURM_NODEID": 1}.items():
        script = script.replace(variable, str(value))
    script = script.replace("$FIRST", "host").replace("$OUT", "out").replace("$RESUME", "--resume")
    return [*"".join(blocks("bash")).splitlines(), script]


@pytest.mark.parametrize("command", commands())
def test_launcher_and_verb_take_every_command(command):
    launcher, *words = shlex.split(command)
    if launcher == "torchrun":
        arguments = torchrun_arguments(words)
        assert arguments.module
        module, words = arguments.training_script, arguments.training_script_args
    elif launcher == "accelerate":
        assert words.pop(0) == "launch"
        file = words.index("--config_file") + 1
        words[file] = str(ROOT / words[file])
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        assert arguments.num_processes == int(words[words.index("--num_processes") + 1])
        assert arguments.module
        module, words = arguments.training_script, arguments.training_script_args
    else:
        assert launcher == "fathom"
        module = f"fathom.scripts.{words.pop(0)}"
    verb = module.removeprefix("fathom.scripts.")
    for options in parse(verb, "", VERBS[verb], words):
        if isinstance(options, RunOptions):
            options.check()


def test_overrides_are_fields_of_the_configuration():
    from fathom import FathomConfig

    named = re.findall(r"^\| `([\w=. ]+)` \|", (ROOT / PAGES[0]).read_text(encoding="utf-8"), re.M)
    values = dict(pair.split("=") for pairs in named for pair in pairs.split())
    assert len(values) == 7
    FathomConfig.preset("v3.2", **{name: json.loads(value) for name, value in values.items()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with `runs/pretrain`, and with what the snippets read beside it."""
    folder = tmp_path_factory.mktemp("snippets")
    make_corpus_and_tokenizer(folder)
    assert cli.main(["pretrain", *pretrain_words(folder, folder / "runs" / "pretrain", steps=2)]) == 0
    (folder / "runs" / "sft").symlink_to("pretrain")
    lines = [
        {"messages": [{"role": "user", "content": f"f{n}?"}, {"role": "assistant", "content": "x + 1 " * (1 + n % 5)}]}
        for n in range(40)
    ]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_snippet(library: str, folder: Path) -> str:
    """Runs the page's snippet that uses a library, made shorter, and returns what it prints."""
    (snippet,) = (each for each in blocks("python") if f"from {library} import" in each)
    snippet = snippet.replace("max_steps=20", "max_steps=2, use_cpu=True, save_steps=2")
    command = [sys.executable, "-c", snippet]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_snippet_for_lora_runs(trained):
    assert "trainable params: " in run_snippet("peft", trained)


def test_the_snippet_for_trl_runs(trained):
    run_snippet("trl", trained)
    assert (trained / "runs" / "trl" / "checkpoint-2" / "model.safetensors").is_file()


def test_the_slurm_script_is_one_for_bash():
    (script,) = blocks("sh")
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_both_languages_show_the_same_code():
    for language in ("bash", "sh", "python"):
        assert blocks(language, PAGES[0]) == blocks(language, PAGES[1]) != []

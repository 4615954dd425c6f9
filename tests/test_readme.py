"""The README's commands and snippets run, in its order, in one folder, as a reader would run them.

Only their size is changed: options that make a run small are appended (the last one given counts), the text is this
repository's, and the Hub is the one of `hub_server`. README.zh-CN.md must hold the same commands and code.
"""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL_RUN = "--steps 4 --batch_size 2 --eval_rows 4 --save_steps 4 --log_steps 2 --precision fp32"
SMALLER = {
    "corpus": f"--sources {ROOT / 'training'} {ROOT / 'scripts'}",
    "tokenizer": "--vocab_size 600",
    "pretrain": f"{SMALL_RUN} --sequence_length 128 --size nano",
    "sft": f"{SMALL_RUN} --data answers.jsonl",
    "generate": "--max_new_tokens 8",
    "quickstart": "--help",
}


def blocks(language: str, file: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.S | re.M)


def commands() -> list[str]:
    """Lines of the bash blocks, without comments."""
    lines = "".join(blocks("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands run one after the other, with a conversation file for `fathom sft`."""
    folder = tmp_path_factory.mktemp("readme")
    row = '{"messages": [{"role": "user", "content": "What is %d?"}, {"role": "assistant", "content": "A number."}]}\n'
    (folder / "answers.jsonl").write_text("".join(row % n for n in range(60)), encoding="utf-8")
    return folder


def environment(**extra: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, **extra}


def run(command: list[str], folder: Path, **extra: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_commands_and_snippets_run(folder, hub):
    """In the order of the page; a snippet may use what the commands above it have made."""
    seen = set()
    for line in commands():
        words = _shell_words(line)
        if words[0] == "make":
            run(["make", "--dry-run", words[1], "-f", str(ROOT / "Makefile")], ROOT)
        elif words[0] == "fathom" and words[1] == "chat":
            _opens_a_page(words, folder)
        elif words[0] == "fathom" and words[1] == "push":
            name = words[3].split("/")[1]
            words[3] = f"tester/{name}"
            environment_of_hub = {"HF_HUB_OFFLINE": "0", **hub.environment(str(folder / "hub"), "hf_test")}
            assert words[3] in run(words, folder, **environment_of_hub)
        elif words[0] == "fathom":
            run([*words, *shlex.split(SMALLER.get(words[1], ""))], folder)
        elif words[0] == "torchrun":
            verb = words[words.index("-m") + 1].rsplit(".", 1)[1]
            run([*words, *shlex.split(SMALLER[verb])], folder)
        elif words[0] == "accelerate":
            # Needs GPUs; here only that the file it names is one that accelerate can read.
            from accelerate.commands.config.config_args import load_config_from_file

            assert load_config_from_file(str(ROOT / words[words.index("--config_file") + 1])).num_processes
        else:
            assert words[0] == "python", f"no way to test {line!r}"
            run([sys.executable, *words[1:]], folder)
        seen.add(words[0])
    assert seen >= {"make", "fathom", "python", "torchrun", "accelerate"}

    snippets = blocks("python")
    assert snippets
    for snippet in snippets:
        run([sys.executable, "-c", snippet], folder)


def _shell_words(line: str) -> list[str]:
    """The words as the reader's shell makes them; a backtick in double quotes would run a command there."""
    assert "`" not in re.sub(r"'[^']*'", "", line), f"the shell would run what stands between backticks: {line}"
    return shlex.split(line)


def _opens_a_page(words: list[str], folder: Path) -> None:
    process = subprocess.Popen(
        [*words, "--port", "7960"],
        cwd=folder,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = []
        deadline = time.monotonic() + 120
        for line in process.stdout or ():
            output.append(line)
            if "http://127.0.0.1:" in line or time.monotonic() > deadline:
                break
        assert any("http://127.0.0.1:" in line for line in output), "".join(output)
    finally:
        process.terminate()
        process.wait(30)


def test_both_languages_show_the_same_commands_and_code():
    for language in ("bash", "python"):

        def code(file: str, language: str = language) -> list[str]:
            return [re.sub(r"\s+#.*", "", block) for block in blocks(language, file)]

        assert code("README.md") == code("README.zh-CN.md")

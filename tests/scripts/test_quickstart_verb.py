"""`fathom quickstart`: all verbs in order, nothing twice, and on after an interruption."""

import json
import shlex
import signal
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from tiny_runs import make_corpus_and_tokenizer

from fathom.scripts import chat, cli, corpus, pretrain, sft, tokenizer
from fathom.scripts.arguments import parse
from fathom.scripts.quickstart import QuickstartOptions, steps
from fathom.training import questions, run

VERBS = ["corpus", "tokenizer", "pretrain", "sft"]


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    """The words of a tiny quickstart; its conversations are few, as reading all docstrings takes seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(questions, "load_conversations", lambda source, skipped=None: few_conversations())
    make_corpus_and_tokenizer(tmp_path / "text")
    return [
        *(
            "quickstart",
            "--sources",
            "text/sources",
            "--out",
            "quick",
            "--vocab_size",
            "320",
            "--generation",
            "classic",
        ),
        *("--pretrain_steps", "2", "--sft_steps", "2", "--batch_size", "1"),
    ]


def few_conversations() -> DatasetDict:
    rows = [
        {"messages": [{"role": "user", "content": f"f{n}?"}, {"role": "assistant", "content": f"x + {n}"}]}
        for n in range(6)
    ]
    return DatasetDict(train=Dataset.from_list(rows[:4]), heldout=Dataset.from_list(rows[4:]))


def printed_commands(output: str) -> list[list[str]]:
    return [shlex.split(line.removeprefix("== ")) for line in output.splitlines() if line.startswith("== fathom")]


def test_runs_every_verb_and_the_second_time_none(words, capsys, monkeypatch):
    assert cli.main([*words, "--no_chat"]) == 0
    output = capsys.readouterr().out
    commands = printed_commands(output)
    assert [command[1] for command in commands] == VERBS
    assert output.splitlines()[-1] == "next: fathom chat quick/sft"
    for verb in ("pretrain", "sft"):
        record = json.loads(Path("quick", verb, "run.json").read_text())
        assert ["fathom", *shlex.split(record["command"])[1:]] in commands
        assert record["steps"] == 2
    assert json.loads(Path("quick", "sft", "run.json").read_text())["parent"]["verb"] == "pretrain"

    for module in (corpus, tokenizer, pretrain, sft):
        monkeypatch.setattr(module, "main", lambda argv: pytest.fail(f"ran {argv}"))
    opened = []
    monkeypatch.setattr(chat, "main", lambda argv: opened.append(argv) or 0)
    assert cli.main(words) == 0
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if line.endswith("is there")] == [
        f"== {verb}: quick/{verb} is there" for verb in VERBS
    ]
    (arguments,) = opened
    (options,) = parse("chat", "", [chat.ChatOptions], arguments, positionals=("model",))
    assert (options.model, options.models_dir, options.port) == ("quick/sft", "quick", 7860)


def test_goes_on_where_it_was_interrupted(words, capsys, monkeypatch):
    on_step_end = run.ConsoleCallback.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.ConsoleCallback, "on_step_end", interrupting)
    assert cli.main([*words, "--no_chat"]) == 130
    monkeypatch.setattr(run.ConsoleCallback, "on_step_end", on_step_end)
    capsys.readouterr()
    assert cli.main([*words, "--no_chat"]) == 0
    output = capsys.readouterr().out
    assert [command[1] for command in printed_commands(output)] == ["pretrain", "sft"]
    assert printed_commands(output)[0][-1] == "--resume"
    assert "resuming from quick/pretrain/checkpoint-1" in output


def test_results_of_other_options_are_not_taken_for_these(words, capsys):
    assert cli.main([*words, "--no_chat"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--no_chat", "--sft_steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fathom quickstart: error: quick/sft was made by `fathom sft ")
    assert "--steps 3" in error


def test_a_verb_that_refuses_ends_it(words, capsys):
    assert cli.main([*words, "--no_chat", "--vocab_size", "50"]) == 2
    assert "vocab_size is 50" in capsys.readouterr().err
    assert sorted(path.name for path in Path("quick").iterdir()) == ["corpus", "quickstart.json"]


def test_the_defaults_are_options_that_the_verbs_know():
    kinds = {
        "corpus": [corpus.CorpusOptions],
        "tokenizer": [tokenizer.TokenizerOptions],
        "pretrain": [pretrain.PretrainOptions, pretrain.RunOptions],
        "sft": [sft.SftOptions, sft.SftRunOptions],
    }
    parsed = {verb: parse(verb, "", kinds[verb], arguments) for verb, _, arguments in steps(QuickstartOptions())}
    assert list(parsed) == VERBS
    assert parsed["pretrain"][0].tokenizer == str(parsed["tokenizer"][0].out)
    assert parsed["sft"][0].model == parsed["pretrain"][0].out

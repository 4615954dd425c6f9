"""A signal at any moment, in preparation, a step, an evaluation, a save: nothing is lost, and one line says so."""

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_corpus_and_tokenizer, pretrain_words
from transformers import Trainer

from fathom.scripts import cli
from fathom.training import packing
from fathom.training.resumable import find_whole
from fathom.training.run import ConsoleCallback, SampleCallback
from fathom.training.trainer import FathomTrainer

STEPS = 6
WORDS = ("--eval_steps", "4", "--eval_rows", "8", "--accumulation", "2")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    assert cli.main(["pretrain", *pretrain_words(data, data / "whole", *WORDS, steps=STEPS)]) == 0
    return data / "whole"


class Once:
    """Patches a function so that its n-th call for which `when` holds sends a signal first."""

    def __init__(self, monkeypatch, where, name: str, number: int, when: Callable = lambda *_, **__: True, at: int = 1):
        self.calls = 0
        original = getattr(where, name)

        def patched(*args, **kwargs):
            if when(*args, **kwargs):
                self.calls += 1
                if self.calls == at:
                    signal.raise_signal(number)
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, patched)


def in_preparation(patch, number):
    return Once(patch, packing, "pack_documents", number)


def in_the_first_step(patch, number):
    return Once(patch, ConsoleCallback, "on_step_begin", number)


def in_a_step(patch, number):
    return Once(patch, ConsoleCallback, "on_step_begin", number, at=3)


def in_an_evaluation(patch, number):
    return Once(patch, FathomTrainer, "prediction_step", number, at=2)


def in_a_save(patch, number):
    return Once(patch, Trainer, "_save_optimizer_and_scheduler", number, at=2)


def in_the_last_evaluation(patch, number):
    evaluate = FathomTrainer.evaluate

    def noted(self, *args, **kwargs):
        self.is_last = bool(args)  # with a data set of its own
        return evaluate(self, *args, **kwargs)

    patch.setattr(FathomTrainer, "evaluate", noted)
    return Once(patch, FathomTrainer, "prediction_step", number, when=lambda trainer, *_, **__: trainer.is_last, at=2)


def in_the_last_save(patch, number):
    return Once(patch, FathomTrainer, "save_model", number, when=lambda *_, _internal_call=False: not _internal_call)


# Where it comes, and the step whose checkpoint it leaves: no step was taken in preparation, and in the last save all is
# done.
PLACES = [
    (in_preparation, None),
    (in_the_first_step, 1),
    (in_a_step, 3),
    (in_an_evaluation, 4),
    (in_a_save, 4),
    (in_the_last_evaluation, STEPS),
    (in_the_last_save, STEPS),
]


@pytest.mark.parametrize(("place", "step"), PLACES, ids=lambda value: getattr(value, "__name__", None))
def test_wherever_it_comes_nothing_is_lost(place, step, data, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    words = pretrain_words(data, out, *WORDS, steps=STEPS)
    with monkeypatch.context() as patch:
        sent = place(patch, signal.SIGTERM)
        code = cli.main(["pretrain", *words])
    output, errors = capsys.readouterr()
    assert "Traceback" not in errors
    if place is in_the_last_save:
        assert code == 0
        assert_same_weights(out, whole)
        return
    assert code == 128 + signal.SIGTERM
    if step is None:
        assert errors == "fathom pretrain: stopped by SIGTERM before the first step, so there is nothing to save\n"
        assert not out.exists()
    else:
        found = find_whole(out)
        assert found.checkpoint == out / f"checkpoint-{step}"
        assert found.faults == []
        assert output.splitlines()[-2] == f"stopped after step {step}, checkpoint saved; continue with"
        assert shlex.split(output.splitlines()[-1]) == ["fathom", "pretrain", *words, "--resume"]
    if place in (in_an_evaluation, in_the_last_evaluation):
        assert sent.calls == 2  # of four, and of many
    resumed = ["--resume"] if step else []
    assert cli.main(["pretrain", *words, *resumed]) == 0
    assert_same_weights(out, whole)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
@pytest.mark.parametrize("place", [in_preparation, in_an_evaluation])
def test_the_other_signals_do_the_same(number, place, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    place(monkeypatch, number)
    assert cli.main(["pretrain", *pretrain_words(data, out, *WORDS, steps=STEPS)]) == 128 + number
    name = signal.Signals(number).name
    output, errors = capsys.readouterr()
    if place is in_preparation:
        assert errors == f"fathom pretrain: stopped by {name} before the first step, so there is nothing to save\n"
    else:
        assert "stopped after step 4, checkpoint saved; continue with" in output


def test_before_the_first_step_of_a_resumed_run_its_checkpoint_stays(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_words(data, out, steps=2)]) == 0
    capsys.readouterr()
    in_preparation(monkeypatch, signal.SIGTERM)
    assert cli.main(["pretrain", *pretrain_words(data, out, "--resume", steps=4)]) == 128 + signal.SIGTERM
    kept = out / "checkpoint-2"
    assert (
        capsys.readouterr().err == f"fathom pretrain: stopped by SIGTERM before the first step; {kept} is as it was\n"
    )
    assert find_whole(out).checkpoint == kept


def test_signals_of_a_supervisor_do_not_end_the_save_that_the_first_began(data, tmp_path, monkeypatch):
    """systemd sends SIGTERM and SIGHUP, others repeat SIGTERM; only Ctrl-C is a person who cannot wait."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM):
                signal.raise_signal(number)

    monkeypatch.setattr(SampleCallback, "on_step_begin", on_step_begin)
    out = tmp_path / "run"
    assert cli.main(["pretrain", *pretrain_words(data, out, steps=STEPS)]) == 128 + signal.SIGTERM
    assert find_whole(out).checkpoint == out / "checkpoint-3"


def test_an_ignored_signal_stays_ignored(data, tmp_path):
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.MonkeyPatch.context() as patch:
            in_a_step(patch, signal.SIGHUP)
            assert cli.main(["pretrain", *pretrain_words(data, tmp_path / "run")]) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Pipe:
    """Standard output whose reader goes, or whose disk is full, after some lines."""

    encoding = "utf-8"

    def __init__(self, lines: int, error: OSError):
        self.left, self.error, self.text = lines, error, ""

    def write(self, text: str) -> int:
        self.left -= text.count("\n")
        if self.left < 0:
            raise self.error
        self.text += text
        return len(text)

    def flush(self) -> None:
        if self.left < 0:
            raise self.error

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_training_whose_output_ends_saves_and_stops(error, data, tmp_path, monkeypatch, capsys):
    """`fathom pretrain | head`, or a log on a full disk."""
    out, pipe = tmp_path / "run", Pipe(10, error)
    monkeypatch.setattr(sys, "stdout", pipe)
    assert cli.main(["pretrain", *pretrain_words(data, out, steps=40)]) == 128 + signal.SIGPIPE
    assert "step  1/40" in pipe.text
    found = find_whole(out)
    step = int(found.checkpoint.name.split("-")[1])
    assert step < 40
    (line, command) = capsys.readouterr().err.splitlines()
    assert re.match(rf"standard output cannot be written \(.*\): stopped after step {step}, checkpoint saved;", line)
    assert command.endswith("--resume")


@pytest.mark.parametrize("lines", [0, 3])
def test_output_that_ends_before_training_ends_the_verb(lines, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Pipe(lines, BrokenPipeError(32, "Broken pipe")))
    assert cli.main(["pretrain", *pretrain_words(data, tmp_path / "run")]) == 141
    assert capsys.readouterr().err == ""


def remove(out: Path) -> None:
    shutil.rmtree(out)


def put_a_file_there(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("mine")


def take_rights_away(out: Path) -> None:
    out.chmod(0o500)
    if os.geteuid() == 0:
        os.seteuid(65534)


@pytest.mark.parametrize("change", [put_a_file_there, take_rights_away])
def test_a_folder_that_is_lost_in_training_is_one_line(change, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    effective = os.geteuid()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            change(out)

    monkeypatch.setattr(SampleCallback, "on_step_begin", on_step_begin)
    try:
        code = cli.main(["pretrain", *pretrain_words(data, out)])
    finally:
        os.seteuid(effective)
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert code == 2
    assert line.startswith(f"fathom pretrain: error: cannot save {out / 'checkpoint-4'}: ")


def test_a_folder_that_is_removed_in_training_is_made_again(data, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            remove(out)

    monkeypatch.setattr(SampleCallback, "on_step_begin", on_step_begin)
    assert cli.main(["pretrain", *pretrain_words(data, out)]) == 0
    assert find_whole(out).checkpoint == out / "checkpoint-4"
    assert (out / "model.safetensors").is_file()

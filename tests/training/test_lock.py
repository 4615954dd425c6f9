"""Two runs never write to one folder, and no killed process keeps one."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment, make_corpus_and_tokenizer, pretrain_words

from fathom.training.errors import UserError
from fathom.training.lock import LOCK, run_lock


def hold(out: Path) -> None:
    with run_lock(out):
        pass


def test_a_second_run_is_told_who_has_the_folder(tmp_path: Path):
    out = tmp_path / "run"
    with run_lock(out):
        with pytest.raises(UserError) as error:
            hold(out)
        hold(tmp_path / "another")
    assert str(error.value) == (
        f"another run (process {os.getpid()}) is writing to --out {out}; stop it, wait for it, or choose another --out"
    )
    hold(out)


def test_what_the_lock_made_goes_with_it_and_nothing_else(tmp_path: Path):
    hold(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path / "a"):
        (tmp_path / "a" / "model").touch()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    hold(tmp_path / "empty")
    assert (tmp_path / "empty").is_dir()


def _hold_for_ever(out: str, held) -> None:
    with run_lock(Path(out)):
        if os.fork() == 0:
            signal.pause()  # a data loader's process, which outlives its parent
        held.set()
        signal.pause()


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    """Not even where a process that it forked lives on; the file it left is none."""
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=_hold_for_ever, args=(str(tmp_path), held))
    process.start()
    assert held.wait(30)
    with pytest.raises(UserError, match=f"another run \\(process {process.pid}\\)"):
        hold(tmp_path)
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    try:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert (tmp_path / LOCK).is_file()
        hold(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("code", ["EROFS", "EACCES", "ENOSPC"])
def test_a_folder_that_cannot_be_written_is_one_line(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import errno

    def refuse(*args, **kwargs):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"cannot write to --out .*; choose another folder"):
        hold(tmp_path)


def test_each_kind_of_second_run_is_refused_while_the_first_goes_on(tmp_path: Path):
    """Real processes: a new run, --resume and --overwrite, on a folder that a fourth holds."""
    make_corpus_and_tokenizer(tmp_path / "data")
    out = tmp_path / "run"
    (out / "checkpoint-2").mkdir(parents=True)
    with run_lock(out):
        for further in ([], ["--resume"], ["--overwrite"]):
            process = subprocess.run(
                [sys.executable, "-m", "fathom", "pretrain", *pretrain_words(tmp_path / "data", out, *further)],
                env=environment(),
                capture_output=True,
                text=True,
                timeout=120,
            )
            (line,) = process.stderr.strip().splitlines()
            assert process.returncode == 2
            assert line.startswith("fathom pretrain: error: another run (process ")
            assert (out / "checkpoint-2").is_dir()

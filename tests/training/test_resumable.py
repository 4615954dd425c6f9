"""A checkpoint counts once it is whole, damage of any kind is found, and rotation never costs the last whole one."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fathom.training import resumable
from fathom.training.errors import UserError
from fathom.training.manifest import MANIFEST, seal
from fathom.training.options import RunOptions
from fathom.training.resumable import clear_leftovers, find_whole, latest_checkpoint, rotate, whole_or_nothing
from fathom.training.run import check_out

TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
FILES = ("model.safetensors", "config.json", "trainer_state.json", "run.json", "tokenizer.json", *TORCH_FILES)


def half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def one_byte_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def zeros(file: Path) -> None:
    """What a power cut leaves of a file whose data had not reached the disk."""
    file.write_bytes(bytes(file.stat().st_size))


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def nonsense(file: Path) -> None:
    file.write_bytes(b"\x00\xff nonsense" * 7)


DAMAGES = (half, one_byte_short, empty, flipped, zeros, longer, nonsense, Path.unlink)


def make(run: Path, tiny_checkpoint: Path, step: int, sealed: bool = True) -> Path:
    folder = Path(shutil.copytree(tiny_checkpoint, run / f"checkpoint-{step}"))
    for name in TORCH_FILES:
        torch.save({"step": torch.full((200,), step)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "run.json").write_text("{}")
    if sealed:
        seal(folder)
    return folder


@pytest.fixture
def run(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    for step in (9, 10, 100):
        make(tmp_path / "run", tiny_checkpoint, step)
    return tmp_path / "run"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_falls_back_to_the_one_before_it(name: str, damage: Callable, run: Path):
    assert latest_checkpoint(run) == run / "checkpoint-100"
    damage(run / "checkpoint-100" / name)
    found = find_whole(run)
    assert found.checkpoint == run / "checkpoint-10"
    (note,) = found.notes()
    assert note.startswith(f"checkpoint-100 is not whole ({name} ")
    assert note.endswith("; going on from checkpoint-10")
    damage(run / "checkpoint-10" / name)
    assert latest_checkpoint(run) == run / "checkpoint-9"


@pytest.mark.parametrize("damage", [half, empty, flipped, zeros, nonsense], ids=lambda damage: damage.__name__)
def test_a_damaged_manifest_counts_as_damage(damage: Callable, run: Path):
    damage(run / "checkpoint-100" / MANIFEST)
    assert latest_checkpoint(run) == run / "checkpoint-10"


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 2, "files": {"a": {}}}', '{"format": 1, "files": {}}'])
def test_manifests_that_say_nothing(content: str, run: Path):
    (run / "checkpoint-100" / MANIFEST).write_text(content)
    assert latest_checkpoint(run) == run / "checkpoint-10"


@pytest.mark.parametrize("entry", [None, {}, {"size": "x", "sha256": "y"}, {"size": 3}])
def test_manifests_whose_entries_are_damaged(entry, run: Path):
    file = run / "checkpoint-100" / MANIFEST
    content = json.loads(file.read_text())
    content["files"]["optimizer.pt"] = entry
    file.write_text(json.dumps(content))
    found = find_whole(run)
    assert found.checkpoint == run / "checkpoint-10"
    assert "optimizer.pt" in found.faults[0]


def test_where_none_is_whole_one_line_names_them_all(run: Path):
    for step in (9, 10, 100):
        empty(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(UserError) as error:
        check_out(run, RunOptions(resume=True))
    line = str(error.value)
    assert line.startswith(
        f"--resume: {run} holds no complete checkpoint (checkpoint-100 is not whole (optimizer.pt has 0"
    )
    assert "checkpoint-10 is" in line
    assert "checkpoint-9 is" in line
    assert line.endswith("; begin anew with --overwrite")
    assert "\n" not in line
    with pytest.raises(UserError, match="already holds checkpoint-100"):
        check_out(run, RunOptions())


def test_checkpoints_of_earlier_versions_are_taken_and_said(tiny_checkpoint: Path, tmp_path: Path, capsys):
    run = tmp_path / "run"
    make(run, tiny_checkpoint, 4, sealed=False)
    assert check_out(run, RunOptions(resume=True)) == run / "checkpoint-4"
    assert capsys.readouterr().out == (
        "checkpoint-4 is of an earlier version, without manifest.json: its weights cannot be checked\n"
    )


@pytest.mark.parametrize("name", [*TORCH_FILES, "model.safetensors", "trainer_state.json", "run.json"])
@pytest.mark.parametrize("damage", [half, empty, nonsense], ids=lambda damage: damage.__name__)
def test_damaged_ones_of_earlier_versions_are_not(name: str, damage: Callable, tiny_checkpoint: Path, tmp_path: Path):
    run = tmp_path / "run"
    for step in (4, 6):
        make(run, tiny_checkpoint, step, sealed=False)
    damage(run / "checkpoint-6" / name)
    assert latest_checkpoint(run) == run / "checkpoint-4"


@pytest.mark.parametrize("name", TORCH_FILES)
def test_a_flipped_byte_of_an_earlier_version_s_state_is_found(name: str, tiny_checkpoint: Path, tmp_path: Path):
    folder = make(tmp_path / "run", tiny_checkpoint, 4, sealed=False)
    content = bytearray((folder / name).read_bytes())
    at = content.index(torch.full((200,), 4).numpy().tobytes())
    content[at + 100] ^= 1
    (folder / name).write_bytes(content)
    assert latest_checkpoint(tmp_path / "run") is None


def test_what_is_no_checkpoint_is_none(tmp_path: Path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "absent") is None


class TestWholeOrNothing:
    def test_it_counts_when_all_is_on_disk_and_not_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        happened: list[tuple[str, str]] = []
        fsync, replace = os.fsync, os.replace

        def noted_fsync(descriptor: int) -> None:
            happened.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
            fsync(descriptor)

        def noted_replace(source, target) -> None:
            happened.append(("rename", Path(target).name))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", noted_fsync)
        monkeypatch.setattr(os, "replace", noted_replace)
        folder = tmp_path / "checkpoint-5"
        with whole_or_nothing(folder) as written:
            (written / "weights").write_text("w")
            (written / "shards").mkdir()
            (written / "shards" / "0").write_text("s")
            assert not folder.exists()
        order = [entry for entry in happened if not entry[1].startswith(".manifest")]
        assert order == [
            ("fsync", "0"),
            ("fsync", "weights"),
            ("fsync", "shards"),
            ("rename", MANIFEST),
            ("fsync", "checkpoint-5"),
            ("rename", "checkpoint-5"),
            ("fsync", tmp_path.name),
        ]
        # The manifest is on disk before it has its name.
        assert happened[3][1].startswith(".manifest.json.")
        assert os.listdir(tmp_path) == ["checkpoint-5"]
        assert sorted(json.loads((folder / MANIFEST).read_text())["files"]) == ["shards/0", "weights"]

    def test_success_replaces(self, tmp_path: Path):
        folder = tmp_path / "checkpoint-5"
        folder.mkdir()
        (folder / "old").write_text("")
        with whole_or_nothing(folder) as written:
            (written / "new").write_text("")
        assert sorted(os.listdir(folder)) == [MANIFEST, "new"]
        assert os.listdir(tmp_path) == ["checkpoint-5"]

    @staticmethod
    def write(folder: Path, write: Callable[[Path], None]) -> None:
        with whole_or_nothing(folder) as written:
            write(written)

    @pytest.mark.parametrize("failure", [ValueError("broken"), KeyboardInterrupt()])
    def test_failure_leaves_what_was_there(self, failure: BaseException, tmp_path: Path):
        folder = tmp_path / "checkpoint-5"
        folder.mkdir()
        (folder / "old").write_text("x")

        def fail(written: Path) -> None:
            (written / "new").write_text("")
            raise failure

        with pytest.raises(type(failure)):
            self.write(folder, fail)
        assert os.listdir(tmp_path) == ["checkpoint-5"]
        assert os.listdir(folder) == ["old"]

    def test_a_full_disk_names_the_checkpoint_that_is_left(self, tmp_path: Path):
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "config.json").write_text("{}")
        with pytest.raises(UserError, match="checkpoint-5 is intact"), whole_or_nothing(tmp_path / "checkpoint-10"):
            raise OSError(errno.ENOSPC, "No space left on device")

    @pytest.mark.parametrize("writer", ["safetensors", "torch", "python"])
    def test_a_folder_that_is_gone_while_it_is_written_is_one_line(self, writer: str, tmp_path: Path):
        folder = tmp_path / "run" / "checkpoint-5"
        writers = {
            "safetensors": lambda file: save_file({"a": torch.zeros(3)}, file),
            "torch": lambda file: torch.save(torch.zeros(3), file),
            "python": lambda file: file.write_text("x"),
        }

        def write(written: Path) -> None:
            shutil.rmtree(tmp_path / "run")
            writers[writer](written / "file")

        with pytest.raises(UserError, match=r"cannot save .*checkpoint-5: ") as error:
            self.write(folder, write)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("mask", [0o022, 0o077])
    def test_modes_follow_the_umask(self, mask: int, tmp_path: Path):
        before = os.umask(mask)
        try:
            with whole_or_nothing(tmp_path / "checkpoint-5") as written:
                save_file({"a": torch.zeros(3)}, written / "model.safetensors")
        finally:
            os.umask(before)
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / "checkpoint-5").iterdir()} == {0o666 & ~mask}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.integers(0, 4), st.integers(0, 6))
def test_rotation_never_costs_whole_checkpoints(whole, limit, best):
    """Of folders that are whole or not, the newest just saved: what must stay, whatever is damaged."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for step, is_whole in enumerate(whole, 1):
            folder = root / f"checkpoint-{step}"
            folder.mkdir()
            if is_whole:
                (folder / "whole").touch()
        newest = root / f"checkpoint-{len(whole) + 1}"
        newest.mkdir()
        (newest / "whole").touch()
        protected = {newest} | ({root / f"checkpoint-{best}"} if 1 <= best <= len(whole) else set())
        before = {folder for folder in root.iterdir() if (folder / "whole").exists()}

        def check(folder: Path) -> bool:
            if not (folder / "whole").exists():
                raise UserError("damaged")
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resumable, "check_resumable", check)
            rotate(root, limit, protected, {newest})
        left = set(root.iterdir())
        kept = {folder for folder in left if (folder / "whole").exists()}
        assert protected <= left
        assert len(kept) >= min(len(before), limit or len(before))
        newest_first = sorted(before - protected, key=lambda folder: int(folder.name[11:]), reverse=True)
        room = max(limit - len(protected & before), 0) if limit else len(newest_first)
        assert kept == (before & protected) | set(newest_first[:room])


def test_what_a_kill_left_is_cleared_and_nothing_else(tmp_path: Path):
    run = tmp_path / "run"
    left = [
        tmp_path / ".run.partial-0a1b",
        run / ".partial",
        run / ".checkpoint-4.previous",
        run / ".checkpoint-2.removed",
    ]
    kept = [tmp_path / ".run2.partial-0a1b", run / "checkpoint-4", run / ".mine"]
    for folder in left + kept:
        folder.mkdir(parents=True)
        (folder / "file").touch()
    clear_leftovers(run)
    assert not any(folder.exists() for folder in left)
    assert all((folder / "file").exists() for folder in kept)


def test_a_checkpoint_that_was_put_aside_comes_back_if_the_new_one_did_not_arrive(tmp_path: Path):
    (tmp_path / ".checkpoint-4.previous").mkdir()
    (tmp_path / ".checkpoint-4.previous" / "file").touch()
    clear_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-4" / "file").exists()
    assert os.listdir(tmp_path) == ["checkpoint-4"]

"""Checkpoints of a run: saved whole or not at all, and found again.

A save that fails (full disk, Ctrl-C, a crash) never costs the checkpoint before it. Two doors, for the two
kinds of folder that a run writes, share one promise: the old content stays until the new one is complete on disk.

    staged_directory(target)    the model in a run folder, beside logs and `checkpoint-N` folders that must stay:
                                files are written to a hidden sibling folder, flushed, and then renamed into place
                                one by one, weights first and config.json last. A full disk thus shows itself while
                                the target is still untouched: renaming needs no room for data.
    whole_or_nothing(folder)    the `checkpoint-N` folder of transformers' Trainer, which writes to its final path:
                                an older folder of that name is put aside and comes back if the block fails.

A killed process can leave a `checkpoint-N` that lacks some of its files, half written or half removed;
`latest_checkpoint` steps over it.
"""

import errno
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint_files import (
    CONFIG,
    MODEL_TYPE,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_checkpoint,
    checkpoint_folders,
    newest_checkpoint,
    read_header,
    read_json,
    weight_files,
)
from .errors import UserError
from .loading import load_model, load_tokenizer

__all__ = [
    "CONFIG",
    "MODEL_TYPE",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "check_checkpoint",
    "clear_leftovers",
    "find_checkpoints",
    "latest_checkpoint",
    "load_model",
    "load_tokenizer",
    "read_header",
    "read_run",
    "staged_directory",
    "weight_files",
    "whole_or_nothing",
    "write_run",
]

TRAINER_STATE = "trainer_state.json"
RUN_FILE = "run.json"
# What training cannot go on without, beside weights and TRAINER_STATE: as the Trainer writes it, and under FSDP2
# accelerate, in one file or sharded. Of shards, torch writes `.metadata` last.
SCHEDULER = "scheduler.pt"
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0/.metadata")
SHARDED_WEIGHTS = "pytorch_model_fsdp_0/.metadata"

_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Neither library hands the errno on: safetensors (Rust) prints it, torch.save reports only that its writer failed.
_NO_SPACE_TEXT = re.compile(
    rf"\(os error ({'|'.join(map(str, _NO_SPACE))})\)|PytorchStreamWriter failed|inline_container.*unexpected pos", re.S
)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Gives an empty folder to write to and, when the block succeeds, moves its files into `target`.

    Files of `target` that were not written again stay, except weights: those of the old model would shadow the
    new ones where the number of shards has changed. In a distributed run, enter it on every process and write on
    one: an empty staging folder moves nothing.

    Args:
        target: folder to save to; made if it does not exist. The staging folder is its hidden sibling, so that
            both are on one file system.

    Raises:
        UserError: the disk, the quota or the file-size limit is full; `target` is as it was.
    """
    target = Path(target).absolute()
    # A random name: processes of several machines that share the file system may have the same id.
    staging = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with _disk_full_is_clear(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"cannot save to {target}: it is a file; choose another folder")
        try:
            staging.mkdir(parents=True)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot save to {target}: {error.strerror}; choose another folder") from error
        try:
            yield staging
            _move_into(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """Lets the block write `folder` in place; if it fails, `folder` is again what it was before.

    In a distributed run, enter it on one process, before any of them writes.

    Raises:
        UserError: the disk, the quota or the file-size limit is full.
    """
    folder = Path(folder).absolute()
    aside = folder.with_name(f".{folder.name}.previous")
    with _disk_full_is_clear(folder):
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        try:
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            if aside.exists():
                os.replace(aside, folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def clear_leftovers(run_dir: Path) -> None:
    """Removes what a killed process left of either: hidden folders that nothing reads."""
    run_dir = Path(run_dir).absolute()
    partial = run_dir.parent.glob(f".{glob.escape(run_dir.name)}.partial-*")
    for folder in [*partial, *run_dir.glob(".checkpoint-*.previous")]:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into(staging: Path, target: Path) -> None:
    """Renames every file below `staging` to the same place below `target`, config.json last, flushed to disk."""
    names = sorted(file.relative_to(staging) for file in staging.rglob("*") if file.is_file())
    if not names:
        return
    for name in names:
        _flush(staging / name)
    names.sort(key=lambda name: (name.name == CONFIG, not _WEIGHT_FILE.fullmatch(name.name), name))
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    written = {str(name) for name in names}
    if any(_WEIGHT_FILE.fullmatch(name) for name in written):
        for old in target.iterdir():
            if _WEIGHT_FILE.fullmatch(old.name) and old.name not in written:
                old.unlink()
    _flush(target)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full_is_clear(target: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_no_space(error):
            raise
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
        previous = target if (target / CONFIG).exists() else newest_checkpoint(target.parent)
        kept = f"; the previous checkpoint {previous} is intact" if previous else ""
        raise UserError(
            f"disk full while saving {target} ({free / 1e6:.0f} MB free): make room or choose another folder{kept}"
        ) from error


def _is_no_space(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return True
        if not isinstance(error, OSError) and _NO_SPACE_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The `checkpoint-N` with the largest N in `run_dir` from which training can go on, if there is one.

    Incomplete ones, as a killed process leaves them, are stepped over with a printed note.
    """
    for folder in checkpoint_folders(run_dir):
        try:
            if not (folder / SHARDED_WEIGHTS).is_file():
                check_checkpoint(folder)
            for names in ((SCHEDULER,), OPTIMIZER):
                if not any((folder / name).is_file() for name in names):
                    raise UserError(f"{folder} has no {names[0]}")
            for name in (TRAINER_STATE, RUN_FILE):
                read_json(folder / name)
        except UserError as error:
            print(f"skipping an incomplete checkpoint: {error}")
        else:
            return folder
    return None


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json: what was run and measured."""
    (folder / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `folder`'s run.json says, or None where there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = folder / RUN_FILE
    return read_json(file) if file.is_file() else None


def find_checkpoints(root: Path) -> list[Path]:
    """Folders at or below `root` that hold a whole Fathom model, newest first; hidden folders are left out."""
    found = []
    for name, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        if CONFIG in files and _is_whole(Path(name)):
            found.append(Path(name))
    return sorted(found, key=lambda folder: ((folder / CONFIG).stat().st_mtime, str(folder)), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except (UserError, OSError):
        return False
    return True

"""Folders of models: saved whole or not at all, and found again.

A save that fails (full disk, Ctrl-C, a crash) never costs what was there before it: the old content stays until the new
one is complete on disk.

    staged_directory(target)    the model in a run folder, beside logs and `checkpoint-N` folders that must stay:
                                files are written to a hidden sibling folder, flushed, and then renamed into place
                                one by one, weights first and config.json last. A full disk thus shows itself while
                                the target is still untouched: renaming needs no room for data.

The `checkpoint-N` folders of a run, from which training goes on, are the matter of `resumable`. What a folder of a
model must hold is in `checkpoint_files`, and how it becomes a model in `loading`.
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from .manifest import flush, follow_umask
from .secrecy import public

__all__ = [
    "CONFIG",
    "MODEL_TYPE",
    "WEIGHTS",
    "WEIGHTS_INDEX",
    "check_checkpoint",
    "checkpoint_folders",
    "find_checkpoints",
    "load_model",
    "load_tokenizer",
    "read_header",
    "read_run",
    "staged_directory",
    "weight_files",
    "write_run",
]

TRAINER_STATE = "trainer_state.json"
RUN_FILE = "run.json"

_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")

NO_SPACE = "disk full"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Neither library hands the errno on: safetensors (Rust) prints it, torch.save reports only that its writer failed.
_NO_SPACE_TEXT = re.compile(
    rf"\(os error ({'|'.join(map(str, _NO_SPACE))})\)|PytorchStreamWriter failed|inline_container.*unexpected pos", re.S
)
_OF_FILES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EIO, errno.EBUSY, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ESTALE),
}
_FAILED_WRITE_TEXT = re.compile(r"\(os error \d+\)|Parent directory .* does not exist|cannot be opened", re.S)


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
    with failures_are_clear(target):
        try:
            if target.exists() and not target.is_dir():
                raise UserError(f"cannot save to {target}: it is a file; choose another folder")
            staging.mkdir(parents=True)
        except OSError as error:
            if _reason(error, target.parent) is NO_SPACE:
                raise
            raise UserError(f"cannot save to {target}: {error.strerror}; choose another folder") from error
        try:
            yield staging
            _move_into(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move_into(staging: Path, target: Path) -> None:
    """Renames every file below `staging` to the same place below `target`, config.json last, flushed to disk."""
    names = sorted(file.relative_to(staging) for file in staging.rglob("*") if file.is_file())
    if not names:
        return
    follow_umask(staging)
    for name in names:
        flush(staging / name)
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
    flush(target)


@contextmanager
def failures_are_clear(target: Path) -> Iterator[None]:
    """Turns what can go wrong between the block, which saves `target`, and the disk into one line.

    Raises:
        UserError: the disk, the quota or the file-size limit is full, a folder is gone or read-only, the disk fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _reason(error, target.parent)) is None:
            raise
        kept = _kept(target)
        if reason is not NO_SPACE:
            mend = "make the folder writable or choose another"
            raise UserError(f"cannot save {target}: {reason}; {mend}{kept}") from error
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
        raise UserError(
            f"disk full while saving {target} ({free / 1e6:.0f} MB free): make room or choose another folder{kept}"
        ) from error


def _kept(target: Path) -> str:
    """The end of the message: what is left to go on from."""
    previous = None
    with suppress(OSError):  # a folder that may not be read, or is none any more
        previous = target if (target / CONFIG).exists() else newest_checkpoint(target.parent)
    return f"; the previous checkpoint {previous} is intact" if previous else ""


def _reason(error: BaseException | None, below: Path) -> str | None:
    """Why the disk took no file below a folder, `NO_SPACE` where it is full; None if the error is another one."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError):
            if error.errno in _NO_SPACE:
                return NO_SPACE
            if error.errno in _OF_FILES and error.filename is None:
                return str(error.strerror)
            if error.errno in _OF_FILES and Path(os.fsdecode(error.filename)).absolute().is_relative_to(below):
                return f"{os.fsdecode(error.filename)}: {error.strerror}"
        elif _NO_SPACE_TEXT.search(text):
            return NO_SPACE
        elif _FAILED_WRITE_TEXT.search(text):
            return " ".join(text.split())
        error = error.__cause__ or error.__context__
    return None


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json: what was run and measured, without secrets and absolute paths."""
    (folder / RUN_FILE).write_text(json.dumps(public(record), indent=2) + "\n", encoding="utf-8")


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

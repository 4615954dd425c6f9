"""manifest.json: the size and the SHA-256 of every file of a checkpoint, written last.

    {"format": 1, "files": {"model.safetensors": {"size": 36814200, "sha256": "..."}, ...}}

A checkpoint counts once its manifest is on disk: by then every other file is, too (fsync of each file and folder). A
file that is later cut short, emptied, changed or removed no longer agrees with it.
"""

import hashlib
import json
import os
import secrets
import stat
import zipfile
from pathlib import Path
from typing import Any

from .errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
# What torch.save writes: zip archives, whose own checksums are all that a checkpoint without a manifest has.
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


def seal(folder: Path) -> None:
    """Puts everything in `folder` on disk, and then a manifest of it; files get the modes that the umask asks for.

    Raises:
        OSError: the disk is full or fails.
    """
    follow_umask(folder)
    files = {}
    for file in _files(folder):
        flush(folder / file)
        files[file] = {"size": (folder / file).stat().st_size, "sha256": _digest(folder / file)}
    for below in sorted(path for path in folder.rglob("*") if path.is_dir()):
        flush(below)
    temporary = folder / f".{MANIFEST}.{secrets.token_hex(4)}"
    temporary.write_text(json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n", encoding="utf-8")
    flush(temporary)
    os.replace(temporary, folder / MANIFEST)
    flush(folder)


def check_sealed(folder: Path) -> bool:
    """Compares every file of a checkpoint with its manifest.

    Returns:
        True; False if there is no manifest, and then every file of torch.save has passed its own checksums.

    Raises:
        UserError: a file is missing, cut short or changed; the message begins with its name.
    """
    if not (folder / MANIFEST).is_file():
        for file in _files(folder):
            if file.endswith(_TORCH_SUFFIXES):
                _check_archive(folder, file)
        return False
    for file, entry in _read(folder / MANIFEST).items():
        _check(folder, file, entry)
    return True


def follow_umask(folder: Path) -> None:
    """Gives files and folders below `folder` the modes that a new file and a new folder have here.

    safetensors writes weights for the owner alone, other writers do as the umask says.
    """
    probe = folder / f".mode-{secrets.token_hex(4)}"
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[str]:
    """Paths below `folder` of all its files, hidden and temporary ones too, without the manifest."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in paths if path != MANIFEST)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = content["files"]
        if content["format"] != FORMAT:
            raise UserError(f"{MANIFEST} has format {content['format']!r}; this version knows {FORMAT}")
        if not isinstance(files, dict) or not files:
            raise ValueError("it lists no files")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    return files


def _check(folder: Path, file: str, entry: Any) -> None:
    try:
        size, digest = int(entry["size"]), str(entry["sha256"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{MANIFEST} has no size and checksum of {file}") from error
    path = folder / file
    try:
        found = path.stat().st_size
        if found != size:
            raise UserError(f"{file} has {found:,} bytes instead of {size:,}")
        if _digest(path) != digest:
            raise UserError(f"{file} was changed: it does not have the checksum that {MANIFEST} names")
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _check_archive(folder: Path, file: str) -> None:
    try:
        with zipfile.ZipFile(folder / file) as archive:
            if (entry := archive.testzip()) is not None:
                raise UserError(f"{file} is damaged, at {entry}")
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file} is damaged or cut short ({error})") from error


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

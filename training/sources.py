"""What `--sources` names: files, folders, globs, saved datasets and names of `datasets`, found before any is read.

"docs"        every readable file below it, but hidden ones; links that lead out of it are not followed
"docs/*.gz"   what the pattern matches
"owner/name"  a dataset, streamed
"""

import glob
import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from .errors import UserError
from .row_files import ROW_KINDS, is_saved_dataset, open_saved_dataset
from .text_files import COMPRESSIONS, TEXT_KINDS, kind_of, shown, why

KINDS = (*TEXT_KINDS, *ROW_KINDS)
READ = f"{' '.join(KINDS)}, also compressed ({' '.join(COMPRESSIONS)})"

# Tests are no library. The build's configuration (_sysconfigdata*, config-*) differs from machine to machine.
_STDLIB_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class TextFile:
    """A file to read: where it is, what to call it in the corpus, and its top-level module if it has one.

    `is_named`: a source names it, rather than a folder or a pattern that it is in.
    """

    path: Path
    name: str
    module: str | None = None
    is_named: bool = False


@dataclass
class Found:
    """What the sources hold. `links` counts links that lead out of their folder; `unreadable` names folders."""

    files: list[TextFile] = field(default_factory=list)
    tables: list[tuple[str, Dataset | IterableDataset]] = field(default_factory=list)
    links: int = 0
    unreadable: list[str] = field(default_factory=list)


def stdlib_files() -> list[TextFile]:
    """The sources of the running interpreter's standard library, without tests and without installed packages.

    `module` is the public face of a file: `_pydatetime.py` belongs to `datetime`, whose docstrings it holds.

    Raises:
        UserError: this interpreter came without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _STDLIB_SKIPPED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(_STDLIB_SKIPPED_PREFIXES):
            module = parts[0].removesuffix(".py").removeprefix("_py").lstrip("_")
            files.append(TextFile(path, "/".join(("stdlib", *parts)), module))
    if not files:
        raise UserError(f"this Python has no standard library sources in {root}; give --sources a folder of text")
    return files


def resolve(sources: Sequence[str], out: Path) -> Found:
    """Turns the sources into files and opened datasets, so that a wrong name fails before anything is read.

    Args:
        sources: as `build_corpus` takes them.
        out: folder that is written; nothing in it is a source.

    Raises:
        UserError: a source that does not exist, cannot be opened, or holds nothing that can be read.
    """
    if not sources:
        raise UserError("no sources; give --sources stdlib, a folder, a file, a glob or a datasets name")
    found = Found()
    for source in sources:
        count, links = len(found.files) + len(found.tables), found.links
        _add(found, source, out)
        if len(found.files) + len(found.tables) == count:
            left = found.links - links
            hint = f"; {left} links that lead out of it were not followed: name what they lead to" if left else ""
            hint += f"; cannot be read: {', '.join(found.unreadable[:3])}" if found.unreadable else ""
            raise UserError(f"source {shown(source)} has no files that end in {READ}{hint}")
    return found


def _add(found: Found, source: str, out: Path) -> None:
    path = Path(source)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or holds NUL
        raise UserError(f"source {shown(source)} cannot be looked at: {why(error)}") from error
    if source == "stdlib":
        found.files += stdlib_files()
    elif is_folder and is_saved_dataset(path):
        found.tables.append((shown(_label(path)), train_split(open_saved_dataset(path), source)))
    elif is_folder:
        _walk(found, path, out)
    elif is_file:
        if kind_of(path) not in KINDS:
            raise UserError(f"{shown(source)} ends in {path.suffix or 'nothing'}; a corpus reads {READ}")
        found.files.append(TextFile(path, shown(_label(path), limit=1000), is_named=True))
    elif glob.has_magic(source):
        _match(found, source)
    elif is_dataset_name(source):
        found.tables.append((source, open_dataset(source, split="train", streaming=True)))
    else:
        raise UserError(f"source {shown(source)} is no file, folder or glob, and no datasets name (owner/name)")


def _label(path: Path) -> str:
    # Names travel with the corpus; where the user's home is does not.
    return path.name if path.is_absolute() else path.as_posix()


def _walk(found: Found, root: Path, out: Path) -> None:
    """Files and saved datasets below a folder, in the order of their paths.

    With a stack, and without pathlib's walk, which recurses, and passes over what it cannot read without a word.
    """
    base, label = os.path.realpath(root), root.resolve().name
    # A corpus that is written below its own source must not be read as source the next time.
    written = os.path.realpath(out)
    files: list[TextFile] = []
    folders = [] if _is_inside(base, written) else [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            if folder == root:
                raise UserError(f"cannot read the folder {shown(root)}: {why(error)}") from error
            name = shown(f"{label}/{folder.relative_to(root).as_posix()}")
            found.unreadable.append(f"{name}: {why(error)}")
            continue
        for entry in inside:
            path = Path(entry.path)
            name = shown(f"{label}/{path.relative_to(root).as_posix()}", limit=1000)
            is_file = kind_of(path) in KINDS and entry.is_file()
            if entry.is_symlink():
                if (is_file or entry.is_dir()) and not _is_inside(os.path.realpath(path), base):
                    found.links += 1
                elif is_file and not _is_inside(os.path.realpath(path), written):
                    files.append(TextFile(path, name))
                # A link to a folder inside: that is walked under its own name.
            elif is_file:
                files.append(TextFile(path, name))
            elif entry.is_dir() and is_saved_dataset(path):
                found.tables.append((name, train_split(open_saved_dataset(path), name)))
            elif entry.is_dir() and os.path.realpath(path) != written:
                folders.append(path)
    found.files += sorted(files, key=lambda file: file.path)


def _match(found: Found, pattern: str) -> None:
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    base = os.path.realpath(os.path.dirname(fixed) or ".")
    try:
        matches = sorted(map(Path, glob.glob(pattern, recursive=True)))
    except RecursionError as error:
        raise UserError(f"source {shown(pattern)} matches folders that are nested too deep; name the folder") from error
    for match in matches:
        if kind_of(match) in KINDS and match.is_file():
            if _is_inside(os.path.realpath(match), base):
                found.files.append(TextFile(match, shown(_label(match), limit=1000)))
            else:
                found.links += 1


def _is_inside(path: str, folder: str) -> bool:
    """Whether a real path is the folder or below it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def train_split(data: Dataset | DatasetDict, name: str) -> Dataset:
    """The split `train` of a saved dictionary of splits, or the one split that was saved.

    Raises:
        UserError: there are splits, but no `train`.
    """
    if isinstance(data, Dataset):
        return data
    if "train" not in data:
        raise UserError(f"the dataset {shown(name)} has no split train, only {', '.join(data)}")
    return data["train"]


def is_dataset_name(source: str) -> bool:
    """Whether `source` has the form `owner/name[:config]`; the name of a file does not."""
    return _HUB_NAME.fullmatch(source) is not None and kind_of(Path(source)) not in KINDS


def open_dataset(name: str, **options: Any) -> Any:
    """`datasets.load_dataset` for `owner/name[:config]`, with one-line errors.

    Raises:
        UserError: it cannot be found, reached or read, with the first line of the reason.
    """
    repo, _, config = name.partition(":")
    try:
        return load_dataset(repo, config or None, **options)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline and Hub errors are OSErrors
        raise UserError(f"{name} is no file or folder here, and no dataset opens: {why(error)}") from error

"""Text in: from sources to a train and a held-out split on disk.

    sources -> documents -> duplicates dropped -> hash of a key -> train.parquet | heldout.parquet, corpus.json

One row is one document, so the row's end is the document boundary that packing must respect. What is held out
depends on nothing but a document's own key: no seed, no order, and a corpus that grows keeps its old split.
The key of a file is its content (renaming or moving it changes nothing); the key of a file of the standard
library is its top-level module, because `training/questions.py` asks about whole modules and the answers, being
docstrings, must not have been read in pretraining.

Compression by gzip and xz is the yardstick for a model's bits per byte: both are measured on the held-out text.
"""

import glob
import hashlib
import json
import lzma
import platform
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, concatenate_datasets, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError

from .checkpoints import staged_directory
from .errors import UserError
from .secrecy import public

HELDOUT_FRACTION = 0.05
TEXT_SUFFIXES = (".txt", ".md", ".py")
ROW_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + ROW_SUFFIXES

# Chosen once among many: modules differ in size a hundredfold, and under this salt the held-out ones are many, widely
# known and of even size, 6-7 % of the bytes and about 8 % of the questions of the standard library of CPython 3.10 to
# 3.13. Another salt is another split, so figures would no longer compare.
_SPLIT_SALT = "fathom-179"

# Tests are no library. The build's configuration (_sysconfigdata*, config-*) differs from machine to machine.
_STDLIB_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_STDLIB_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

# large_string: a batch of documents may hold more than the 2 GiB that 32-bit offsets reach.
_FEATURES = Features({"text": Value("large_string"), "name": Value("string")})
_SPLIT_FILES = {"train": "train.parquet", "heldout": "heldout.parquet"}
_REPORT = "corpus.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


@dataclass(frozen=True)
class TextFile:
    """A file to read: where it is, what to call it in the corpus, and its top-level module if it has one."""

    path: Path
    name: str
    module: str | None = None


@dataclass(frozen=True)
class CorpusReport:
    """What `build_corpus` did; `corpus.json` holds the same fields. Sizes are bytes of UTF-8 text."""

    sources: list[str]
    files: int
    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    duplicates: int
    skipped: int
    split: str
    gzip_bits_per_byte: float
    xz_bits_per_byte: float
    python: str

    @property
    def bytes(self) -> int:
        return self.train_bytes + self.heldout_bytes


def heldout(key: str, fraction: float) -> bool:
    """Whether `key` is held out: true for about `fraction` of all keys, always the same ones.

    A larger fraction holds out the same keys and more.
    """
    digest = hashlib.sha256(f"{_SPLIT_SALT}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


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


def build_corpus(
    sources: Sequence[str],
    out: Path,
    heldout_fraction: float = HELDOUT_FRACTION,
    text_column: str = "text",
    max_bytes: int | None = None,
) -> CorpusReport:
    """Reads the sources, drops duplicates, splits, and writes `train.parquet`, `heldout.parquet`, `corpus.json`.

    Nothing is written to `out` before all of it is complete, so an older corpus there survives a failure. Documents
    pass one at a time through a memory-mapped file, so the corpus need not fit into memory.

    Args:
        sources: each one `stdlib`, a file, a folder, a glob, or a `datasets` name `owner/name[:config]`, of which
            the split `train` is read.
        out: folder to write, made if missing.
        heldout_fraction: share of the documents to hold out, above 0, at most 0.25. The standard library never
            holds out less than `HELDOUT_FRACTION` of its modules: see the top of this file.
        text_column: where the text is in .jsonl, .parquet and `datasets` rows.
        max_bytes: stop after the document that reaches this size.

    Raises:
        UserError: a source that does not exist or holds no text, a malformed row, too little text to split.
    """
    if not 0 < heldout_fraction <= 0.25:
        raise UserError(f"heldout_fraction is {heldout_fraction}; it must be above 0 and at most 0.25")
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes is {max_bytes}; it must be above 0")
    files, tables = _resolve(sources, out)

    duplicates = skipped = size = 0
    seen: set[bytes] = set()
    sizes: list[int] = []
    is_heldout: list[bool] = []
    with staged_directory(out) as staging, tempfile.TemporaryDirectory(dir=staging) as scratch:
        arrow = str(Path(scratch, "documents.arrow"))
        with ArrowWriter(path=arrow, features=_FEATURES) as writer:
            for name, module, text in _documents(files, tables, text_column):
                data = _encoded(text)
                if data is None:
                    skipped += 1
                    continue
                digest = hashlib.sha256(data).digest()
                if digest in seen:
                    duplicates += 1
                    continue
                seen.add(digest)
                writer.write({"text": text, "name": name})
                sizes.append(len(data))
                is_heldout.append(
                    heldout(module, max(heldout_fraction, HELDOUT_FRACTION))
                    if module
                    else heldout(digest.hex(), heldout_fraction)
                )
                size += len(data)
                if max_bytes is not None and size >= max_bytes:
                    break
            writer.finalize()
        if not sizes:
            raise UserError(
                f"no text in {' '.join(sources)}: all {skipped} documents of {len(files)} files are binary or empty"
            )
        splits, rule = _split(Dataset.from_file(arrow), sizes, is_heldout, heldout_fraction)
        heldout_bytes, gzip_bits, xz_bits = _compressed(splits["heldout"]["text"])
        report = CorpusReport(
            sources=public(sources),
            files=len(files),
            train_documents=len(splits["train"]),
            train_bytes=size - heldout_bytes,
            heldout_documents=len(splits["heldout"]),
            heldout_bytes=heldout_bytes,
            duplicates=duplicates,
            skipped=skipped,
            split=rule,
            gzip_bits_per_byte=gzip_bits,
            xz_bits_per_byte=xz_bits,
            python=platform.python_version(),
        )
        for split, rows in splits.items():
            rows.to_parquet(str(staging / _SPLIT_FILES[split]))
        (staging / _REPORT).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def load_corpus(path: str | Path) -> DatasetDict:
    """Loads what `fathom corpus` wrote: splits `train` and `heldout`, columns `text` and `name`.

    Raises:
        UserError: no corpus there, or one whose files are broken or do not belong together.
    """
    folder = Path(path)
    for file in (*_SPLIT_FILES.values(), _REPORT):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is no corpus, it has no {file}; make one with: fathom corpus --out {folder}")
    try:
        report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        data = load_dataset("parquet", data_files={split: str(folder / file) for split, file in _SPLIT_FILES.items()})
        whole = all(
            rows.column_names == list(_FEATURES) and len(rows) == report[f"{split}_documents"]
            for split, rows in data.items()
        )
    except (DatasetGenerationError, OSError, ValueError, TypeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"the corpus in {folder} is broken; make it anew with: fathom corpus --out {folder}")
    return data


def _resolve(sources: Sequence[str], out: Path) -> tuple[list[TextFile], list[tuple[str, IterableDataset]]]:
    """Turns the sources into files and opened `datasets`, so that a wrong name fails before anything is read."""
    if not sources:
        raise UserError("no sources; give --sources stdlib, a folder, a file, a glob or a datasets name")
    files: list[TextFile] = []
    tables: list[tuple[str, IterableDataset]] = []
    for source in sources:
        path = Path(source)
        if source == "stdlib":
            found = stdlib_files()
        elif path.is_dir():
            found = _folder_files(path, out)
        elif path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise UserError(f"{source} ends in {path.suffix or 'nothing'}; a corpus reads {' '.join(SUFFIXES)}")
            found = [TextFile(path, _name(path))]
        elif glob.has_magic(source):
            matches = (Path(match) for match in sorted(glob.glob(source, recursive=True)))
            found = [TextFile(match, _name(match)) for match in matches if _is_readable(match)]
        elif is_dataset_name(source):
            tables.append((source, open_dataset(source, split="train", streaming=True)))
            continue
        else:
            raise UserError(f"source {source} is no file, folder or glob, and no datasets name (owner/name)")
        if not found:
            raise UserError(f"source {source} has no files that end in {' '.join(SUFFIXES)}")
        files += found
    return files, tables


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _name(path: Path) -> str:
    # Names travel with the corpus; where the user's home is does not.
    return path.name if path.is_absolute() else path.as_posix()


def _folder_files(root: Path, out: Path) -> list[TextFile]:
    files = []
    label = root.resolve().name
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        # A corpus that is written below its own source must not be read as source the next time.
        if _is_readable(path) and not any(part.startswith(".") for part in inside.parts) and not _is_below(path, out):
            files.append(TextFile(path, f"{label}/{inside.as_posix()}"))
    return files


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def is_dataset_name(source: str) -> bool:
    """Whether `source` has the form `owner/name[:config]`; the name of a file does not."""
    return _HUB_NAME.fullmatch(source) is not None and not source.endswith(SUFFIXES)


def open_dataset(name: str, **options: Any) -> Any:
    """`datasets.load_dataset` for `owner/name[:config]`, with one-line errors.

    Raises:
        UserError: it cannot be found, reached or read, with the first line of the reason.
    """
    repo, _, config = name.partition(":")
    try:
        return load_dataset(repo, config or None, **options)
    except (OSError, ValueError, RuntimeError) as error:  # not found, offline and Hub errors are OSErrors
        raise UserError(f"{name} is no file or folder here, and no dataset opens: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _documents(
    files: Iterable[TextFile], tables: Iterable[tuple[str, IterableDataset]], column: str
) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields (name, top-level module, text); text is None for what is binary or missing."""
    for file in files:
        try:
            if file.path.suffix.lower() in ROW_SUFFIXES:
                rows = json_rows(file.path) if file.path.suffix.lower() == ".jsonl" else parquet_rows(file.path)
                for number, row in rows:
                    name = f"{file.name}:{number}"
                    yield name, None, None if row is None else _text_of(row, column, name)
            else:
                yield file.name, file.module, _decoded(file.path.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror or error}") from error
    for source, table in tables:
        try:
            for number, row in enumerate(table, 1):
                name = f"{source}:{number}"
                yield name, None, _text_of(row, column, name)
        except OSError as error:
            raise UserError(f"cannot read the dataset {source}: {_first_line(error)}") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yields (line number from 1, object) of a .jsonl file without its blank lines; None for an undecodable line.

    Raises:
        UserError: a line that is no JSON object.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decoded(line)
            if text is None:
                yield number, None
            elif text.strip():
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise UserError(f"{path} line {number} is no JSON: {error}") from error
                if not isinstance(row, dict):
                    raise UserError(f"{path} line {number} is a {type(row).__name__}; each line must be a JSON object")
                yield number, row


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (row number from 1, row) of a .parquet file.

    Raises:
        UserError: no parquet file.
    """
    try:
        with pq.ParquetFile(path) as table:
            batches = table.iter_batches(batch_size=1000)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise UserError(f"{path} is no parquet file: {_first_line(error)}") from error


def _text_of(row: dict[str, Any], column: str, where: str) -> str | None:
    if column not in row:
        raise UserError(f"{where} has no {column!r}, only {', '.join(map(repr, row))}; choose with --text_column")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is a {type(text).__name__}, not text; choose with --text_column")
    return text


def _decoded(data: bytes) -> str | None:
    """UTF-8 text without its byte order mark, newlines as they are; None for binary data."""
    if b"\0" in data:  # valid UTF-8, but no text: what git, too, takes as the mark of a binary file
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _encoded(text: str | None) -> bytes | None:
    """The bytes of a document; None if there are none or if lone surrogates (`"\\ud800"` in JSON) forbid it."""
    if text is None or not text.strip():
        return None
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def _split(documents: Dataset, sizes: list[int], is_heldout: list[bool], fraction: float) -> tuple[DatasetDict, str]:
    """Splits by the documents' own keys; where too few documents leave that one-sided, holds out a part of one.

    That is the end of the longest document, or, where it has no lines to cut at, a whole one of middling size.
    """

    def chosen(wanted: bool) -> Dataset:
        return documents.select([at for at, out in enumerate(is_heldout) if out == wanted])

    share = sum(size for size, out in zip(sizes, is_heldout, strict=True) if out) / sum(sizes)
    if 0 < share <= 0.5:
        rule = f"{fraction:.3g} of the documents by content hash; standard library: of the modules by name hash"
        return DatasetDict(train=chosen(False), heldout=chosen(True)), rule

    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    longest = documents[by_size[-1]]
    cut = longest["text"].rfind("\n", 0, int(len(longest["text"]) * (1 - fraction))) + 1
    head, tail = longest["text"][:cut], longest["text"][cut:]
    if head.strip() and tail.strip():
        others = documents.select(sorted(by_size[:-1]))
        start = Dataset.from_dict({"text": [head], "name": [longest["name"]]}, features=_FEATURES)
        end = Dataset.from_dict({"text": [tail], "name": [f"{longest['name']} (end)"]}, features=_FEATURES)
        rule = f"the last {fraction:.3g} of the longest document; {len(sizes)} are too few to hold out whole ones"
        return DatasetDict(train=concatenate_datasets([others, start]), heldout=end), rule
    if len(sizes) == 1:
        raise UserError(
            f"nothing can be held out: {longest['name']}, {sizes[0]} bytes, is the only document and has no line's end "
            f"in its first {1 - fraction:.0%}; give more text"
        )
    middle = by_size[(len(sizes) - 1) // 2]
    is_heldout = [at == middle for at in range(len(sizes))]
    rule = f"one document of middling size; {len(sizes)} are too few to choose by hash"
    return DatasetDict(train=chosen(False), heldout=chosen(True)), rule


def _compressed(texts: Iterable[str]) -> tuple[int, float, float]:
    """Size of the texts in bytes, and the bits per byte that `gzip -9` and `xz -9e` need for all of them in a row."""
    gzip, xz = zlib.compressobj(9, wbits=31), lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = gzip_size = xz_size = 0
    for text in texts:
        data = text.encode()
        size += len(data)
        gzip_size += len(gzip.compress(data))
        xz_size += len(xz.compress(data))
    gzip_size += len(gzip.flush())
    xz_size += len(xz.flush())
    return size, 8 * gzip_size / size, 8 * xz_size / size

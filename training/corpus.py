"""Text in: from sources to a train and a held-out split on disk.

    sources -> documents -> duplicates dropped -> hash of a key -> train.parquet | heldout.parquet, corpus.json

One row is one document, so the row's end is the document boundary that packing must respect. What is held out
depends on nothing but a document's own key: no seed, no order, and a corpus that grows keeps its old split.
The key of a file is its content (renaming or moving it changes nothing); the key of a file of the standard
library is its top-level module, because `training/questions.py` asks about whole modules and the answers, being
docstrings, must not have been read in pretraining.

Compression by gzip and xz is the yardstick for a model's bits per byte: both are measured on the held-out text.
"""

import hashlib
import json
import lzma
import platform
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError

from ..tokenizer.pieces import pieces
from .checkpoints import staged_directory
from .errors import UserError
from .row_files import LINE_KINDS, ROW_KINDS, BadRow, missing_column, read_rows, unit_of
from .secrecy import public
from .sources import Found, TextFile, resolve
from .text_files import DAMAGED, LONGEST_DOCUMENT, document_parts, encoding_of, kind_of, shown, text_of, why

HELDOUT_FRACTION = 0.05

# Chosen once among many: modules differ in size a hundredfold, and under this salt the held-out ones are many, widely
# known and of even size, 6-7 % of the bytes and about 8 % of the questions of the standard library of CPython 3.10 to
# 3.13. Another salt is another split, so figures would no longer compare.
_SPLIT_SALT = "fathom-179"

# large_string: a batch of documents may hold more than the 2 GiB that 32-bit offsets reach.
_FEATURES = Features({"text": Value("large_string"), "name": Value("string")})
_SPLIT_FILES = {"train": "train.parquet", "heldout": "heldout.parquet"}
_REPORT = "corpus.json"

_BYTES_AT_ONCE = 1 << 24  # of text that waits to be written
_SHORTEST_CUT = 1000  # bytes: a line of less is not cut in two to hold its end out
_NAMED = 100  # files that the report names

# In a folder these are more often settings or measurements than text: one without it is left out, and named.
_TABLES_OF_ALL_KINDS = (".json", ".csv", ".tsv")


@dataclass(frozen=True)
class CorpusReport:
    """What `build_corpus` did; `corpus.json` holds the same fields. Sizes are bytes of UTF-8 text.

    Attributes:
        encodings: files by codec, of those that are not UTF-8.
        undecoded: files that are binary or in no encoding that is sure; the first hundred names.
        unread: folders that could not be opened, and tables (.json, .csv, .tsv) in a folder that hold no text, each
            with the reason.
        links: links that lead out of a folder of the sources and were not followed.
    """

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
    encodings: dict[str, int] = field(default_factory=dict)
    undecoded: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    links: int = 0

    @property
    def bytes(self) -> int:
        return self.train_bytes + self.heldout_bytes


def heldout(key: str, fraction: float) -> bool:
    """Whether `key` is held out: true for about `fraction` of all keys, always the same ones.

    A larger fraction holds out the same keys and more.
    """
    digest = hashlib.sha256(f"{_SPLIT_SALT}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def build_corpus(
    sources: Sequence[str],
    out: Path,
    heldout_fraction: float = HELDOUT_FRACTION,
    text_column: str = "text",
    max_bytes: int | None = None,
) -> CorpusReport:
    """Reads the sources, drops duplicates, splits, and writes `train.parquet`, `heldout.parquet`, `corpus.json`.

    Nothing is written to `out` before all of it is complete, so an older corpus there survives a failure. Documents
    pass one at a time through a memory-mapped file, so the corpus need not fit into memory; of a file of text, however
    long its lines are, no more than a document is held.

    Args:
        sources: each one `stdlib`, a file, a folder, a glob, a folder that `datasets` saved, or a `datasets` name
            `owner/name[:config]`; of several splits `train` is read. `sources.READ` lists the kinds of files.
        out: folder to write, made if missing.
        heldout_fraction: share of the documents to hold out, above 0, at most 0.25. The standard library never
            holds out less than `HELDOUT_FRACTION` of its modules: see the top of this file.
        text_column: where the text is in rows.
        max_bytes: stop after the document that reaches this size.

    Raises:
        UserError: a source that does not exist or holds no text, a malformed row, too little text to split.
    """
    if not 0 < heldout_fraction <= 0.25:
        raise UserError(f"heldout_fraction is {heldout_fraction}; it must be above 0 and at most 0.25")
    if max_bytes is not None and max_bytes <= 0:
        raise UserError(f"max_bytes is {max_bytes}; it must be above 0")
    _check_name(out)
    found = resolve(sources, out)

    reading = _Reading()
    duplicates = skipped = size = waiting = 0
    seen: set[bytes] = set()
    sizes: list[int] = []
    is_heldout: list[bool] = []
    with staged_directory(out) as staging, tempfile.TemporaryDirectory(dir=staging) as scratch:
        arrow = str(Path(scratch, "documents.arrow"))
        with ArrowWriter(path=arrow, features=_FEATURES) as writer:
            for name, module, text in _documents(found, text_column, reading):
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
                waiting += len(data)
                if waiting >= _BYTES_AT_ONCE:
                    writer.write_examples_on_file()
                    waiting = 0
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
            named = f": {', '.join(reading.undecoded[:3])}; save text as UTF-8" if reading.undecoded else ""
            raise UserError(
                f"no text in {' '.join(map(shown, sources))}: all {skipped} documents of {len(found.files)} files are "
                f"binary or empty{named}"
            )
        splits, rule = _split(Dataset.from_file(arrow), sizes, is_heldout, heldout_fraction)
        heldout_bytes, gzip_bits, xz_bits = _compressed(row["text"] for row in splits["heldout"])
        report = CorpusReport(
            sources=public([shown(source) for source in sources]),
            files=len(found.files) - len(reading.unread),
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
            encodings=reading.encodings,
            undecoded=reading.undecoded[:_NAMED],
            unread=[*found.unreadable, *reading.unread][:_NAMED],
            links=found.links,
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
    _check_name(folder)
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


def _check_name(folder: Path) -> None:
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the name of {shown(folder)} is not UTF-8, which pyarrow opens no other of; rename it"
        ) from error


@dataclass
class _Reading:
    """What is counted while documents are read."""

    encodings: dict[str, int] = field(default_factory=dict)
    undecoded: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def _documents(found: Found, column: str, reading: _Reading) -> Iterator[tuple[str, str | None, str | None]]:
    """Yields (name, top-level module, text); text is None for what is binary, undecodable or missing.

    A text of more than `LONGEST_DOCUMENT` characters comes in parts, each a document.
    """
    for file in found.files:
        for name, text in _documents_of(file, column, reading):
            yield name, file.module, text
    for source, table in found.tables:
        try:
            for number, row in enumerate(table, 1):
                name = f"{source}:{number}"
                whole = _text_of(row, column, name)
                for part, text in _parts(name, pieces(whole, LONGEST_DOCUMENT) if whole else [whole]):
                    yield part, None, text
        except DAMAGED as error:
            raise UserError(f"cannot read the dataset {source}: {why(error)}") from error


def _documents_of(file: TextFile, column: str, reading: _Reading) -> Iterator[tuple[str, str | None]]:
    kind = kind_of(file.path)
    encoding = None if kind == ".parquet" else encoding_of(file.path)
    if encoding not in (None, "utf-8", "utf-8-sig"):
        reading.encodings[encoding] = reading.encodings.get(encoding, 0) + 1
    if encoding is None and kind not in (*LINE_KINDS, ".parquet"):
        reading.undecoded.append(file.name)
        yield file.name, None
    elif kind in ROW_KINDS:
        rows = _row_documents(file, encoding, column, reading)
        if kind in _TABLES_OF_ALL_KINDS and not file.is_named:
            try:
                first = next(rows, None)
            except UserError as error:
                reading.unread.append(str(error).replace(shown(file.path), file.name))
                return
            rows = chain([] if first is None else [first], rows)
        yield from rows
    else:
        yield from _parts(file.name, document_parts(text_of(file.path, encoding)))  # type: ignore[arg-type]


def _row_documents(
    file: TextFile, encoding: str | None, column: str, reading: _Reading
) -> Iterator[tuple[str, str | None]]:
    decoded = undecodable = 0
    for number, row in read_rows(file.path, encoding, column):
        name = f"{file.name}:{number}"
        text = None
        if isinstance(row, BadRow) and row.undecodable:
            undecodable += 1
        elif isinstance(row, BadRow):
            raise UserError(f"{shown(file.path)} {unit_of(file.path)} {number} {row.problem}")
        else:
            decoded += 1
            text = _text_of(row, column, name)
        del row
        yield from _parts(name, pieces(text, LONGEST_DOCUMENT) if text else [text])
    if undecodable and not decoded:
        reading.undecoded.append(file.name)


def _parts(name: str, texts: Iterable[str | None]) -> Iterator[tuple[str, str | None]]:
    """(name, text) of each part of a document; a document that is one part keeps its name."""
    number, waiting = 0, None
    for text in texts:
        if number:
            yield f"{name} (part {number})", waiting
        number, waiting = number + 1, text
    yield (f"{name} (part {number})" if number > 1 else name), waiting


def _text_of(row: dict[str, Any], column: str, where: str) -> str | None:
    if column not in row:
        raise UserError(f"{where} {missing_column(column, row)}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {column!r} is a {type(text).__name__}, not text; choose with --text_column")
    return text


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

    That is the end of the longest document, or, where that has no line's end near, a whole one of middling size. The
    only document is then cut within its line.
    """

    def chosen(wanted: bool) -> Dataset:
        return documents.select([at for at, out in enumerate(is_heldout) if out == wanted])

    share = sum(size for size, out in zip(sizes, is_heldout, strict=True) if out) / sum(sizes)
    if 0 < share <= 0.5:
        rule = f"{fraction:.3g} of the documents by content hash; standard library: of the modules by name hash"
        return DatasetDict(train=chosen(False), heldout=chosen(True)), rule

    by_size = sorted(range(len(sizes)), key=sizes.__getitem__)
    longest = documents[by_size[-1]]
    most = int(len(longest["text"]) * (1 - fraction))
    cut = longest["text"].rfind("\n", most // 2, most) + 1
    if not cut and len(sizes) == 1:
        is_long, half = sizes[0] >= _SHORTEST_CUT, most // 2
        in_line = half + len(next(pieces(longest["text"][half:], most - half)))
        cut = in_line if is_long else longest["text"].rfind("\n", 0, most) + 1
    head, tail = longest["text"][:cut], longest["text"][cut:]
    if head.strip() and tail.strip():
        others = documents.select(sorted(by_size[:-1]))
        start = Dataset.from_dict({"text": [head], "name": [longest["name"]]}, features=_FEATURES)
        end = Dataset.from_dict({"text": [tail], "name": [f"{longest['name']} (end)"]}, features=_FEATURES)
        rule = f"the last {fraction:.3g} of the longest document; {len(sizes)} are too few to hold out whole ones"
        return DatasetDict(train=concatenate_datasets([others, start]), heldout=end), rule
    if len(sizes) == 1:
        raise UserError(
            f"nothing can be held out: {longest['name']}, {sizes[0]} bytes, is the only document, has no line's end "
            f"to be cut at and less than {_SHORTEST_CUT} bytes; give more text"
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

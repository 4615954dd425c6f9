"""Files of text, compressed or not, in any encoding that is sure: opened, decoded, and long ones in parts.

    kind_of("a.jsonl.gz") is ".jsonl"; a name that says only how it is compressed ("wiki.zst") is taken for text

A document of more than `LONGEST_DOCUMENT` characters comes in several, cut at a line's or a word's end where there is
one: what is read, hashed, tokenized and written at a time stays small, also where a file is one line of 100 MB.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow as pa

from ..tokenizer.pieces import pieces
from .encodings import detect_encoding
from .errors import UserError

TEXT_KINDS = (".txt", ".md", ".py")
LONGEST_DOCUMENT = 1 << 22  # characters; a context of a million tokens is as long

# What reading a damaged file raises, whichever library reads.
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


def _open_zstandard(path: Path) -> BinaryIO:
    # Not by its name: pyarrow takes none that is not UTF-8.
    return io.BufferedReader(pa.input_stream(path.open("rb"), compression="zstd"))  # type: ignore[arg-type]


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case, without that of its compression."""
    name = Path(path.name.lower())
    if name.suffix in COMPRESSIONS:
        return name.with_suffix("").suffix or ".txt"
    return name.suffix


def open_binary(path: Path) -> BinaryIO:
    """Opens a file; what is read is decompressed."""
    return COMPRESSIONS.get(path.suffix.lower(), lambda path: path.open("rb"))(path)


def open_text(path: Path, encoding: str) -> TextIO:
    """Opens a file as text, newlines as they are."""
    return io.TextIOWrapper(open_binary(path), encoding=encoding, newline="")


def encoding_of(path: Path) -> str | None:
    """The codec of all of the file's text; None for binary data and for encodings that are not sure.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return detect_encoding(lambda: open_binary(path))
    except DAMAGED as error:
        raise UserError(f"cannot read {shown(path)}: {why(error)}") from error


def document_parts(chunks: Iterable[str]) -> Iterator[str]:
    """Documents of at most `LONGEST_DOCUMENT` characters from the text of one, given in chunks; one or more."""
    rest = ""
    for chunk in chunks:
        *whole, rest = pieces(rest + chunk, LONGEST_DOCUMENT)
        yield from whole
    yield rest


def text_of(path: Path, encoding: str) -> Iterator[str]:
    """The text of a file, in chunks.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open_text(path, encoding) as text:
            while chunk := text.read(LONGEST_DOCUMENT):
                yield chunk
    except DAMAGED as error:
        raise UserError(f"cannot read {shown(path)}: {why(error)}") from error


def shown(path: str | Path, limit: int = 200) -> str:
    """A file's name as text that can be printed and stored: bytes that are no UTF-8 as \\xe9, the middle of a very
    long one left out."""
    name = os.fsencode(path).decode("utf-8", errors="backslashreplace")
    return name if len(name) <= limit else f"{name[: limit // 2]}...{name[-limit // 2 :]}"


def why(error: BaseException) -> str:
    """The first line of what an exception says; of the system's errors without the file's name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Files and datasets of rows: .jsonl, .json, .csv, .tsv, .parquet, and what `datasets` saved.

    read_rows("a.jsonl.gz")   (1, {"text": ...}), (2, BadRow("no JSON: ...")), (3, {...}), ...

One row is read at a time, whatever the file's size. A row that cannot be read is given as what is wrong with it, where
the rows after it can be: who reads decides whether to go on.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_from_disk

from .errors import UserError
from .text_files import DAMAGED, encoding_of, kind_of, open_binary, open_text, shown, why

LINE_KINDS = (".jsonl", ".ndjson")
ROW_KINDS = (*LINE_KINDS, ".json", ".csv", ".tsv", ".parquet")
LONGEST_ROW = 1 << 29  # bytes or characters: a row is held as a whole, twice while it is parsed

_CHUNK = 1 << 20  # characters
_ROWS_AT_ONCE = 64  # of a .parquet file
_END_OF_BLANKS, _END_OF_COMMA = re.compile(r"[ \t\r\n]*"), re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")
_UNFINISHED = 16  # characters before the end in which JSON that goes on may look wrong


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: what is wrong with it, and whether its bytes are no text."""

    problem: str
    undecodable: bool = False


def read_rows(
    path: Path, encoding: str | None = None, column: str | None = None
) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Yields (number from 1, row) of a file; of .jsonl the number of the line, blank ones left out.

    Args:
        path: its kind is one of `ROW_KINDS`.
        encoding: `encoding_of` the file, where that is known already.
        column: the only one that is needed; of .parquet no other is read, and a .csv must have it.

    Raises:
        UserError: the file cannot be read or decoded, or nothing after a bad row can.
    """
    kind = kind_of(path)
    try:
        if kind == ".parquet":
            yield from _parquet_rows(path, column)
            return
        encoding = encoding or encoding_of(path)
        if kind in LINE_KINDS:
            yield from _json_lines(path, encoding)
        elif encoding is None:
            raise UserError(
                f"{shown(path)} is in no encoding that can be told for sure (UTF-8, UTF-16, GBK, Latin-1); "
                "save it as UTF-8"
            )
        elif kind == ".json":
            yield from _json_rows(path, encoding)
        else:
            yield from _csv_rows(path, encoding, column)
    except DAMAGED as error:
        raise UserError(f"cannot read {shown(path)}: {why(error)}") from error


def unit_of(path: Path) -> str:
    """What the numbers of `read_rows` count."""
    return "line" if kind_of(path) in LINE_KINDS else "row"


def missing_column(column: str, columns: Iterable[str]) -> str:
    """What is wrong with a row of a corpus that has other columns."""
    return f"has no {column!r}, only {', '.join(map(repr, columns)) or 'nothing'}; choose with --text_column"


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote this folder (`save_to_disk`): one split, or a dictionary of them."""
    # Not by pathlib, which raises where a path is too long.
    has = [os.path.isfile(folder / name) for name in ("dataset_dict.json", "state.json", "dataset_info.json")]
    return has[0] or all(has[1:])


def open_saved_dataset(folder: Path) -> Dataset | DatasetDict:
    """Opens what `save_to_disk` wrote; the rows stay on disk.

    Raises:
        UserError: files are missing or damaged.
    """
    try:
        return load_from_disk(str(folder))
    except (*DAMAGED, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the dataset saved in {shown(folder)} cannot be opened: {why(error)}") from error


def _json_lines(path: Path, encoding: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    if encoding in (None, "utf-8", "utf-8-sig"):
        # As bytes: a line that is no UTF-8 spoils no other. utf-8-sig takes the mark off the first.
        opened: Any = open_binary(path)
    else:
        opened = open_text(path, encoding)
    number = 0
    with opened as lines:
        while line := lines.readline(LONGEST_ROW):
            number += 1
            if len(line) == LONGEST_ROW:
                raise UserError(f"{shown(path)} line {number} is longer than {LONGEST_ROW >> 20} MiB; cut it in two")
            row = _parsed(line)
            del line  # of a long one there are never three copies
            if row is not None:
                yield number, row


def _parsed(line: bytes | str) -> dict[str, Any] | BadRow | None:
    """One JSON object; None for a blank line."""
    if isinstance(line, bytes):
        if b"\0" in line:
            return BadRow("is no text: it holds NUL bytes", undecodable=True)
        try:
            line = line.decode("utf-8-sig")
        except UnicodeDecodeError:
            return BadRow("is no UTF-8 text", undecodable=True)
    if not line.strip():
        return None
    try:
        return _object(json.loads(line))
    except RecursionError:
        return BadRow("is JSON that is nested too deep to be read")
    except ValueError as error:
        return BadRow(f"is no JSON: {error}")


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, dict) else BadRow(f"is a {type(value).__name__}; it must be a JSON object")


def _json_rows(path: Path, encoding: str) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Of a list of objects, or of objects one after the other, as in many a .json file that has them by the line."""
    with open_text(path, encoding) as text:
        for number, value in enumerate(_json_values(text, shown(path)), 1):
            yield number, value if isinstance(value, BadRow) else _object(value)


def _json_values(text: TextIO, name: str) -> Iterator[Any]:
    """The values of a JSON list, or of JSON values in a row, parsed one by one while the text is read.

    Outside of a list, reading goes on in the line after a value that is wrong, which is given as a `BadRow`.
    """
    decoder = json.JSONDecoder()
    buffer = text.read(_CHUNK)
    place = _END_OF_BLANKS.match(buffer).end()  # type: ignore[union-attr]
    is_list = buffer.startswith("[", place)
    place += is_list
    ended, count = False, 0
    while True:
        pattern = _END_OF_COMMA if is_list and count else _END_OF_BLANKS
        place = pattern.match(buffer, place).end()  # type: ignore[union-attr]
        if is_list and buffer.startswith("]", place):
            return
        problem = None
        try:
            value, end = decoder.raw_decode(buffer, place)
            # A number may go on.
            goes_on = end == len(buffer) and not isinstance(value, dict | list | str)
        except RecursionError:
            problem, goes_on = "is JSON that is nested too deep to be read", False
        except json.JSONDecodeError as error:
            problem = f"is no JSON: {error.msg}"
            goes_on = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - _UNFINISHED
        if goes_on and not ended and len(buffer) - place >= LONGEST_ROW:
            problem, goes_on = "is too long", False
        if goes_on and not ended:
            more = text.read(max(_CHUNK, len(buffer) - place))
            buffer, place, ended = buffer[place:] + more, 0, not more
            continue
        if problem is not None and place == len(buffer) and not is_list:
            return
        count += 1
        if problem is None:
            place = end
            yield value
            continue
        line_end = -1 if is_list else buffer.find("\n", place)
        if line_end < 0:
            raise UserError(f"{name} row {count} {problem}; the rows after it cannot be found")
        place = line_end
        yield BadRow(problem)


def _csv_rows(path: Path, encoding: str, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    csv.field_size_limit(LONGEST_ROW)
    with open_text(path, encoding) as text:
        delimiter = "\t" if kind_of(path) == ".tsv" else _delimiter(text.readline(_CHUNK))
    with open_text(path, encoding) as text:
        # Strict: a quote that is never closed is an error, not a text of all that follows.
        table = csv.reader(text, delimiter=delimiter, strict=True)
        number, header = 0, None
        while True:
            try:
                cells = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                number += header is not None
                if header is None or "limit" in str(error):
                    raise UserError(f"{shown(path)} row {number} cannot be read: {error}") from error
                yield number, BadRow(f"cannot be read: {error} (line {table.line_num})")
                continue
            if header is None:
                header = cells
                if column is not None and column not in header:
                    raise UserError(f"{shown(path)} {missing_column(column, header)}")
            elif cells:
                number += 1
                if len(cells) > len(header):
                    yield number, BadRow(f"has {len(cells)} cells, but the header has {len(header)}; quote its text")
                else:
                    cells += [None] * (len(header) - len(cells))  # type: ignore[list-item]
                    yield number, dict(zip(header, cells, strict=True))


def _delimiter(header: str) -> str:
    """A comma, or what spreadsheets write instead where the comma is the decimal sign."""
    return next((sign for sign in ",;\t" if sign in header), ",")


def _parquet_rows(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = 0
    with path.open("rb") as file:
        try:
            table = pq.ParquetFile(file)
            columns = [column] if column in table.schema_arrow.names else None
            for batch in table.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                fields = list(batch.schema)
                for row in batch.to_pylist():
                    number += 1
                    yield number, {field.name: _from_json(row[field.name], field.type) for field in fields}
        except (ValueError, pa.ArrowException) as error:
            raise UserError(f"{shown(path)} is no parquet file: {why(error)}") from error


def _from_json(value: Any, kind: pa.DataType) -> Any:
    """A value of Arrow, with what `datasets` stores as JSON text parsed: values whose fields differ from row to row."""
    if value is None:
        return None
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json":
        return json.loads(value)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_from_json(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _from_json(value[field.name], field.type) for field in kind}
    return value

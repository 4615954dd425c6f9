"""Files of rows: the same rows from every kind of file, one at a time, and what is wrong with a bad one."""

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.training import row_files
from fathom.training.errors import UserError
from fathom.training.row_files import BadRow, is_saved_dataset, open_saved_dataset, read_rows
from fathom.training.text_files import kind_of

ROWS = [
    {"text": "one", "more": "x"},
    {"text": 'two, with "quotes"\nand a line', "more": None},
    {"text": "drei: ü 深 \u2028", "more": ""},
]


def of_csv(rows: list[dict], delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return file.getvalue()


TEXTS = {
    "a.jsonl": "\n\n".join(json.dumps(row) for row in ROWS),
    "b.ndjson": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "list.json": json.dumps(ROWS),
    "list of lines.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.json": "\n".join(json.dumps(row) for row in ROWS) + "\n",
    "one after the other.json": " ".join(json.dumps(row, indent=1) for row in ROWS),
    "comma.csv": of_csv(ROWS),
    "semicolon.csv": of_csv(ROWS, ";"),
    "tab.tsv": of_csv(ROWS, "\t"),
}
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data[:9], "zstd", asbytes=True) + pa.compress(data[9:], "zstd", asbytes=True),
}


def same(row: dict) -> dict:
    """CSV has no null."""
    return {name: value or None for name, value in row.items()}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", TEXTS)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name, compression):
    path = tmp_path / (name + compression.upper())
    path.write_bytes(COMPRESS[compression](TEXTS[name].encode()))
    rows = [row for _, row in read_rows(path)]
    assert list(map(same, rows)) == list(map(same, ROWS))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", TEXTS)
def test_in_other_encodings(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(TEXTS[name].encode(encoding))
    assert [same(row) for _, row in read_rows(tmp_path / name)] == list(map(same, ROWS))


def test_gbk_rows(tmp_path):
    text = "深度学习是机器学习的一个分支，它用神经网络来学习数据。"
    (tmp_path / "a.csv").write_bytes(f"text\n{text}\n".encode("gbk"))
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode("gbk"))
    for name in ("a.csv", "a.jsonl"):
        assert list(read_rows(tmp_path / name)) == [(1, {"text": text})]


def test_parquet_and_what_datasets_saved(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "a.parquet"))
    assert list(read_rows(tmp_path / "a.parquet")) == list(enumerate(ROWS, 1))
    assert list(read_rows(tmp_path / "a.parquet", column="text")) == [
        (n, {"text": row["text"]}) for n, row in enumerate(ROWS, 1)
    ]
    data.save_to_disk(tmp_path / "one")
    DatasetDict(train=data).save_to_disk(tmp_path / "several")
    assert is_saved_dataset(tmp_path / "one")
    assert is_saved_dataset(tmp_path / "several")
    assert not is_saved_dataset(tmp_path)
    assert open_saved_dataset(tmp_path / "one")[:] == data[:]
    assert open_saved_dataset(tmp_path / "several")["train"][:] == data[:]
    for file in tmp_path.glob("one/*.arrow"):
        file.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be opened"):
        open_saved_dataset(tmp_path / "one")
    (tmp_path / "several" / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened"):
        open_saved_dataset(tmp_path / "several")


def test_json_that_arrow_holds_as_text(tmp_path):
    """`datasets` stores objects of different forms so."""
    import pyarrow.parquet as pq

    rows = [{"a": 1}, {"a": "x", "b": [1, None]}]
    kind = pa.json_(pa.string())
    texts = pa.array(list(map(json.dumps, rows)), pa.string())
    column = pa.ExtensionArray.from_storage(kind, texts)
    nested = pa.ListArray.from_arrays([0, 1, 2], column)
    pq.write_table(pa.table({"value": column, "list": nested}), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(tmp_path / "a.parquet")] == [{"value": row, "list": [row]} for row in rows]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.dictionaries(st.text(max_size=4), json_values, max_size=3), max_size=6),
    st.sampled_from(["list", "indented", "values"]),
    st.integers(1, 9),
)
def test_json_is_parsed_in_chunks_as_in_one(tmp_path_factory, rows, form, chunk):
    text = {
        "list": json.dumps(rows),
        "indented": json.dumps(rows, indent=3, ensure_ascii=False),
        "values": "\n ".join(json.dumps(row, indent=1) for row in rows),
    }[form]
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    before = row_files._CHUNK
    row_files._CHUNK = chunk
    try:
        assert [row for _, row in read_rows(path, encoding="utf-8")] == rows
    finally:
        row_files._CHUNK = before


@pytest.mark.parametrize(
    ("name", "data", "bad", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": 2}', 2, "is no JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n{"a": 2}', 2, "is a list"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n{"a": 2}', 2, "is no UTF-8"),
        ("a.jsonl", b'{"a": 1}\n\0\n{"a": 2}', 2, "NUL"),
        ("a.jsonl", b'{"a": 1}\n{"a": ' + b"[" * 100_000 + b'}\n{"a": 2}', 2, "nested too deep"),
        ("a.json", b'[{"a": 1}, 3, {"a": 2}]', 2, "is a int"),
        ("a.json", b'{"a": 1}\n{"a": \n{"a": 2}\n', 2, "is no JSON"),
        ("a.json", b'{"a": 1}\nnonsense\n{\n"a": 2}\n', 2, "is no JSON"),
        ("a.json", b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"a": 2}\n', 2, "nested too deep"),
        ("a.csv", b"a,b\n1,2\n3,4,5\n6,7\n", 2, "has 3 cells, but the header has 2"),
        ("a.csv", b'a,b\n1,2\n"3"x,4\n6,7\n', 2, "expected after"),
    ],
)
def test_a_bad_row_does_not_end_the_file(tmp_path, name, data, bad, message):
    (tmp_path / name).write_bytes(data)
    rows = dict(read_rows(tmp_path / name))
    assert [number for number, row in rows.items() if isinstance(row, BadRow)] == [bad]
    assert message in rows[bad].problem
    assert sorted(rows) == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.json", b'[{"a": 1}, {"a" 2}, {"a": 3}]', "row 2 is no JSON"),
        ("a.json", b'[{"a": 1}, {"a": 2}', "row 3 is no JSON"),
        ("a.json", b'{"a": 1', "row 1 is no JSON"),
        ("a.json", b"[" * 100_000, "nested too deep"),
        ("a.json", b'{"a":' * 100_000, "nested too deep"),
        ("a.json", b"\xff\xff\xff", "no encoding that can be told for sure"),
        ("a.csv", b"a\n\xff\xff\xff", "no encoding that can be told for sure"),
        ("a.csv", b'a,b\n1,"never closed\n2,3\n', "unexpected end of data"),
        ("a.parquet", b"PAR1", "is no parquet file"),
        ("a.jsonl.gz", b"no gzip", "Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9000)[:-20], "cannot read"),
        ("a.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 9000)[:-20], "cannot read"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 9000)[:-20], "cannot read"),
        ("a.jsonl.zst", pa.compress(b'{"a": 1}\n' * 9000, "zstd", asbytes=True)[:-4], "cannot read"),
        ("a.csv.zst", b"no zstd", "cannot read"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    try:
        bad = [row.problem for _, row in read_rows(tmp_path / name) if isinstance(row, BadRow)]
    except UserError as error:
        bad = [str(error)]
        assert str(tmp_path / name) in bad[0]
        assert "\n" not in bad[0]
    assert message in bad[0]


def test_a_line_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_ROW", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"a": "x" * (1 << 20)}))
    with pytest.raises(UserError, match="line 1 is longer than 1 MiB; cut it in two"):
        list(read_rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("a\n" + "x" * (1 << 21))
    with pytest.raises(UserError, match="field limit"):
        list(read_rows(tmp_path / "a.csv"))
    (tmp_path / "a.json").write_text(json.dumps([{"a": "x" * (1 << 22)}]))
    with pytest.raises(UserError, match="row 1 is too long"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.JSONL.gz", ".jsonl"), ("a.b.txt", ".txt"), ("wiki.zst", ".txt"), ("a.tar.gz", ".tar"), ("Makefile", "")],
)
def test_kinds(name, kind):
    assert kind_of(Path(name)) == kind

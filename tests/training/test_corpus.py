"""The corpus: nothing lost, nothing twice, a split that stays, and an error for everything that is no text."""

import gzip
import json
import lzma
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset

from fathom.training import corpus, sources, text_files
from fathom.training.corpus import HELDOUT_FRACTION, build_corpus, heldout, load_corpus
from fathom.training.errors import UserError
from fathom.training.sources import stdlib_files


def write_documents(folder: Path, count: int, prefix: str = "") -> dict[str, str]:
    """Writes `count` different .txt files and returns text by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {f"{prefix}{at}.txt": f"{prefix} document {at}\n" * (1 + at % 7) for at in range(count)}
    for name, text in documents.items():
        (folder / name).write_text(text, encoding="utf-8")
    return documents


def test_every_document_is_in_exactly_one_split(tmp_path):
    documents = write_documents(tmp_path / "docs", 200)
    report = build_corpus([str(tmp_path / "docs")], tmp_path / "out", heldout_fraction=0.2)
    splits = load_corpus(tmp_path / "out")

    assert sorted(splits["train"]["text"][:] + splits["heldout"]["text"][:]) == sorted(documents.values())
    assert (report.train_documents, report.heldout_documents) == (len(splits["train"]), len(splits["heldout"]))
    assert 20 <= report.heldout_documents <= 60
    assert report.bytes == sum(len(text.encode()) for text in documents.values())
    assert report.heldout_bytes == sum(len(text.encode()) for text in splits["heldout"]["text"])
    names = splits["train"]["name"][:] + splits["heldout"]["name"][:]
    assert sorted(names) == sorted(f"docs/{name}" for name in documents)


def test_reads_every_format_without_changing_text(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (folder / "marked.md").write_bytes(b"\xef\xbb\xbf# with a byte order mark\n")
    (folder / "deep" / "code.PY").write_text("print('café 深')\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text(
        '{"text": "row one"}\n\n{"text": "row\\u2028two"}\n{"text": null}\n{"text": "half \\ud800"}\n', encoding="utf-8"
    )
    Dataset.from_dict({"text": ["table one", "  "], "other": [1, 2]}).to_parquet(str(folder / "table.parquet"))
    (folder / "image.txt").write_bytes(b"\x89PNG\r\n\xff\xfe")
    (folder / "nul.txt").write_bytes(b"looks like text\0but is not")
    (folder / "empty.py").write_bytes(b"")
    (folder / "numbers.csv").write_text("a,b\n1,2\n")
    (folder / "settings.json").write_text('{"indent": 2}')
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "secret.txt").write_text("secret\n")
    (folder / "again.txt").write_bytes(b"one\r\ntwo\r\n")

    report = build_corpus([str(folder)], tmp_path / "out")
    splits = load_corpus(tmp_path / "out")
    found = dict(zip(splits["train"]["name"], splits["train"]["text"], strict=True))
    found.update(zip(splits["heldout"]["name"], splits["heldout"]["text"], strict=True))
    # Few documents: the split may have cut one in two, which loses nothing either.
    for name in [name for name in found if name.endswith(" (end)")]:
        found[name.removesuffix(" (end)")] += found.pop(name)

    assert found == {
        "mixed/again.txt": "one\r\ntwo\r\n",
        "mixed/marked.md": "# with a byte order mark\n",
        "mixed/deep/code.PY": "print('café 深')\n",
        "mixed/rows.jsonl:1": "row one",
        "mixed/rows.jsonl:3": "row\u2028two",
        "mixed/table.parquet:1": "table one",
    }
    assert report.duplicates == 1  # windows.txt
    assert report.skipped == 6  # null, lone surrogate, blank row, two binary files, empty file
    assert report.files == 9
    assert [line.split()[0] for line in report.unread] == ["mixed/numbers.csv", "mixed/settings.json:1"]


KINDS = {
    "a.csv": b"text,n\nfrom csv,1\n",
    "a.tsv": b"n\ttext\n1\tfrom tsv\n",
    "a.json": b'[{"text": "from json"}]',
    "a.jsonl.gz": gzip.compress(b'{"text": "from jsonl.gz"}\n'),
    "a.txt.gz": gzip.compress(b"from txt.gz"),
    "b.txt.zst": pa.compress(b"from txt.zst", "zstd", asbytes=True),
    "c.zst": pa.compress(b"from zst", "zstd", asbytes=True),
    "a.md.xz": lzma.compress(b"from md.xz"),
    "gbk.txt": "深度学习是机器学习的一个分支。".encode("gbk"),
    "latin-1.txt": "Où êtes-vous né ?".encode("latin-1"),
    "utf-16.txt": "UTF-16 深".encode("utf-16"),
}
EXPECTED = {
    *(f"from {name}" for name in ("csv", "tsv", "json", "jsonl.gz", "txt.gz", "txt.zst", "zst", "md.xz")),
    *("深度学习是机器学习的一个分支。", "Où êtes-vous né ?", "UTF-16 深"),
}


def test_further_kinds_and_encodings(tmp_path):
    write_documents(tmp_path / "docs", 30)
    for name, data in KINDS.items():
        (tmp_path / "docs" / name).write_bytes(data)
    (tmp_path / "docs" / "polish.txt").write_bytes("Zażółć gęślą jaźń".encode("cp1250"))
    (tmp_path / "docs" / "cyrillic.csv").write_bytes("text\nСъешь же ещё этих\n".encode("cp1251"))
    report = build_corpus([str(tmp_path / "docs")], tmp_path / "out")
    found = {text for split in load_corpus(tmp_path / "out").values() for text in split["text"]}
    assert {text for text in found if "document" not in text} == EXPECTED
    assert report.encodings == {"gb18030": 1, "cp1252": 1, "utf-16": 1}
    assert report.undecoded == ["docs/cyrillic.csv", "docs/polish.txt"]
    with pytest.raises(UserError, match=r"polish\.txt; save text as UTF-8"):
        build_corpus([str(tmp_path / "docs" / "polish.txt")], tmp_path / "other")


@pytest.mark.parametrize("name", [name for name in KINDS if name.endswith((".gz", ".zst", ".xz"))])
def test_a_file_that_ends_too_early_is_named(tmp_path, name):
    write_documents(tmp_path, 3)
    (tmp_path / name).write_bytes(KINDS[name][:-9])
    with pytest.raises(UserError, match=rf"cannot read \S*{re.escape(name)}: "):
        build_corpus([str(tmp_path)], tmp_path / "out")


LETTERS = "".join(random.Random(0).choices("ACGT", k=50_000))


@pytest.mark.parametrize("text", [LETTERS, "word " * 3000, "深" * 4000, "title\n" + LETTERS], ids=str.__len__)
def test_one_document_without_newlines_is_cut_within_its_line(tmp_path, text):
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    build_corpus([str(tmp_path / "one.txt")], tmp_path / "out")
    splits = load_corpus(tmp_path / "out")
    (train,), heldout = splits["train"]["text"][:], splits["heldout"]["text"][0]
    assert train + heldout == text
    assert 0.03 < len(heldout) / len(text) < 0.08


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "json", "parquet", "txt.gz"])
def test_long_documents_come_in_parts(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 1000)
    monkeypatch.setattr(text_files, "LONGEST_DOCUMENT", 1000)
    text = " ".join(random.Random(0).choices(("some", "words", "of", "a", "text"), k=9000))
    path = tmp_path / f"long.{kind}"
    if kind.startswith("txt"):
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    elif kind == "parquet":
        Dataset.from_dict({"text": [text]}).to_parquet(str(path))
    else:
        path.write_text(
            {"csv": f"text\n{text}\n", "jsonl": json.dumps({"text": text}), "json": json.dumps([{"text": text}])}[kind]
        )
    build_corpus([str(path)], tmp_path / "out")
    rows = [(row["name"], row["text"]) for split in load_corpus(tmp_path / "out").values() for row in split]
    name = f"long.{kind}" if kind.startswith("txt") else f"long.{kind}:1"
    parts = sorted(rows, key=lambda row: int(row[0].rpartition(" ")[2].rstrip(")")))
    assert parts[0][0] == f"{name} (part 1)"
    assert "".join(part for _, part in parts) == text
    assert max(len(part) for _, part in parts) <= 1000
    assert all(part.startswith(" ") for _, part in parts[1:])


def test_a_long_line_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    for module in (corpus, text_files):
        monkeypatch.setattr(module, "LONGEST_DOCUMENT", 1 << 16)
    monkeypatch.setattr(corpus, "_BYTES_AT_ONCE", 1 << 18)
    # xz -9 alone takes 674 MB, for any text.
    monkeypatch.setattr(corpus, "_compressed", lambda texts: (sum(len(text.encode()) for text in texts), 1.0, 1.0))
    size = 16 << 20
    with (tmp_path / "line.txt").open("w") as file:
        for n in range(size >> 10):
            file.write(f"{n:1023d} ")
    # What is imported while the first corpus is built counts for that.
    write_documents(tmp_path / "small", 30)
    build_corpus([str(tmp_path / "small")], tmp_path / "out")
    tracemalloc.start()
    try:
        report = build_corpus([str(tmp_path / "line.txt")], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.bytes == size
    assert peak < size / 2


@pytest.mark.parametrize("out", ["/proc/corpus", "/proc/self/corpus", "/dev/null/corpus", "x" * 300, "file/corpus"])
def test_places_that_cannot_be_written(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    write_documents(tmp_path / "docs", 30)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="cannot save to") as error:
        build_corpus(["docs"], Path(out))
    assert "\n" not in str(error.value)


def test_compression_is_that_of_the_held_out_text(tmp_path):
    write_documents(tmp_path / "docs", 300)
    report = build_corpus([str(tmp_path / "docs")], tmp_path / "out")
    text = "".join(load_corpus(tmp_path / "out")["heldout"]["text"]).encode()
    assert report.gzip_bits_per_byte == 8 * len(gzip.compress(text, 9)) / len(text)
    assert report.xz_bits_per_byte == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["xz_bits_per_byte"] == report.xz_bits_per_byte


def test_split_depends_on_content_alone(tmp_path):
    old = write_documents(tmp_path / "a" / "docs", 100)
    build_corpus([str(tmp_path / "a")], tmp_path / "first", heldout_fraction=0.2)
    first = set(load_corpus(tmp_path / "first")["heldout"]["text"])

    for at, text in enumerate(old.values()):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / f"renamed-{at}.md").write_text(text, encoding="utf-8")
    write_documents(tmp_path / "b", 100, prefix="new")
    build_corpus([str(tmp_path / "b" / "**" / "*")], tmp_path / "second", heldout_fraction=0.2)
    second = set(load_corpus(tmp_path / "second")["heldout"]["text"])
    assert second & set(old.values()) == first
    assert second - first


@pytest.mark.parametrize("count", [1, 2])
def test_few_documents_are_cut_at_a_lines_end(tmp_path, count):
    lines = [f"line {at}\n" for at in range(200)]
    (tmp_path / "book.txt").write_text("".join(lines))
    sources = [str(tmp_path / "book.txt")]
    if count == 2:
        (tmp_path / "note.txt").write_text("short note\n")
        sources.append(str(tmp_path / "note.txt"))
    report = build_corpus(sources, tmp_path / "out")
    splits = load_corpus(tmp_path / "out")
    tail = splits["heldout"]["text"][0]
    assert splits["train"]["text"][-1] + tail == "".join(lines)
    assert tail in {"".join(lines[at:]) for at in range(len(lines))}
    assert 0.03 < len(tail) / len("".join(lines)) < 0.08
    assert report.train_documents == count


def test_few_documents_of_one_line(tmp_path):
    rows = ["short", "x" * 1000, "of middling size", "y" * 1001]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
    report = build_corpus([str(tmp_path / "rows.jsonl")], tmp_path / "out")
    splits = load_corpus(tmp_path / "out")
    assert splits["heldout"]["text"][:] == ["of middling size"]
    assert sorted(splits["train"]["text"]) == sorted(set(rows) - {"of middling size"})
    assert "too few" in report.split


def test_max_bytes_stops_early(tmp_path):
    write_documents(tmp_path / "docs", 200)
    report = build_corpus([str(tmp_path / "docs")], tmp_path / "out", max_bytes=2000)
    assert 2000 <= report.bytes < 2200


def test_corpus_below_its_source_is_not_read_again(tmp_path):
    write_documents(tmp_path, 60)
    first = build_corpus([str(tmp_path)], tmp_path / "runs" / "corpus")
    write_documents(tmp_path, 1, prefix="more")
    second = build_corpus([str(tmp_path)], tmp_path / "runs" / "corpus")
    assert second.bytes == first.bytes + len(b"more document 0\n")
    assert second.duplicates == 0
    assert len(load_corpus(tmp_path / "runs" / "corpus")["train"]) == second.train_documents


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.pdf", b"%PDF", ".pdf"),
        ("b.txt", b"\xff\xfe\x00", "all 1 documents of 1 files are binary or empty"),
        ("c.txt", b" \n", "binary or empty"),
        ("d.txt", b"one line only", "is the only document"),
        ("e.jsonl", b'{"text": "a"}\n{"text": \n', "line 2"),
        ("f.jsonl", b"[1]\n", "line 1 is a list"),
        ("g.jsonl", b'{"content": "a"}\n', "only 'content'"),
        ("h.jsonl", b'{"text": 3}\n', "is a int"),
        ("i.parquet", b"PAR1 not", "i.parquet"),
    ],
)
def test_bad_file_leaves_no_trace(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        build_corpus([str(tmp_path / name)], tmp_path / "runs" / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("source", ["nowhere", "some/file.txt", "some/*.txt", "{folder}"])
def test_source_without_text(tmp_path, source):
    source = source.format(folder=tmp_path)
    with pytest.raises(UserError) as error:
        build_corpus([source], tmp_path / "out")
    assert source in str(error.value)


def test_failed_build_keeps_the_older_corpus(tmp_path):
    write_documents(tmp_path / "docs", 60)
    build_corpus([str(tmp_path / "docs")], tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    (tmp_path / "docs" / "zz.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match="line 1"):
        build_corpus([str(tmp_path / "docs")], tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("options", [{"heldout_fraction": 0.0}, {"heldout_fraction": 0.6}, {"max_bytes": 0}])
def test_options_out_of_range(tmp_path, options):
    with pytest.raises(UserError, match=next(iter(options))):
        build_corpus(["stdlib"], tmp_path / "out", **options)


def test_broken_corpus_is_named(tmp_path):
    with pytest.raises(UserError, match="fathom corpus --out"):
        load_corpus(tmp_path)
    write_documents(tmp_path / "docs", 100)
    write_documents(tmp_path / "more", 100, prefix="more")
    build_corpus([str(tmp_path / "docs")], tmp_path / "one")
    build_corpus([str(tmp_path / "docs"), str(tmp_path / "more")], tmp_path / "two")
    load_corpus(tmp_path / "one")

    one, two = tmp_path / "one" / "train.parquet", tmp_path / "two" / "train.parquet"
    original = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with pytest.raises(UserError, match="is broken"):
        load_corpus(tmp_path / "one")
    one.write_bytes(original[:-100])
    with pytest.raises(UserError, match="is broken"):
        load_corpus(tmp_path / "one")


def test_datasets_name(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return Dataset.from_dict({"body": [f"story {at}\n" for at in range(100)]}).to_iterable_dataset()

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    report = build_corpus(["owner/stories:small"], tmp_path / "out", text_column="body")
    assert calls == [(("owner/stories", "small"), {"split": "train", "streaming": True})]
    assert report.train_documents + report.heldout_documents == 100
    with pytest.raises(UserError, match=r"owner/stories:1 has no 'text', only 'body'"):
        build_corpus(["owner/stories"], tmp_path / "out")


def test_datasets_error_is_one_line(tmp_path, monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach the Hub\nwith a long story")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/stories is no file or folder here, .*: Couldn't reach the Hub$"):
        build_corpus(["owner/stories"], tmp_path / "out")


def test_heldout_share_and_nesting():
    keys = [f"key {at}" for at in range(20_000)]
    small = {key for key in keys if heldout(key, 0.05)}
    large = {key for key in keys if heldout(key, 0.2)}
    assert 0.045 < len(small) / len(keys) < 0.055
    assert 0.19 < len(large) / len(keys) < 0.21
    assert small < large


def test_standard_library_split():
    files = stdlib_files()
    names = {file.name for file in files}
    assert {"stdlib/textwrap.py", "stdlib/asyncio/__init__.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    # Private twins go where their public face goes, or one would read held-out docstrings in the other.
    modules = {file.name: file.module for file in files}
    assert modules["stdlib/_pydecimal.py"] == modules["stdlib/decimal.py"] == "decimal"
    assert modules["stdlib/_pyio.py"] == modules["stdlib/io.py"] == "io"

    # Pinned: a new salt would make all published figures incomparable.
    held = {file.module for file in files if heldout(str(file.module), HELDOUT_FRACTION)}
    assert {"pathlib", "tarfile", "mailbox", "typing", "urllib", "random", "enum"} <= held
    assert held.isdisjoint({"textwrap", "json", "encodings", "os", "re"})
    size = {file.name: file.path.stat().st_size for file in files}
    share = sum(size[file.name] for file in files if file.module in held) / sum(size.values())
    assert 0.04 < share < 0.10


def test_standard_library_never_holds_out_less(tmp_path):
    build_corpus(["stdlib"], tmp_path / "out", heldout_fraction=0.001)
    held = set(load_corpus(tmp_path / "out")["heldout"]["name"])
    assert {"stdlib/tarfile.py", "stdlib/typing.py", "stdlib/urllib/parse.py"} <= held

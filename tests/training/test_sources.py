"""What sources name: every readable file below a folder, nothing outside it, and a line about what is left."""

import os
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from fathom.training import sources
from fathom.training.corpus import build_corpus, load_corpus
from fathom.training.errors import UserError
from fathom.training.sources import is_dataset_name, resolve


def names(found) -> list[str]:
    return [file.name for file in found.files]


def write(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"text of {path}\n")
    return folder


def test_a_folder_in_the_order_of_its_paths(tmp_path):
    write(tmp_path / "docs", "b.txt", "a.md", "a/z.py", "a.b/c.txt.gz", "x.pdf", ".git/a.txt", ".a.txt", "c/tar.tar.gz")
    found = resolve([str(tmp_path / "docs")], tmp_path / "out")
    # As pathlib sorts: by the parts.
    assert names(found) == ["docs/a/z.py", "docs/a.b/c.txt.gz", "docs/a.md", "docs/b.txt"]
    assert (found.links, found.unreadable) == (0, [])


def test_links_that_lead_out_are_counted_and_not_followed(tmp_path):
    write(tmp_path / "outside", "secret.txt", "deep/more.txt")
    docs = write(tmp_path / "docs", "a.txt", "sub/b.txt")
    (docs / "file.txt").symlink_to(tmp_path / "outside" / "secret.txt")
    (docs / "folder").symlink_to(tmp_path / "outside")
    (docs / "relative.txt").symlink_to("../outside/secret.txt")
    (docs / "chain.txt").symlink_to("file.txt")
    (docs / "inside.txt").symlink_to("sub/b.txt")
    (docs / "circle").symlink_to(docs)
    (docs / "broken.txt").symlink_to("nowhere.txt")
    (docs / "other.pdf").symlink_to(tmp_path / "outside" / "secret.txt")
    found = resolve([str(docs)], tmp_path / "out")
    assert names(found) == ["docs/a.txt", "docs/inside.txt", "docs/sub/b.txt"]
    assert found.links == 4  # file, folder, relative, chain
    for pattern in ("*.txt", "**/*.txt"):
        found = resolve([str(docs / pattern)], tmp_path / "out")
        assert not [name for name in names(found) if "secret" in name or "more" in name]
        assert {"a.txt", "inside.txt"} <= set(names(found))
        assert found.links >= 3
    # Who names a link means it.
    assert names(resolve([str(docs / "file.txt")], tmp_path / "out")) == ["file.txt"]
    assert len(resolve([str(docs / "folder")], tmp_path / "out").files) == 2


def test_a_folder_of_links_alone_says_so(tmp_path):
    write(tmp_path / "outside", "a.txt")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").symlink_to(tmp_path / "outside" / "a.txt")
    with pytest.raises(UserError, match="1 links that lead out of it were not followed: name what they lead to"):
        resolve([str(tmp_path / "docs")], tmp_path / "out")


def test_unreadable_folders_are_named(tmp_path, monkeypatch):
    write(tmp_path / "docs", "a.txt", "closed/b.txt", "closed too/c.txt")
    scandir = os.scandir

    def closed(folder):
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(sources.os, "scandir", closed)
    found = resolve([str(tmp_path / "docs")], tmp_path / "out")
    assert names(found) == ["docs/a.txt"]
    assert sorted(found.unreadable) == ["docs/closed too: Permission denied", "docs/closed: Permission denied"]
    with pytest.raises(UserError, match=r"cannot read the folder .*closed: Permission denied"):
        resolve([str(tmp_path / "docs" / "closed")], tmp_path / "out")


@pytest.mark.parametrize(("name", "levels"), [("d", 900), ("a longer name", 400)])
def test_folders_of_any_depth(tmp_path, name, levels):
    write(tmp_path / "docs", *(f"{n}.txt" for n in range(30)))
    here = os.open(tmp_path / "docs", os.O_RDONLY)
    for level in range(levels):  # one by one, for the whole path is too long for the system
        os.mkdir(name, dir_fd=here)
        inner = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
        if level == 99:
            with open(os.open("deep.txt", os.O_WRONLY | os.O_CREAT, dir_fd=here), "w") as file:
                file.write("a deep text\n")
    os.close(here)
    try:
        found = resolve([str(tmp_path / "docs")], tmp_path / "out")
        assert len(found.files) == 31
        # What the system itself refuses is named.
        too_long = len(str(tmp_path)) + levels * (len(name) + 1) > 4096
        assert bool(found.unreadable) == too_long
        assert all("File name too long" in line and len(line) < 300 for line in found.unreadable)
        report = build_corpus([str(tmp_path / "docs")], tmp_path / "out")
        assert report.train_documents + report.heldout_documents == 31
    finally:
        remove_deep(tmp_path / "docs")


def remove_deep(root: Path) -> None:
    """Moves inner folders up: Python's own way recurses."""
    for number in range(2000):
        inner = next((path for path in root.iterdir() if path.is_dir()), None)
        if inner is None:
            return
        for entry in list(inner.iterdir()):
            entry.rename(root / f"moved-{number}-{entry.name[:1]}") if entry.is_dir() else entry.unlink()
        inner.rmdir()


NAMES = [b"caf\xe9.txt", "深.txt".encode("gbk"), b"\xff\xfe.md", "ü.txt".encode(), b"a\nb.txt", b"\x1b[31m.txt"]


def test_names_in_other_encodings(tmp_path, capsys):
    from fathom.scripts import cli

    write(tmp_path / "docs", *(f"{n}.txt" for n in range(30)))
    for name in NAMES:
        with open(os.path.join(os.fsencode(tmp_path / "docs"), name), "w") as file:
            file.write(f"text of {name!r}\n")
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"d\xe9"))
    os.rename(tmp_path / "docs", folder)
    out = str(tmp_path / "out")
    assert cli.main(["corpus", folder, "--out", out]) == 0
    capsys.readouterr()[0].encode()
    data = load_corpus(out)
    found = {name for split in data.values() for name in split["name"]}
    assert {"d\\xe9/caf\\xe9.txt", "d\\xe9/ü.txt", "d\\xe9/\\xff\\xfe.md"} <= found
    assert len(found) == 30 + len(NAMES)
    assert cli.main(["corpus", os.path.join(folder, os.fsdecode(b"caf\xe9.log")), "--out", out]) == 2
    assert "caf\\xe9.log" in capsys.readouterr().err
    odd = os.path.join(os.fsencode(tmp_path), b"out\xe9")
    assert cli.main(["corpus", folder, "--out", os.fsdecode(odd)]) == 2
    assert "out\\xe9 is not UTF-8" in capsys.readouterr().err
    assert not os.path.exists(odd)


def test_saved_datasets(tmp_path):
    rows = Dataset.from_dict({"text": [f"row {n}\n" for n in range(20)], "n": range(20)})
    rows.save_to_disk(tmp_path / "all" / "one")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "all" / "several")
    write(tmp_path / "all", "a.txt")
    for source, count in (("all/one", 20), ("all/several", 20), ("all", 21)):
        report = build_corpus([str(tmp_path / source)], tmp_path / "out")
        assert report.train_documents + report.heldout_documents == count
    assert report.duplicates == 20
    DatasetDict(test=rows).save_to_disk(tmp_path / "test only")
    with pytest.raises(UserError, match="no split train, only test"):
        resolve([str(tmp_path / "test only")], tmp_path / "out")
    with pytest.raises(UserError, match="has no 'body', only 'text', 'n'"):
        build_corpus([str(tmp_path / "all" / "one")], tmp_path / "out", text_column="body")


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "a.log", "/dev/null", "no/where.jsonl.gz"])
def test_sources_that_are_none(tmp_path, monkeypatch, source):
    monkeypatch.chdir(write(tmp_path, "a.log"))
    with pytest.raises(UserError) as error:
        resolve([source], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("source", "expected"),
    [("owner/name", True), ("owner/name:config", True), ("a/b.jsonl", False), ("a/b.csv.zst", False), ("a", False)],
)
def test_names_of_datasets(source, expected):
    assert is_dataset_name(source) == expected

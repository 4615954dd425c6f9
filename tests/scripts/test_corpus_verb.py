"""`fathom corpus` from its command line."""

import json
import shlex

import pytest

from fathom.scripts import cli
from fathom.training.corpus import load_corpus


@pytest.fixture
def docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for at in range(100):
        (tmp_path / "docs" / f"{at}.txt").write_text(f"document number {at}\n" * 20)
    (tmp_path / "docs" / "copy.txt").write_text("document number 3\n" * 20)
    (tmp_path / "docs" / "binary.txt").write_bytes(b"\xff\x00")
    return tmp_path / "docs"


def test_prints_what_it_wrote_and_the_next_command(docs, capsys):
    assert cli.main(["corpus", "docs", "--out", "runs/mine", "--heldout_fraction", "0.2"]) == 0
    output = capsys.readouterr().out
    report = json.loads((docs.parent / "runs" / "mine" / "corpus.json").read_text())
    splits = load_corpus("runs/mine")

    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if line.strip())
    size = sum(len(text) for split in splits.values() for text in split["text"])
    assert lines["sources"] == f"docs: 102 files, {size:,} bytes of text"
    assert lines["train"].startswith(f"{len(splits['train'])} documents")
    assert lines["held"].startswith(f"out    {len(splits['heldout'])} documents")
    assert lines["left"] == "out    1 duplicates, 1 binary or empty"
    assert lines["gzip"].startswith(f"-9     {report['gzip_bits_per_byte']:.3f} bits per byte")
    assert lines["xz"].startswith(f"-9e      {report['xz_bits_per_byte']:.3f} bits per byte")
    command = shlex.split(output.splitlines()[-1].removeprefix("next: "))
    assert command == ["fathom", "tokenizer", "--corpus", "runs/mine", "--out", "runs/tokenizer"]


def test_several_sources_and_a_config_file(docs, capsys):
    (docs.parent / "more.jsonl").write_text('{"story": "once\\nupon a time"}\n')
    (docs.parent / "run.yaml").write_text("sources: [docs, more.jsonl]\ntext_column: story\nout: runs/yaml\n")
    assert cli.main(["corpus", "--config", "run.yaml"]) == 0
    assert json.loads((docs.parent / "runs" / "yaml" / "corpus.json").read_text())["sources"] == ["docs", "more.jsonl"]
    assert cli.main(["corpus", "docs", "more.jsonl", "--text_column", "story"]) == 0
    names = [name for split in load_corpus("runs/corpus").values() for name in split["name"]]
    assert "more.jsonl:1" in names
    assert len(names) == 101


def test_says_what_it_left_out_and_how_it_read(docs, capsys):
    (docs / "latin.txt").write_bytes("Où êtes-vous né ?".encode("latin-1"))
    (docs / "cyrillic.txt").write_bytes("Съешь же ещё этих".encode("cp1251"))
    (docs / "settings.json").write_text('{"indent": 2}')
    (docs / "link.txt").symlink_to("/etc/hostname")
    assert cli.main(["corpus", "docs"]) == 0
    output = capsys.readouterr().out
    assert "1 files decoded from cp1252" in output
    assert "in no encoding that is sure (save text as UTF-8): docs/binary.txt; docs/cyrillic.txt" in output
    assert "not read: docs/settings.json:1 has no 'text', only 'indent'" in output
    assert "1 links that lead out of their folder" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere"),
        (["docs", "--heldout_fraction", "2"], "heldout_fraction is 2.0"),
        (["docs", "--max_bytes", "many"], "max_bytes"),
        (["docs", "--fraction", "0.1"], "unknown option --fraction"),
        (["docs/binary.txt"], "binary or empty"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(docs, capsys, argv, message):
    assert cli.main(["corpus", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fathom corpus: error: ")
    assert message in error
    assert not (docs.parent / "runs" / "corpus").exists()

"""Evaluations within a run measure all documents, and compressors stand beside them on the very same text."""

import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_corpus_and_tokenizer, pretrain_words

from fathom.scripts import cli
from fathom.tokenizer import token_byte_lengths
from fathom.tokenizer.bpe import token_texts
from fathom.training.checkpoints import load_tokenizer
from fathom.training.corpus import load_corpus
from fathom.training.heldout import compressed_bits_per_byte, spread_sample, target_text
from fathom.training.packing import pack_documents


@given(st.integers(1, 500), st.integers(1, 200))
def test_a_sample_has_one_row_of_each_part(total: int, count: int):
    rows = Dataset.from_dict({"n": range(total)})
    chosen = spread_sample(rows, count)["n"]
    assert chosen == spread_sample(rows, count)["n"]
    assert len(set(chosen)) == min(count, total)
    assert sorted(chosen) == list(chosen)
    if count < total:
        assert all(total * part // count <= n < total * (part + 1) // count for part, n in enumerate(chosen))


def test_every_long_document_is_in_the_sample():
    """The first rows would be those of the first document alone."""
    rows = Dataset.from_dict({"document": [n for n in range(8) for _ in range(40)]})
    assert set(spread_sample(rows, 16)["document"]) == set(range(8))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    return folder


def test_the_text_of_tokens_is_that_of_the_tokenizer(data: Path):
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    texts = token_texts(tokenizer)
    assert [len(text) for text in texts] == token_byte_lengths(tokenizer)
    sentence = "naïve 中文 \t\n\x00 def f(x):\n    return '¡ÿ' 🌊"
    ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
    assert b"".join(texts[token] for token in ids) == sentence.encode()


def test_targets_are_the_documents_but_for_the_first_token_of_each_row(data: Path):
    tokenizer, documents = load_tokenizer(str(data / "tokenizer")), load_corpus(data / "corpus")["heldout"]
    texts = token_texts(tokenizer)
    (one,) = pack_documents(documents.select([0]), tokenizer, 4096).to_list()
    assert target_text(Dataset.from_list([one]), texts).decode() == documents[0]["text"]
    rows = pack_documents(documents, tokenizer, 16)
    lost = sum(len(texts[ids[0]]) for ids in rows["input_ids"])
    assert len(target_text(rows, texts)) == sum(len(text.encode()) for text in documents["text"]) - lost


@given(st.binary(min_size=1, max_size=3000))
def test_bits_per_byte_are_those_of_the_programs(text: bytes):
    figures = compressed_bits_per_byte(text)
    assert figures["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert figures["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_a_run_says_what_it_measures_and_compares_with_the_same(data: Path, capsys):
    out, rows = data / "run", 5
    assert cli.main(["pretrain", *pretrain_words(data, out, "--eval_steps", "4", "--eval_rows", str(rows))]) == 0
    output = capsys.readouterr().out
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    heldout = pack_documents(load_corpus(data / "corpus")["heldout"], tokenizer, 32)
    sample = spread_sample(heldout, rows)
    of_sample = compressed_bits_per_byte(target_text(sample, token_texts(tokenizer)))
    report = json.loads((data / "corpus" / "corpus.json").read_text())
    assert f"evaluation  {rows} held-out rows spread over all documents, at the end all {len(heldout)};" in output

    lines = re.findall(
        r"^(held-out.*?) \(([\d,]+) tokens\): ([\d.]+) bits per byte, gzip ([\d.]+), xz ([\d.]+);", output, re.M
    )
    assert [line[0] for line in lines] == ["held-out sample", "held-out"]
    for (_, tokens, _, *beside), measured, expected in zip(
        lines,
        (sample, heldout),
        (of_sample, {name: report[f"{name}_bits_per_byte"] for name in ("gzip", "xz")}),
        strict=True,
    ):
        assert int(tokens.replace(",", "")) == sum(label != -100 for row in measured["labels"] for label in row[1:])
        assert [float(value) for value in beside] == pytest.approx(list(expected.values()), abs=5e-4)


def test_where_all_rows_are_measured_there_is_no_sample(data: Path, capsys):
    assert cli.main(["pretrain", *pretrain_words(data, data / "all", "--eval_steps", "2", "--eval_rows", "0")]) == 0
    output = capsys.readouterr().out
    assert "sample (" not in output
    assert "evaluation  " not in output
    figures = re.findall(r"^held-out \([\d,]+ tokens\): ([\d.]+) bits", output, re.M)
    assert len(figures) == 3
    assert figures[-1] == figures[-2]

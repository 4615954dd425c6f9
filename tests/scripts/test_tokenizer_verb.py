"""`fathom tokenizer` from its command line."""

import json
import shlex

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from fathom.scripts import cli
from fathom.training.corpus import build_corpus, load_corpus


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for at in range(100):
        (tmp_path / "docs" / f"{at}.txt").write_text(f"the deep sea, document {at}: 深い海 {at * at} fathoms\n" * 20)
    build_corpus(["docs"], tmp_path / "runs" / "corpus")
    return tmp_path / "runs" / "corpus"


def test_writes_a_tokenizer_that_loads_alone(corpus, capsys):
    argv = ["tokenizer", "--corpus", "runs/corpus", "--vocab_size", "350", "--model_max_length", "128"]
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("runs/tokenizer", trust_remote_code=False)
    assert (len(tokenizer), tokenizer.model_max_length) == (350, 128)

    heldout = load_corpus(corpus)["heldout"]["text"]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in heldout)
    size = sum(len(text.encode()) for text in heldout)
    assert f"{size / tokens:.3f} bytes per token ({size:,} bytes, {tokens:,} tokens)" in output
    assert size / tokens > 2
    assert "350 ids" in output
    command = shlex.split(output.splitlines()[-1].removeprefix("next: "))
    assert command == shlex.split("fathom pretrain --corpus runs/corpus --tokenizer runs/tokenizer --out runs/pretrain")


def test_learns_from_the_train_split_alone(corpus):
    rows = Dataset.from_dict({"text": ["quokka quokka quokka\n" * 1000], "name": ["held out"]})
    rows.to_parquet(str(corpus / "heldout.parquet"))
    report = json.loads((corpus / "corpus.json").read_text()) | {"heldout_documents": 1}
    (corpus / "corpus.json").write_text(json.dumps(report))
    assert cli.main(["tokenizer", "--vocab_size", "330"]) == 0
    tokenizer = AutoTokenizer.from_pretrained("runs/tokenizer", trust_remote_code=False)
    assert len(tokenizer(" quokka")["input_ids"]) == len(" quokka")
    assert len(tokenizer(" fathoms")["input_ids"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--corpus", "nowhere"], "nowhere is no corpus"),
        (["--vocab_size", "100"], "it must be at least 276"),
        (["--vocab_size", "100000"], "the text fills only"),
        (["--model_max_length", "0"], "model_max_length is 0"),
        (["--vocab", "300"], "did you mean vocab_size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(corpus, capsys, argv, message):
    assert cli.main(["tokenizer", *argv]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fathom tokenizer: error: ")
    assert message in error
    assert not (corpus.parent / "tokenizer").exists()
    assert {file.name for file in corpus.parent.iterdir()} == {"corpus"}

"""Every verb that reads a model says in one line what is wrong with its folder, and exits with code 2."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from malformed import changed, make_whole, write_json
from safetensors.torch import load_file, save_file
from tiny_runs import make_corpus_and_tokenizer

from fathom.scripts import cli


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whole(tmp_path_factory.mktemp("whole"))["v3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    lines = []
    for word in ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"):
        row = {"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": word}]}
        lines.append(json.dumps(row) + "\n")
    (folder / "conversations.jsonl").write_text("".join(lines))
    return folder


def nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


SLIPS: dict[str, tuple[Callable[[Path], None], str]] = {
    "layers": (write_json("config.json", num_hidden_layers=10**12), "num_hidden_layers=1000000000000 must be"),
    "epsilon": (write_json("config.json", rms_norm_eps=-1.0), "rms_norm_eps=-1.0 must be"),
    "labels": (write_json("config.json", num_labels=10**9), "num_labels=1000000000 must be"),
    "method": (write_json("config.json", uses=5), "'uses' is no field of a config"),
    "NaN": (nan, "model.norm.weight holds numbers that are not finite"),
    "cut": (short, "is truncated"),
    "eos": (write_json("generation_config.json", eos_token_id=10**6), "eos_token_id=1000000"),
}
VERBS = {
    "generate": ["{model}", "the"],
    "chat": ["{model}"],
    "serve": ["{model}"],
    "export": ["{model}", "{out}", "--to", "transformers"],
    "push": ["{model}", "someone/model"],
    "sft": ["--model", "{model}", "--data", "{data}/conversations.jsonl", "--out", "{out}"],
    "pretrain": ["--init", "{model}", "--corpus", "{data}/corpus", "--out", "{out}", "--sequence_length", "32"],
    "bench": ["--model", "{model}", "--out", "{out}", "--quick"],
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("verb", [*VERBS, "inspect"])
def test_one_line_and_exit_code_2(verb, slip, whole, data, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    change, says = SLIPS[slip]
    with changed(whole, tmp_path / "model", change) as folder:
        names = {"model": folder, "out": tmp_path / "out", "data": data}
        words = [word.format(**names) for word in VERBS.get(verb, ["{model}"])]
        code = cli.main([verb, *words])
    captured = capsys.readouterr()
    if verb == "inspect":
        assert code in (1, 2)  # 1 where there is something to describe
        assert says in captured.out + captured.err
        assert "next: fathom chat" not in captured.out
        return
    assert code == 2
    (line,) = captured.err.splitlines()
    assert line.startswith(f"fathom {verb}: error: ")
    assert says in line
    assert not (tmp_path / "out").exists()

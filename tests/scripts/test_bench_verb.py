"""`fathom bench` from its command line, and what it writes of its figures."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fathom.scripts.cli import main
from fathom.scripts.results.curves import cost_against_context
from fathom.scripts.results.files import page, size
from fathom.training.benchmark import measuring
from fathom.training.benchmark.contenders import random_checkpoint

TINY = ["--quick", "--rounds", "2", "--steps", "2", "--contexts", "24", "40", "--prefills", "20", "--threads", "1"]
SVG = {"svg": "http://www.w3.org/2000/svg"}


@pytest.fixture(autouse=True)
def same_threads():
    """The verb sets them for its process, which here has other tests to run."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def row(model: str, context: int, kind: str = "decode", **seconds: list[float]) -> dict:
    """As measured: one step per round, and 10 tokens."""
    return {
        **asdict(measuring.Case(model, kind, "fp32", 1, context)),
        "contenders": measuring.figures(seconds, tokens=10),
    }


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--generations", "v3", "--kinds", "prefill", "decode", "--out", str(tmp_path / "out")]
    assert main(["bench", *TINY, *words]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(
        f"written to {tmp_path / 'out'}: bench.json, bench.md, decode-fp32-1.svg\nnext: fathom bench\n"
    )
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md", "decode-fp32-1.svg"}
    report = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert report["machine"]["threads"] == 1
    assert [(each["kind"], each["context"]) for each in report["rows"]] == [
        ("prefill", 20),
        ("decode", 24),
        ("decode", 40),
    ]
    last = report["rows"][-1]["contenders"]
    line = (tmp_path / "out" / "bench.md").read_text().split("| decode | fp32 | 1 | 40 |")[1].split("\n")[0]
    stock, fathom = (float(figure) for figure in re.findall(r"([\d.]+) ms", line))
    assert stock == pytest.approx(last["stock"]["median"] / 2 * 1e3, abs=0.006)
    assert fathom == pytest.approx(last["fathom"]["median"] / 2 * 1e3, abs=0.006)
    assert f"({last['stock']['median'] / last['fathom']['median']:.2f}x)" in line


def test_a_model_of_the_user(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--model", str(tiny_checkpoint), "--kinds", "generate", "--contenders", "stock", "fathom", "draft"]
    assert main(["bench", *TINY, *words, "--new_tokens", "4", "--out", str(tmp_path)]) == 0
    assert "| kind | dtype | batch | context | stock | fathom | draft | limit | cache |" in capsys.readouterr().out


def test_a_difference_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setitem(measuring.TOLERANCE, "fp32", -1.0)
    assert main(["bench", *TINY, "--generations", "v3", "--kinds", "decode", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fathom bench: v3 decode fp32, batch 1, context ")
    assert error.endswith("nothing is timed where results differ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--device", "tpu"], "--device tpu is not here; use "),
        (["--generations", "v5"], "--generations v5 is unknown"),
        (["--size", "huge"], "--size huge is unknown; known: nano, micro, small"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--model", "DRAFTLESS", "--kinds", "generate", "--contenders", "draft"], "has no MTP layers to draft with"),
    ],
)
def test_bad_input(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if "DRAFTLESS" in words:
        random_checkpoint(tmp_path, "v3", "nano", hidden_size=64, num_hidden_layers=2, vocab_size=97)
        words = [str(tmp_path) if word == "DRAFTLESS" else word for word in words]
    assert main(["bench", "--quick", *words]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_the_page_says_how_many_times_better():
    rows = [
        row("v3", 128, stock=[0.004, 0.001, 0.010], fathom=[0.002, 0.003, 0.0005]),
        row("v3", 512, "prefill", fathom=[0.5, 0.5, 0.5]),
        row("v3", 512, "memory", stock=[1.0]),
    ]
    rows[2]["contenders"] = {
        "stock": {"peak_bytes": 3e9, "saving": 1.0},
        "fathom": {"peak_bytes": 1.5e9, "saving": 2.0},
        "reference": {"peak_bytes": None, "saving": None},
    }
    rows[0]["contenders"]["fathom"] |= {"cache_bytes": 1500, "share": 0.25}
    known = ("processor", "threads", "device", "torch", "transformers", "fathom", "commit", "kernels")
    machine = dict.fromkeys(known, "x")
    plan = {"rounds": 3, "checkpoint": None, "size": "micro", "override": {"kv_lora_rank": 128, "v_head_dim": 8}}
    ceilings = {"fp32": {"flops": 174e9, "bandwidth": 40e9}}
    report = {"machine": machine, "ceilings": ceilings, "without_stock": {}, "plan": plan, "rows": rows}
    lines = page(report).splitlines()
    assert "x, x threads, x; torch x, transformers x, fathom x (x), with native functions" in lines
    assert "- models: micro, random weights, kv_lora_rank=128, v_head_dim=8" in lines
    assert "- fp32: matrix product 174 GFLOP/s, reading 40.0 GB/s" in lines
    assert "| decode | fp32 | 1 | 128 | 4.00 ms | 2.00 ms (2.00x) |  | 25.0% | 1.50 kB |" in lines
    assert "| prefill | fp32 | 1 | 512 |  | 20 /s |  |  |  |" in lines
    assert "| memory | fp32 | 1 | 512 | 3.00 GB | 1.50 GB (2.00x) | out of memory |  |  |" in lines


def test_curves_stand_where_their_figures_say():
    """Ten times the cost is one line of the grid up, four times the context half of the way from 1 to 16."""
    rows = [
        row("v3", 128, stock=[0.01], fathom=[0.001]),
        row("v3", 512, stock=[0.1], fathom=[0.001]),
        row("v3", 2048, stock=[1.0], fathom=[0.01]),
        row("v4", 128, fathom=[0.001]),
    ]
    drawn = cost_against_context(rows, "decode", "fp32", 1)
    assert drawn is not None
    picture = ElementTree.fromstring(drawn)
    curves = [each.get("d") for each in picture.findall("svg:path", SVG) if each.get("d").count("L") == 2]
    assert len(curves) == 2, "a model with one context has no curve"
    stock, fathom = ([tuple(map(float, at.split())) for at in d[1:].split("L")] for d in curves)
    (x1, y1), (x2, y2), (x3, y3) = stock
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y1 > y2
    assert [y for _, y in fathom] == pytest.approx([y1 + (y1 - y2), y1 + (y1 - y2), y1], abs=0.2)
    words = [each.text for each in picture.findall("svg:text", SVG)]
    assert {"v3", "128", "512", "2k", "1", "10", "100", "1,000"} <= set(words)
    assert "v4" not in words


def test_no_curve_without_a_second_context():
    assert cost_against_context([row("v3", 128, fathom=[0.1])], "decode", "fp32", 1) is None
    assert cost_against_context([], "decode", "fp32", 1) is None


def test_prefill_is_drawn_per_token():
    rows = [row("v3", 100, "prefill", fathom=[0.1]), row("v3", 1000, "prefill", fathom=[1.0])]
    picture = ElementTree.fromstring(cost_against_context(rows, "prefill", "fp32", 1) or "")
    (curve,) = [each.get("d") for each in picture.findall("svg:path", SVG) if each.get("stroke-width") == "3"][1:]
    first, last = (float(at.split()[1]) for at in curve[1:].split("L"))
    assert first == last


def test_sizes():
    assert [size(each) for each in (12, 1500, 2.5e6, 3e9)] == ["12 bytes", "1.50 kB", "2.50 MB", "3.00 GB"]

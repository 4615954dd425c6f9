"""`fathom ablate` from its command line, and the page that it writes."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from tiny_runs import make_corpus_and_tokenizer

from fathom.scripts import cli
from fathom.scripts.results.page import PAGES, write_results
from fathom.training.experiments import EXPERIMENTS, VARIANTS

DOCS = Path(__file__).parents[2] / "docs" / "results"


def test_runs_what_is_missing_and_nothing_twice(tmp_path, capsys):
    data, output = tmp_path / "data", tmp_path / "results"
    make_corpus_and_tokenizer(data)
    words = ["ablate", "drafting", "--seeds", "1", "--steps", "1", "--data", str(data), "--output", str(output)]
    assert cli.main(words) == 0
    assert "(was there)" not in capsys.readouterr().out
    runs = sorted(file.name for file in (output / "runs").iterdir())
    assert runs == ["base-0.json", "mtp-0.json"]
    record = json.loads((output / "runs" / "mtp-0.json").read_text(encoding="utf-8"))
    # Of paths the last part alone: the record is published with the results.
    assert record["origin"]["command"] == " ".join(["fathom", *(word.rsplit("/", 1)[-1] for word in words)])
    assert {"commit", "python", "torch", "device"} <= set(record["origin"])

    # As if it had been killed in the middle of the second run.
    (output / "runs" / "mtp-0.json").unlink()
    (output / "README.md").unlink()
    kept = (output / "runs" / "base-0.json").stat().st_mtime_ns
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("(was there)") == 1
    assert (output / "runs" / "base-0.json").stat().st_mtime_ns == kept
    again = json.loads((output / "runs" / "mtp-0.json").read_text(encoding="utf-8"))
    assert (again["figures"], again["training_loss"]) == (record["figures"], record["training_loss"])
    for file in ("README.md", "README.zh-CN.md", "drafting.svg", "drafting.zh-CN.svg"):
        assert file in {path.name for path in output.iterdir()}

    assert cli.main(["ablate", "drafting", "balance", "--seeds", "2", "--output", str(output), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "drafting    2 of  4 runs done: base, mtp",
        "balance     1 of 10 runs done: unbalanced, loss-0.001, loss-0.01, loss-0.1, base",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["blance"], "unknown experiment blance; did you mean balance?; there are balance, experts"),
        (["balance", "--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--steps", "-3"], "--steps -3 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys, tmp_path):
    assert cli.main(["ablate", *words, "--output", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fathom ablate: error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def write_runs(folder: Path, variant: str, **figures: list[float]) -> None:
    """A result per seed, with given figures."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for seed, values in enumerate(zip(*figures.values(), strict=True)):
        record = {
            "variant": variant,
            "seed": seed,
            "setup": {"steps": 200, "tokens_per_step": 1024, "corpus": "stdlib", "vocab_size": 1024},
            "origin": {"commit": "0123456789", "command": "fathom ablate", "python": "3", "torch": "2"},
            "seconds": 30.0,
            "figures": {
                **dict(zip(figures, values, strict=True)),
                "parameters_total": 1000000,
                "parameters_active": 500000,
            },
            "training_loss": [[1, 7.0]],
        }
        (folder / "runs" / f"{variant}-{seed}.json").write_text(json.dumps(record))


def test_the_page_says_what_the_runs_say(tmp_path):
    """Standard deviations 0.1, 0.1, 0.1 and 0.01; limits of the differences 0.163 and, with MLA, 0.116."""
    write_runs(tmp_path, "mha", bits_per_byte=[2.0, 2.1, 2.2], cache_bytes_per_token=[1536.0] * 3)
    write_runs(tmp_path, "gqa", bits_per_byte=[2.3, 2.4, 2.5], cache_bytes_per_token=[768.0] * 3)
    write_runs(tmp_path, "mqa", bits_per_byte=[2.3, 2.4, 2.5], cache_bytes_per_token=[384.0] * 3)
    write_runs(tmp_path, "base", bits_per_byte=[2.39, 2.4, 2.41], cache_bytes_per_token=[256.0] * 3)
    write_results(tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| MHA, 4 heads | 2.100 ± 0.200 | 1,536 | 1,000,000 / 500,000 | 3 |" in page
    assert "| MLA | 2.400 ± 0.020 | 256 | 1,000,000 / 500,000 | 3 |" in page
    heads, latent = (f"[2405.04434](https://arxiv.org/abs/2405.04434), table {table}" for table in (8, 9))
    for words in (
        f"| MHA before GQA | {heads} | **reproduces** | 2.100 ± 0.200, 2.400 ± 0.200 |",
        f"| GQA before MQA | {heads} | open | 2.400 ± 0.200, 2.400 ± 0.200 |",
        f"| MLA before MHA | {latent} | **does not reproduce** | 2.400 ± 0.020, 2.100 ± 0.200 |",
        "fathom ablate attention --seeds 3 --steps 200",
        "12 runs. ",
        "`0123456789`",
        "Not run yet: balance, experts, residual, optimizer, drafting, indexer.",
    ):
        assert words in page
    chinese = (tmp_path / "README.zh-CN.md").read_text(encoding="utf-8")
    assert f"| MLA 优于 MHA | {latent.replace('table', '表')} | **不复现** | 2.400 ± 0.020, 2.100 ± 0.200 |" in chinese
    picture = ElementTree.parse(tmp_path / "attention.svg").getroot()
    drawn = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"MHA, 4 heads", "2.100", "2.400", "1,536"} <= drawn
    dots = list(picture.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(dots) == 2 * 4 * 3
    assert not (tmp_path / "balance.svg").exists()


def test_every_experiment_can_be_drawn(tmp_path):
    for name in VARIANTS:
        wanted = {figure for experiment in EXPERIMENTS.values() for figure in experiment.figures}
        gains = {"gain_by_depth": [[[1.0, 1.0], [1.2, 1.5]]] * 2} if name in ("hc", "mhc") else {}
        write_runs(tmp_path, name, **{figure: [1.0, 2.0] for figure in wanted}, **gains)
    write_results(tmp_path)
    for name in EXPERIMENTS:
        for file in (f"{name}.svg", f"{name}.zh-CN.svg"):
            box = ElementTree.parse(tmp_path / file).getroot().get("viewBox").split()
            assert float(box[3]) > 150
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "Not run yet" not in page
    assert page.count("](") > 30


def test_the_page_in_docs_is_what_its_runs_say(tmp_path):
    """If this fails: `fathom ablate` anew, which runs only what is missing."""
    (tmp_path / "runs").symlink_to(DOCS / "runs")
    write_results(tmp_path)
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir() if path.is_file()}
    assert set(PAGES.values()) <= set(written)
    there = {path.name: path.read_text(encoding="utf-8") for path in DOCS.iterdir() if path.is_file()}
    assert there == written

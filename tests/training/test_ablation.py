"""Runs of a study: written once, repeatable, measured as said; and the arithmetic by which they are compared."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_runs import MODEL, make_corpus_and_tokenizer, model
from transformers import AutoTokenizer

from fathom import FathomConfig, FathomForCausalLM
from fathom.tokenizer.bpe import token_byte_lengths
from fathom.training import ablation
from fathom.training.ablation import Spread, Study, Variant, evenly_spaced, spread, train_and_measure, verdict
from fathom.training.corpus import load_corpus
from fathom.training.diagnostics import StreamProbe
from fathom.training.errors import UserError
from fathom.training.experiments import (
    EXPERIMENTS,
    FIGURES,
    VARIANTS,
    Finding,
    Side,
    Source,
    learn_to_select,
    without_shared_expert,
)
from fathom.training.packing import IGNORED, pack_documents
from fathom.training.unconstrained import release_connections

TINY = {**MODEL, "num_nextn_predict_layers": 0}
VARIANT = Variant(TINY)
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    folder = tmp_path_factory.mktemp("text")
    make_corpus_and_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    rows = {split: pack_documents(text, tokenizer, 32) for split, text in load_corpus(folder / "corpus").items()}
    return Study(
        train=rows["train"],
        heldout=rows["heldout"],
        token_bytes=token_byte_lengths(tokenizer),
        ids={"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        steps=3,
        corpus="60 tiny files",
        origin={"commit": "abc"},
    )


def test_a_run_is_written_once_and_then_read(study, tmp_path, monkeypatch):
    first = ablation.run("tiny", VARIANT, 0, study, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-0.json"]
    assert first["origin"]["commit"] == "abc"
    assert first["figures"]["bits_per_byte"] > 0
    assert [step for step, _ in first["training_loss"]] == [1, 2, 3]

    monkeypatch.setattr(ablation, "train_and_measure", None)  # nothing is trained
    assert ablation.run("tiny", VARIANT, 0, study, tmp_path) == json.loads(json.dumps(first))


def test_a_run_gives_the_same_figures_whatever_ran_before_it(study, tmp_path):
    torch.manual_seed(7)
    alone = ablation.run("tiny", VARIANT, 1, study, tmp_path / "alone")
    other = ablation.run("tiny", VARIANT, 0, study, tmp_path / "after")
    after = ablation.run("tiny", VARIANT, 1, study, tmp_path / "after")
    assert alone["figures"] == after["figures"]
    assert alone["training_loss"] == after["training_loss"] != other["training_loss"]


def test_nothing_is_written_of_a_run_that_fails(study, tmp_path, monkeypatch):
    def fail(trainer, heldout):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "measure", fail)
    with pytest.raises(KeyboardInterrupt):
        ablation.run("tiny", VARIANT, 0, study, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_setup_is_not_taken_for_this_one(study, tmp_path):
    ablation.run("tiny", VARIANT, 0, study, tmp_path)
    changed = Variant({**TINY, "moe_intermediate_size": 40}, learning_rate=1e-3)
    with pytest.raises(UserError, match=r"tiny-0.json was run with another config, learning_rate; choose another"):
        ablation.run("tiny", changed, 0, study, tmp_path)


def test_held_out_rows_come_from_everywhere():
    rows = Dataset.from_dict({"n": list(range(10))})
    assert evenly_spaced(rows, 4)["n"] == [0, 2, 5, 7]
    assert evenly_spaced(rows, 20)["n"] == list(range(10))


def test_a_draft_is_accepted_where_it_is_the_models_own_next_choice():
    """Position i drafts token i + 2; the model chooses it at i + 1. Two of the four drafts that have a target hit."""
    own, drafts = [[9, 1, 2, 3, 4, 5]], [[1, 2, 7, 8, 5, 9]]
    targets = torch.tensor([[3, 3, 3, 3, IGNORED, IGNORED]])

    def one_hot(ids):
        return torch.eye(10)[torch.tensor(ids)]

    base = lambda **_: SimpleNamespace(last_hidden_state=one_hot(own), final_states=None)  # noqa: E731
    base.embed_tokens = lambda ids: None
    stub = SimpleNamespace(
        eval=lambda: None,
        model=base,
        drafts=lambda *_, **__: iter([(SimpleNamespace(hidden_states=one_hot(drafts)), targets)]),
        lm_head=torch.nn.Identity(),
    )
    batch = dict.fromkeys(("input_ids", "position_ids", "labels"))
    assert ablation.draft_acceptance(stub, batch) == 0.5


def test_drafting_is_measured_on_a_model(study):
    figures, _ = train_and_measure(
        FathomForCausalLM(FathomConfig.preset("v3", **study.ids, **MODEL)), study, seed=0, steps=1
    )
    assert 0 <= figures["draft_acceptance"] <= 1


def test_the_model_without_its_shared_expert_is_one_that_never_had_it(study):
    torch.manual_seed(0)
    whole = FathomForCausalLM(FathomConfig.preset("v3", **study.ids, **TINY))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "shared_experts" in name:
                parameter.mul_(20)  # untrained it says next to nothing
    never = FathomForCausalLM(
        FathomConfig.preset("v3", **study.ids, **{**TINY, "n_shared_experts": 0, "num_experts_per_tok": 3})
    )
    never.load_state_dict({k: v for k, v in whole.state_dict().items() if "shared_experts" not in k}, strict=True)
    expected, _ = train_and_measure(never, study, seed=0, steps=0)
    before, _ = train_and_measure(whole, study, seed=0, steps=0)
    off = without_shared_expert(whole, study, seed=0)["bits_per_byte_without_shared"]
    assert off == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert abs(off - before["bits_per_byte"]) > 1e-3


def test_the_stages_of_an_indexer_are_measured(study, monkeypatch):
    monkeypatch.setitem(learn_to_select.__globals__["INDEXER"], "index_topk", 4)
    trained = FathomForCausalLM(FathomConfig.preset("v3", **study.ids, **TINY))
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    figures = learn_to_select(trained, study, seed=0)
    assert {name.rsplit("_", 1)[1] for name in figures} == {"new", "warm", "sparse"}
    assert set(EXPERIMENTS["indexer"].figures) - {"bits_per_byte"} <= set(figures)
    assert 0 < figures["indexer_random_new"] == figures["indexer_random_warm"] < 1
    assert figures["indexer_recall_new"] != figures["indexer_recall_warm"]
    # Stages are entered by copies.
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_unconstrained_connections_start_as_the_plain_network():
    plain, streams = model(num_nextn_predict_layers=0), model(num_nextn_predict_layers=0, hc_mult=4)
    release_connections(streams)
    missing = streams.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all("_hc." in name or "hc_head" in name for name in missing)
    with torch.no_grad():
        assert torch.allclose(streams.eval()(IDS).logits, plain.eval()(IDS).logits, atol=2e-5)


@torch.no_grad()
def test_nothing_bounds_an_unconstrained_gain():
    """Every sub-layer doubles every stream: the gain is 2, 4, 8, 16."""
    released = model(num_nextn_predict_layers=0, hc_mult=4).eval()
    release_connections(released)
    for layer in released.model.layers:
        for connection in (layer.attn_hc, layer.ffn_hc):
            connection.base[8:] *= 2
    with StreamProbe(released) as probe:
        released(IDS)
    assert probe.gains() == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert probe.metrics()["amax_gain_forward"] == 16


def result(**figures: float) -> dict:
    return {"figures": figures}


def test_mean_and_deviation_by_hand():
    """2.0, 2.1, 2.3: mean 6.4 / 3, squared deviations 0.0177778 + 0.0011111 + 0.0277778 over 2."""
    found = spread([result(bits=2.0), result(bits=2.1), result(bits=2.3)], "bits")
    assert found == pytest.approx((6.4 / 3, math.sqrt(0.0466667 / 2), 3), rel=1e-5)
    single = spread([result(bits=2.0), result(other=1.0)], "bits")
    assert (single.mean, single.runs, math.isnan(single.deviation)) == (2.0, 1, True)
    assert spread([result(other=1.0)], "bits") is None


@pytest.mark.parametrize(
    ("smaller", "larger", "expected"),
    [
        # The limit is 2 sqrt(0.03^2 / 3 + 0.04^2 / 3) = 2 * 0.05 / sqrt(3) = 0.0577.
        (Spread(2.000, 0.03, 3), Spread(2.058, 0.04, 3), "shown"),
        (Spread(2.000, 0.03, 3), Spread(2.057, 0.04, 3), "open"),
        (Spread(2.057, 0.03, 3), Spread(2.000, 0.04, 3), "open"),
        (Spread(2.058, 0.03, 3), Spread(2.000, 0.04, 3), "reversed"),
        (Spread(1.0, math.nan, 1), Spread(9.0, 0.1, 3), "unknown"),
        (Spread(1.5, 0.04, 4), Spread(1.6, 0.0, 1), "shown"),
    ],
)
def test_verdicts_by_hand(smaller, larger, expected):
    assert verdict(smaller, larger) == expected


def test_a_finding_takes_the_best_of_several_variants_and_waits_for_all():
    finding = Finding(("", ""), Source("", ("", "")), Side("bits", ("a", "b")), Side("bits", ("c", "d")))
    results = {
        "a": [result(bits=1.9), result(bits=2.1)],
        "b": [result(bits=1.0), result(bits=1.2)],
        "c": [result(bits=3.0), result(bits=3.2)],
    }
    assert finding.judge(results) is None
    results["d"] = [result(bits=4.0), result(bits=4.2)]
    outcome, smaller, larger = finding.judge(results)
    assert (outcome, smaller.mean, larger.mean) == ("shown", pytest.approx(1.1), pytest.approx(3.1))


def test_experiments_name_what_there_is():
    for experiment in EXPERIMENTS.values():
        assert set(experiment.variants) <= set(VARIANTS)
        assert set(experiment.figures) <= set(FIGURES)
        for finding in experiment.findings:
            for side in (finding.smaller, finding.larger):
                assert isinstance(side, float) or set(side.variants) <= set(experiment.variants)
    assert {name for experiment in EXPERIMENTS.values() for name in experiment.variants} == set(VARIANTS)


def counts(name: str) -> tuple[int, int]:
    with torch.device("meta"):
        counted = FathomForCausalLM(FathomConfig.preset("v3", vocab_size=1024, **VARIANTS[name].config))
    return counted.parameter_counts()["total"], counted.parameter_counts()["active"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "residual"])
def test_variants_have_the_same_size(name):
    """Up to the routers, which know 7 to 16 experts."""
    sizes = [counts(variant) for variant in EXPERIMENTS[name].variants]
    for column in zip(*sizes, strict=True):
        assert max(column) / min(column) < 1.005


def test_connections_come_on_top_of_the_same_network():
    plain, unconstrained, constrained = (counts(name)[0] for name in ("plain", "hc", "mhc"))
    assert plain < unconstrained == constrained < 1.15 * plain

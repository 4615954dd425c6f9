"""The benchmark's arithmetic by hand, and that it times nothing where contenders compute different things."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from fathom import FathomConfig, FathomForCausalLM
from fathom.training.benchmark import measuring
from fathom.training.benchmark.contenders import Contender, Decoding, held_bytes, random_checkpoint, stock_checkpoint
from fathom.training.benchmark.machine import commit_of
from fathom.training.benchmark.measuring import Case, Disagreement, Plan, run_benchmark
from fathom.training.errors import UserError

CPU = torch.device("cpu")
TINY = Plan(
    generations=["v3"],
    kinds=["prefill", "decode", "train"],
    contenders=["stock", "fathom"],
    dtypes=["fp32"],
    contexts=[24],
    prefills=[20],
    batch_sizes=[2],
    rounds=3,
    steps=2,
    new_tokens=4,
    ceiling_size=64,
)
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    """Folders of the two contenders of a tiny V3 model."""
    random_checkpoint(tmp_path / "fathom", "v3", "nano", **SHAPE)
    assert stock_checkpoint(tmp_path / "fathom", tmp_path / "stock") is None
    return {"stock": tmp_path / "stock", "fathom": tmp_path / "fathom"}


def rows(plan: Plan, folders: dict[str, Path]) -> list[dict]:
    return list(measuring.measure_model(plan, "tiny", folders, None, CPU))


def change(folder: Path, name: str, by: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] * by
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_contenders_take_turns_in_every_round(monkeypatch):
    """A clock that only the runs move: times are their own, and who begins changes."""
    now, order = 0.0, []
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now)

    def run(name: str, durations):
        def once():
            nonlocal now
            order.append(name)
            now += next(durations)

        return once

    runs = {"stock": run("stock", iter([4.0, 1.0, 10.0])), "fathom": run("fathom", iter([2.0, 3.0, 0.5]))}
    seconds = measuring.interleaved(runs, 3, CPU)
    assert order == ["stock", "fathom", "fathom", "stock", "stock", "fathom"]
    assert seconds == {"stock": [4.0, 1.0, 10.0], "fathom": [2.0, 3.0, 0.5]}


def test_figures_are_medians_and_their_ratios():
    found = measuring.figures({"stock": [4.0, 1.0, 10.0], "fathom": [2.0, 3.0, 0.5]}, tokens=80, steps=10)
    assert [each["median"] for each in found.values()] == [4.0, 2.0]
    assert [each["speedup"] for each in found.values()] == [1.0, 2.0]
    assert [each["seconds_per_step"] for each in found.values()] == [0.4, 0.2]
    assert [each["tokens_per_second"] for each in found.values()] == [20.0, 40.0]
    assert found["stock"]["seconds"] == [4.0, 1.0, 10.0]


def test_shares_of_the_limits():
    stock = {"weight_bytes": 60, "cache_bytes": 40, "seconds_per_step": 2.0, "median": 9.0}
    decode = {"contenders": {"stock": stock}}
    measuring.add_shares(decode, {"flops": 1.0, "bandwidth": 200.0})
    assert decode["contenders"]["stock"]["share"] == 100 / 2.0 / 200
    train = {"operations": 300.0, "contenders": {"stock": {"median": 2.0}}}
    measuring.add_shares(train, {"flops": 1000.0, "bandwidth": 1.0})
    assert train["contenders"]["stock"]["share"] == 0.15


@pytest.mark.parametrize("generation", ["v2", "v3.2", "v4"])
def test_every_generation_runs_beside_stock(generation):
    report = run_benchmark(replace(TINY, generations=[generation]), say=lambda line: None)
    assert report["without_stock"] == {}
    assert [row["kind"] for row in report["rows"]] == ["prefill", "decode", "train"]
    for row in report["rows"]:
        assert row["difference"] < 1e-5
        for each in row["contenders"].values():
            assert len(each["seconds"]) == TINY.rounds
            assert each["share"] > 0


def test_what_transformers_has_not_runs_alone():
    report = run_benchmark(replace(TINY, generations=["classic", "moe"], kinds=["decode"]), say=lambda line: None)
    assert set(report["without_stock"]) == {"classic", "moe"}
    assert [list(row["contenders"]) for row in report["rows"]] == [["fathom"], ["fathom"]]


def test_reference_and_bf16_agree(pair):
    plan = replace(TINY, contenders=["stock", "fathom", "reference"], dtypes=["bf16"])
    found = rows(plan, {**pair, "reference": pair["fathom"]})
    assert [row["kind"] for row in found] == TINY.kinds
    assert all(0 < row["difference"] < 0.1 for row in found)


def test_int8_beside_bf16(pair):
    plan = replace(TINY, contenders=["stock", "fathom", "int8"], dtypes=["bf16"], kinds=["decode"])
    (row,) = rows(plan, {**pair, "int8": pair["fathom"]})
    assert 0 < row["difference"] < 0.1
    figures = row["contenders"]
    assert figures["stock"]["weight_bytes"] == figures["fathom"]["weight_bytes"]
    assert 0.5 <= figures["int8"]["weight_bytes"] / figures["fathom"]["weight_bytes"] < 0.7
    with pytest.raises(UserError, match="add fathom to --contenders"):
        replace(plan, contenders=["stock", "int8"])
    with pytest.raises(UserError, match="add fathom to --contenders"):
        replace(plan, contenders=["stock"])


@pytest.mark.parametrize(
    ("name", "factor"), [("model.layers.1.self_attn.o_proj.weight", 1.05), ("lm_head.weight", float("nan"))]
)
def test_unequal_outputs_are_not_timed(pair, monkeypatch, name, factor):
    """Nor with bf16 alone, in whose rounding the first of these would be lost."""
    monkeypatch.setattr(measuring, "interleaved", lambda *_: pytest.fail("timed"))
    change(pair["stock"], name, factor)
    for dtype in measuring.DTYPES:
        with pytest.raises(Disagreement, match="logits of fathom and stock differ by"):
            rows(replace(TINY, dtypes=[dtype]), pair)


def test_each_kind_compares_what_it_times(pair, monkeypatch):
    """As if decoding in fp32, which is compared beforehand, had found nothing."""
    monkeypatch.setattr(measuring, "check_in_fp32", lambda *_: None)
    monkeypatch.setattr(measuring, "interleaved", lambda *_: pytest.fail("timed"))
    change(pair["stock"], "model.layers.1.self_attn.o_proj.weight", 3.0)
    for kind in ("prefill", "decode", "generate", "serve", "train"):
        with pytest.raises(Disagreement, match=rf"^tiny {kind} fp32, batch 2, context 2[04]: "):
            rows(replace(TINY, kinds=[kind], new_tokens=16), pair)


def test_single_choices_may_differ_but_not_most():
    """A token whose experts rounding has chosen may be anything; half of them may not."""
    torch.manual_seed(0)
    expected = torch.randn(1, 9, 50)
    found = expected.clone()
    found[:, :4] = 0
    case = Case("any", "decode", "fp32", 1, 8)
    assert measuring.agree(case, {"stock": expected, "fathom": found}) == 0
    found[:, :5] = 0
    with pytest.raises(Disagreement):
        measuring.agree(case, {"stock": expected, "fathom": found})


def test_decoding_in_chunks_is_the_whole_text(pair, monkeypatch):
    """The cache that is filled in parts, by either model, gives the logits of one forward."""
    monkeypatch.setattr("fathom.training.benchmark.contenders.CHUNK", 7)
    tokens = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for name, folder in pair.items():
            contender = Contender(name, folder, torch.float32, CPU)
            text = Decoding(contender, tokens, 26)
            steps = torch.stack([text.step() for _ in range(4)], dim=1)
            torch.testing.assert_close(steps, contender.model(tokens).logits[:, 26:], atol=1e-5, rtol=1e-5)


def test_a_static_cache_decodes_the_same(pair, monkeypatch):
    """Whatever compiles the step: here nothing does."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    plan = replace(TINY, kinds=["decode"], contenders=["stock", "compiled"])
    (row,) = rows(plan, {"stock": pair["stock"], "compiled": pair["fathom"]})
    assert row["difference"] < 1e-5
    assert row["contenders"]["compiled"]["cache_bytes"] > row["contenders"]["stock"]["cache_bytes"]


def test_training_losses_are_those_of_stock(pair):
    """Routing losses, which only Fathom has, are left out; a step leaves the weights as they are."""
    (row,) = rows(replace(TINY, kinds=["train"]), pair)
    assert row["difference"] < 1e-6
    assert FathomConfig.from_pretrained(pair["fathom"]).seq_aux_loss_coef > 0


def test_bytes_held_are_counted_once_with_their_room(pair):
    ours = FathomForCausalLM.from_pretrained(pair["fathom"])
    with torch.inference_mode():
        cache = ours(torch.arange(3, 40).unsqueeze(0), use_cache=True).cache
        ours(torch.tensor([[5]]), cache=cache)
    assert held_bytes(cache) == cache.allocated_nbytes() > cache.nbytes()
    rows = torch.zeros(10, 4)
    plain = DynamicCache()
    plain.update(rows[None, None, :6], rows[None, None, 6:], 0)
    shared = {"whole": rows, "part": rows[:2], "again": [rows]}
    assert held_bytes(shared) == rows.nbytes
    assert held_bytes(plain) == rows.nbytes


def test_weights_read_per_step(pair):
    """By the tensors on disk: two rows of 2 experts each read at most 4 of 8; a token's embedding is one row."""
    contender = Contender("fathom", pair["fathom"], torch.float32, CPU)
    weights = load_file(pair["fathom"] / "model.safetensors")
    always = sum(each.nbytes for name, each in weights.items() if ".experts." not in name and "bias" not in name)
    always -= weights["model.embed_tokens.weight"].nbytes
    experts = sum(each.nbytes for name, each in weights.items() if ".mlp.experts." in name)
    assert measuring.read_weights(contender, batch=2) == always + experts * 4 // 8
    assert measuring.read_weights(contender, batch=100) == always + experts


def test_drafts_of_a_checkpoint(tiny_checkpoint):
    plan = replace(
        TINY,
        generations=[],
        checkpoint=str(tiny_checkpoint),
        kinds=["generate"],
        contenders=["stock", "fathom", "draft"],
    )
    text = measuring.source_code_ids(tiny_checkpoint)
    assert text is not None
    (row,) = run_benchmark(plan, text, say=lambda line: None)["rows"]
    assert list(row["contenders"]) == ["stock", "fathom", "draft"]
    assert row["same_tokens"] == 1.0
    assert row["contenders"]["draft"]["tokens_per_second"] == pytest.approx(
        4 * 2 / row["contenders"]["draft"]["median"]
    )


def test_requests_are_answered_one_after_another_or_at_once(pair, monkeypatch):
    """Of different lengths, and by as many forwards as the batch should need."""
    forwards = {"fathom": [], "shared": []}
    answer = Contender.answer

    def counted(contender: Contender, requests, count):
        seen = forwards[contender.name]
        hook = contender.model.register_forward_pre_hook(
            lambda *inputs: seen.append(tuple(inputs[2]["input_ids"].shape)), with_kwargs=True
        )
        try:
            return answer(contender, requests, count)
        finally:
            hook.remove()

    monkeypatch.setattr(Contender, "answer", counted)
    plan = replace(TINY, kinds=["serve"], contenders=["fathom", "shared"], batch_sizes=[4], rounds=1, new_tokens=40)
    (row,) = rows(plan, {"fathom": pair["fathom"], "shared": pair["fathom"]})
    assert row["same_tokens"] == 1.0
    for each in row["contenders"].values():
        assert each["tokens_per_second"] == pytest.approx(4 * 40 / each["median"])
    times = 2  # once to compare, once to time
    assert {rows for rows, _ in forwards["fathom"]} == {1}
    assert len(forwards["fathom"]) == times * 4 * 40
    for seen in forwards.values():
        assert sorted(tokens for _, tokens in seen if tokens > 1) == sorted([24, 21, 18, 15] * times)
    assert max(rows for rows, _ in forwards["shared"]) > 1
    assert len(forwards["shared"]) < len(forwards["fathom"])


def test_memory_is_that_of_processes_of_their_own(pair):
    """A process that holds a gigabyte, as this one does here, does not hand its peak on."""
    ballast = torch.ones(2**28)
    (row,) = rows(replace(TINY, kinds=["memory"], contenders=["fathom"]), {"fathom": pair["fathom"]})
    found = row["contenders"]["fathom"]
    assert 0 < found["loaded_bytes"] <= found["peak_bytes"] < ballast.nbytes
    assert found["saving"] == 1.0


def test_a_text_too_short_is_repeated(pair):
    contender = Contender("fathom", pair["fathom"], torch.float32, CPU)
    tokens = measuring.tokens_of(Case("any", "train", "fp32", 2, 4), 4, [contender], torch.tensor([7, 8, 9]))
    assert tokens.tolist() == [[7, 8, 9, 7], [8, 9, 7, 8]]


def test_the_commit_is_that_of_the_checkout_itself(tmp_path):
    assert commit_of(tmp_path) is None
    (tmp_path / "inside").mkdir()

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == commit[:12]
    assert commit_of(tmp_path / "inside") is None
    (tmp_path / "changed").touch()
    assert commit_of(tmp_path) == commit[:12] + "+"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"generations": ["v33"]}, "--generations v33 is unknown; did you mean v3"),
        ({"kinds": ["decoding"]}, "--kinds decoding is unknown; did you mean decode"),
        ({"contenders": ["vllm"]}, "--contenders vllm is unknown; known: stock, fathom"),
        ({"contexts": [1]}, "--contexts 1 is too small; give at least 2"),
        ({"batch_sizes": [0]}, "--batch_sizes 0 is too small; give at least 1"),
        ({"rounds": 0}, "--rounds 0 must be at least 1"),
        ({"contenders": ["fathom", "shared"]}, "--contenders shared takes part in serve; add it to --kinds"),
        ({"contenders": ["fathom", "draft"]}, "--contenders draft takes part in generate; add it to --kinds"),
        ({"contenders": ["fathom", "draft"], "kinds": ["generate"]}, "random weights accept no drafts"),
    ],
)
def test_impossible_plans(wrong, says):
    with pytest.raises(UserError, match=says):
        replace(TINY, **wrong)


def test_models_of_another_shape(tmp_path):
    random_checkpoint(tmp_path / "model", "v3", "nano", num_hidden_layers=2, kv_lora_rank=24)
    config = FathomConfig.from_pretrained(tmp_path / "model")
    assert (config.num_hidden_layers, config.kv_lora_rank, config.num_nextn_predict_layers) == (2, 24, 0)
    with pytest.raises(UserError, match="did you mean kv_lora_rank"):
        random_checkpoint(tmp_path / "none", "v3", "nano", kv_lora_rang=24)
    with pytest.raises(UserError, match="must be even"):
        random_checkpoint(tmp_path / "none", "v3", "nano", qk_rope_head_dim=7)


def test_texts_longer_than_the_model_reads(pair):
    with pytest.raises(UserError, match="was made for 128 tokens, and the longest text of this plan has 214"):
        replace(TINY, checkpoint=str(pair["fathom"]), contexts=[200])

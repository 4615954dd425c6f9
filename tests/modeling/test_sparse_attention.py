"""DeepSeek Sparse Attention: the indexer and its choice by definition, the gathered way, the cache."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, StaticCache

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.indexing import best_keys, best_of, index_scores
from fathom.modeling.sparse_attention import DeepseekSparseAttention, LightningIndexer, keep_best

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "index_topk": 8,
    "initializer_range": 0.15,
}
HIDDEN = torch.finfo(torch.float32).min


def config(**overrides) -> FathomConfig:
    return FathomConfig.preset("v3.2", **{**TINY, **overrides})


def model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    return FathomForCausalLM(config(**overrides)).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def test_scores_by_definition():
    """I_ts = sum_j w_tj relu(q_tj k_s) / sqrt(J D), in float64, number by number."""
    torch.manual_seed(0)
    indexer = LightningIndexer(config(index_n_heads=3, index_head_dim=20))
    for parameter in indexer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    hidden, q_latent, angles = torch.randn(2, 5, 64), torch.randn(2, 5, 24), torch.randn(2, 5, 8)
    position = angles.cos(), angles.sin()
    scores = indexer.scores(hidden, q_latent, indexer.keys(hidden, position), position)

    weights = {name: parameter.double() for name, parameter in indexer.named_parameters()}

    def rotated(x: torch.Tensor, batch: int, token: int) -> torch.Tensor:
        """Dimensions i and 8 + i are a pair for i < 8; dimensions 16 to 19 are not rotated."""
        turn = torch.polar(torch.ones(8, dtype=torch.float64), angles[batch, token].double())
        turned = torch.complex(x[:8], x[8:16]) * turn
        return torch.cat((turned.real, turned.imag, x[16:]))

    for batch in range(2):
        keys = []
        for token in range(5):
            key = weights["wk.weight"] @ hidden[batch, token].double()
            key = (key - key.mean()) / (key.var(unbiased=False) + 1e-6).sqrt()
            keys.append(rotated(key * weights["k_norm.weight"] + weights["k_norm.bias"], batch, token))
        for query in range(5):
            heads = (weights["wq_b.weight"] @ q_latent[batch, query].double()).view(3, 20)
            head_weights = weights["weights_proj.weight"] @ hidden[batch, query].double()
            for key in range(5):
                products = [(rotated(head, batch, query) @ keys[key]).clamp(min=0) for head in heads]
                expected = sum(w * p for w, p in zip(head_weights, products, strict=True)) / (3 * 20) ** 0.5
                assert scores[batch, query, key].item() == pytest.approx(expected.item(), abs=1e-4)


def test_scores_do_not_depend_on_how_many_are_computed_at_once(monkeypatch):
    indexer = LightningIndexer(config())
    hidden, q_latent, angles = torch.randn(2, 9, 64), torch.randn(2, 9, 24), torch.randn(2, 9, 8)
    arguments = hidden, q_latent, indexer.keys(hidden, (angles.cos(), angles.sin())), (angles.cos(), angles.sin())
    expected = indexer.scores(*arguments)
    for products in (1, 4 * 2 * 32 * 9):
        monkeypatch.setattr("fathom.modeling.indexing.PRODUCTS_AT_ONCE", products)
        monkeypatch.setattr("fathom.modeling.indexing.PRODUCTS_IN_CACHE", products)
        torch.testing.assert_close(indexer.scores(*arguments), expected)
        with torch.no_grad():
            torch.testing.assert_close(indexer.scores(*arguments), expected)


@torch.no_grad()
def test_scores_without_gradient_are_those_with():
    """By blocks: 513 keys are two, 70 queries of 3 rows several more."""
    query, keys, weights = torch.randn(3, 4, 700, 8), torch.randn(3, 513, 8), torch.randn(3, 700, 4)
    with torch.enable_grad():
        expected = index_scores(query, keys, weights)
    assert expected.shape == (3, 700, 513)
    torch.testing.assert_close(index_scores(query, keys, weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 3, 7, 12, 15])
def test_best_are_the_largest_and_of_equal_ones_the_last(top_k):
    scores = torch.randint(-1, 3, (50, 12), generator=torch.Generator().manual_seed(top_k)).float()
    scores[:20, 8:] = float("-inf")
    for row, chosen in zip(scores.tolist(), best_of(scores, top_k).tolist(), strict=True):
        expected = sorted(range(12), key=lambda i, row=row: (row[i], i))[-top_k:]
        assert [i for i in range(12) if chosen[i]] == sorted(expected)


@pytest.mark.parametrize("top_k", [1, 3, 7, 11])
@pytest.mark.usefixtures("host_reads")
def test_indices_of_the_best_are_the_same_choice(top_k):
    scores = torch.randint(-1, 3, (2, 25, 12), generator=torch.Generator().manual_seed(top_k)).float()
    scores[0, :, 8:] = float("-inf")
    indices, hidden = best_keys(scores, top_k)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, ~hidden)
    assert torch.equal(chosen, best_of(scores, top_k) & scores.isfinite())


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (4, 12), (1, 12)])
@pytest.mark.usefixtures("host_reads")
def test_hidden_keys_are_never_chosen(queries, keys, kind):
    """And hidden ones, be they as good as can be, take no place from visible ones."""
    scores = torch.randint(0, 4, (3, queries, keys), generator=torch.Generator().manual_seed(0)).float()
    # Without a mask several queries are those of the first keys: a prompt in a longer static cache.
    first = keys - queries if kind != "none" or queries == 1 else 0
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(first).expand(3, 1, queries, keys).clone()
    if kind != "none":
        visible[1, ..., :5] = False  # left padding
        visible[2, :, :, 3] = False
    scores = scores.masked_fill(~visible[:, 0], 100.0)
    mask = {"none": None, "boolean": visible, "additive": torch.zeros(visible.shape).masked_fill(~visible, HIDDEN)}
    kept = keep_best(scores, mask[kind], 4)
    if kind == "additive":
        assert set(kept.unique().tolist()) <= {0.0, HIDDEN}
        kept = kept == 0
    for batch in range(3):
        for query in range(queries):
            allowed = [s for s in range(keys) if visible[batch, 0, query, s]]
            expected = sorted(allowed, key=lambda s, b=batch, q=query: (scores[b, q, s].item(), s))[-4:]
            assert kept[batch, 0, query].nonzero().flatten().tolist() == sorted(expected)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
@pytest.mark.parametrize("queries", [1, 3])
def test_gathered_equals_masked(queries, kind):
    """Outputs and gradients, also for a query that sees fewer keys than it might choose."""
    torch.manual_seed(0)
    attention = DeepseekSparseAttention(config(attn_implementation="sdpa"), layer_idx=0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    inputs = [torch.randn(2, 2, queries, 48), torch.randn(2, 1, 40, 32)]
    inputs = [x.requires_grad_() for x in inputs]
    mask = torch.ones(queries, 40, dtype=torch.bool).tril(40 - queries).expand(2, 1, queries, 40).clone()
    mask[1, ..., :35] = False
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, HIDDEN)
    mask = keep_best(torch.randn(2, queries, 40), mask, attention.index_topk)
    direction = torch.randn(2, queries, 2 * 24)
    results = []
    for attend in (attention.expanded_attention, attention.gathered_attention):
        output, _ = attend(*inputs, mask)
        weights = [*inputs, attention.kv_b_proj.weight]
        results.append([output, *torch.autograd.grad((output * direction).sum(), weights)])
    for expected, gathered in zip(*results, strict=True):
        torch.testing.assert_close(gathered, expected, atol=1e-5, rtol=1e-5)


def test_the_fewer_latents_are_read():
    attention = DeepseekSparseAttention(config(attn_implementation="sdpa"), layer_idx=0)
    for queries, keys, pays in ((1, 9, True), (1, 8, False), (5, 41, True), (5, 40, False), (50, 50, False)):
        query, latent = torch.empty(1, 2, queries, 48), torch.empty(1, 1, keys, 16)
        assert attention.gathering_pays(query, latent) == pays
    attention.config._attn_implementation = "eager"
    assert not attention.gathering_pays(torch.empty(1, 2, 1, 48), torch.empty(1, 1, 50, 16))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_without_scores_the_most_recent_keys_are_read(attn_implementation):
    """All scores 0 is a tie of all: one layer then reads a window, whatever stands before it."""
    trained = model(num_hidden_layers=1, num_nextn_predict_layers=0, attn_implementation=attn_implementation)
    trained.model.layers[0].self_attn.indexer.weights_proj.weight.zero_()
    ids = tokens(2, 30)
    positions = torch.arange(30)[None]
    alone = trained(ids[:, -8:], position_ids=positions[:, -8:], use_cache=False).logits[:, -1]
    torch.testing.assert_close(trained(ids, use_cache=False).logits[:, -1], alone, atol=1e-5, rtol=0)
    cache = trained(ids[:, :29]).cache
    torch.testing.assert_close(trained(ids[:, 29:], cache=cache).logits[:, 0], alone, atol=1e-5, rtol=0)


def cached_logits(trained: FathomForCausalLM, ids: torch.Tensor, chunks: list[int], cache, **kwargs) -> torch.Tensor:
    logits = [trained(piece, cache=cache, use_cache=True, **kwargs).logits for piece in ids.split(chunks, 1)]
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 32])
@pytest.mark.parametrize("cache", ["dynamic", "by config", "static"])
@pytest.mark.parametrize("chunks", [[1] * 30, [7, 1, 1, 1, 20], [25, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.usefixtures("host_reads")
def test_decoding_equals_prefill_also_with_ties(chunks, cache, heads):
    """One head scores half of all keys 0. The length crosses `index_topk` by single tokens and inside a chunk."""
    trained = model(index_n_heads=heads)
    ids = tokens(2, 30)
    made = {
        "dynamic": DynamicCache,
        "by config": lambda: DynamicCache(config=trained.config),
        "static": lambda: StaticCache(config=trained.config, max_cache_len=45),
    }[cache]()
    expected = trained(ids, use_cache=False).logits
    torch.testing.assert_close(cached_logits(trained, ids, chunks, made), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["none", "longer", "padded", "additive"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("heads", [1, 32])
@pytest.mark.usefixtures("host_reads")
def test_a_text_in_parts_is_the_text_at_once(heads, alone, kind, monkeypatch):
    """Outputs and gradients; with one indexer head also where scores are equal."""
    torch.manual_seed(0)
    attention = DeepseekSparseAttention(config(attn_implementation="sdpa", index_n_heads=heads), layer_idx=0).eval()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cache = DynamicCache()
    hidden, angles = torch.randn(2, 40, 64), torch.randn(2, 40, 8)
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40).clone()
    if kind == "longer":
        positions = angles[:, :20].cos(), angles[:, :20].sin()
        with torch.no_grad():
            attention(hidden[:, :20], positions, mask[..., :20, :20], cache)
        hidden, angles, mask = hidden[:, 20:], angles[:, 20:], mask[:, :, 20:]
    mask[1, ..., :17] = False
    given = {
        "none": None,
        "longer": mask,
        "padded": mask,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, HIDDEN),
    }
    real = slice(None) if kind in ("none", "longer") else slice(17, None)
    hidden.requires_grad_()
    direction = torch.randn(hidden.shape)
    monkeypatch.setattr(DeepseekSparseAttention, "reading_alone_pays", lambda self, seen: alone)
    monkeypatch.setattr("fathom.modeling.sparse_attention.LATENTS_IN_CACHE", 700)
    results = []
    for at_once in (1000, 7):
        monkeypatch.setattr("fathom.modeling.sparse_attention.QUERIES_AT_ONCE", at_once)
        past = copy.deepcopy(cache) if kind == "longer" else None
        output = attention(hidden, (angles.cos(), angles.sin()), given[kind], past).hidden_states
        learning = [hidden, attention.kv_b_proj.weight, attention.q_b_proj.weight]
        loss = (output * direction)[:, real].sum()
        results.append([output[:, real], *torch.autograd.grad(loss, learning)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 30, [7, 1, 1, 1, 20], [25, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.usefixtures("host_reads")
def test_decoding_equals_prefill_in_parts(chunks, monkeypatch):
    monkeypatch.setattr("fathom.modeling.sparse_attention.QUERIES_AT_ONCE", 4)
    monkeypatch.setattr(DeepseekSparseAttention, "reading_alone_pays", lambda self, seen: seen % 2 == 1)
    trained, ids = model(index_n_heads=2), tokens(2, 30)
    expected = trained(ids, use_cache=False).logits
    torch.testing.assert_close(
        cached_logits(trained, ids, chunks, DynamicCache(config=trained.config)), expected, atol=1e-4, rtol=0
    )


def test_chosen_latents_are_read_alone_where_they_are_few():
    attention = DeepseekSparseAttention(config(attn_implementation="sdpa"), layer_idx=0)
    with torch.no_grad():
        # 2 * 8 latents of 32 numbers, against keys of 48.
        assert attention.reading_alone_pays(11)
        assert not attention.reading_alone_pays(10)
    assert not attention.reading_alone_pays(1000), "with gradients"


@torch.no_grad()
def test_ties_happen_in_the_test_above():
    indexer_scores = []
    trained = model(index_n_heads=1)
    scores_of = LightningIndexer.scores
    for layer in trained.model.layers[:3]:
        indexer = layer.self_attn.indexer
        indexer.scores = lambda *a, i=indexer: indexer_scores.append(scores_of(i, *a)) or indexer_scores[-1]
    trained(tokens(2, 30), use_cache=False)
    assert len(indexer_scores) == 3
    assert all((scores == 0).float().mean() > 0.2 for scores in indexer_scores)


@torch.no_grad()
def test_sparse_attention_leaves_keys_out():
    """The other tests would pass if every key were read; this one would not."""
    sparse, dense = model(), model(index_topk=1000)
    difference = (sparse(tokens(2, 30)).logits - dense(tokens(2, 30)).logits).abs().amax(dim=(0, 2))
    assert difference[:8].max() < 1e-5
    assert difference[-1] > 0.01


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 5, 14])
def test_cache_operations(more):
    """After beam reorder, repetition, selection and crop: the logits of the sequences that are left."""
    trained = model()
    first, second = tokens(3, 12), tokens(3, more + 20)[:, :more]
    cache = trained(first, use_cache=True).cache

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2, 5]))
    first = first[torch.tensor([2, 0, 0])]
    full = trained(torch.cat((first, second), dim=1), use_cache=False).logits
    torch.testing.assert_close(trained(second, cache=cache).logits, full[:, 12:], atol=1e-4, rtol=0)

    cache.crop(9 - cache.get_seq_length())
    full = trained(torch.cat((first[:, :9], second), dim=1), use_cache=False).logits
    torch.testing.assert_close(trained(second, cache=cache).logits, full[:, 9:], atol=1e-4, rtol=0)

    cache.reset()
    full = trained(second, use_cache=False).logits
    torch.testing.assert_close(trained(second, cache=cache).logits, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", [1, 32])
def test_beam_search_is_that_without_a_cache(heads):
    trained = model(index_n_heads=heads)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 15, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    expected = trained.generate(ids, use_cache=False, **settings)
    assert torch.equal(trained.generate(ids, **settings), expected)


@pytest.mark.usefixtures("host_reads")
def test_drafted_tokens_are_rolled_back():
    """Prompt lookup drafts from a repeated prompt; the tokens are those of plain decoding."""
    trained = model()
    ids = tokens(1, 15).repeat(1, 2)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = trained.generate(ids, **settings)
    assert torch.equal(trained.generate(ids, prompt_lookup_num_tokens=4, **settings), expected)


@torch.no_grad()
def test_attention_weights_lie_on_the_chosen_keys():
    trained = model(attn_implementation="eager")
    for weights in trained(tokens(2, 30), output_attentions=True).attentions:
        assert weights.shape == (2, 2, 30, 30)
        seen = (weights > 0).sum(dim=-1)
        assert torch.equal(seen.amax(dim=(0, 1)), torch.arange(1, 31).clamp(max=8))
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 30))


@torch.no_grad()
def test_cache_holds_a_latent_a_rotary_key_and_an_indexer_key_per_token():
    cache = model(index_head_dim=20)(tokens(3, 11)).cache
    assert len(cache.layers) == 3
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 3 * 11 * (16 + 16 + 20)


@torch.no_grad()
@pytest.mark.usefixtures("host_reads")
def test_left_padding_takes_no_places():
    trained = model()
    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :13] = 0
    alone = trained(ids[:1, 13:], use_cache=False).logits
    padded = trained(ids, attention_mask=mask, use_cache=False).logits[:1, 13:]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)

    cache = trained(ids[:, :20], attention_mask=mask[:, :20]).cache
    for end in range(21, 31):
        logits = trained(ids[:, end - 1 : end], attention_mask=mask[:, :end], cache=cache).logits
        torch.testing.assert_close(logits[:1], alone[:, end - 14 : end - 13], atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_backends_without_a_mask_are_refused(implementation):
    with pytest.raises((ValueError, ImportError), match=r"does not support"):
        FathomForCausalLM._from_config(config(), attn_implementation=implementation)


@torch.no_grad()
def test_a_static_cache_compiles_as_one_graph():
    trained, ids = model(num_hidden_layers=1), tokens(2, 30)
    cache = StaticCache(config=trained.config, max_cache_len=40)
    step = torch.compile(trained, fullgraph=True, backend="eager")
    trained(ids[:, :28], cache=cache)
    expected = trained(ids, use_cache=False).logits
    for position in (28, 29):
        logits = step(ids[:, position : position + 1], cache=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, position], atol=1e-4, rtol=0)


DATA_PARALLEL_STEP = """
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from fathom import FathomConfig, FathomForCausalLM

dist.init_process_group("gloo")
torch.manual_seed(0)
config = FathomConfig.preset(
    sys.argv[1], hidden_size=64, num_attention_heads=2, num_hidden_layers=3, vocab_size=97, n_routed_experts=4,
    index_topk=4, o_groups=1
)
model = FathomForCausalLM(config).train()
model.activation_checkpointing_enable()
# As Trainer does with activation checkpointing: a parameter without a gradient ends the second step.
wrapped = DistributedDataParallel(model, find_unused_parameters=False)
torch.manual_seed(dist.get_rank())
for _ in range(2):
    tokens = torch.randint(3, 97, (2, 24))
    wrapped(tokens, labels=tokens).loss.backward()
total = sum(p.grad.double().abs().sum() for p in model.parameters() if p.requires_grad).reshape(1)
totals = [torch.zeros_like(total) for _ in range(2)]
dist.all_gather(totals, total)
assert torch.equal(*totals) and total > 0, totals
print("gradients agree", flush=True)
del wrapped  # Its threads end before the group that they use.
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("generation", ["v3.2", "v4"])
def test_two_processes_train_the_indexers_alike(generation, tmp_path):
    script = tmp_path / "step.py"
    script.write_text(DATA_PARALLEL_STEP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command += [str(script), generation]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("gradients agree") == 2

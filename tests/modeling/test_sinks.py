"""Attention with sinks by PyTorch's fused kernels: float64 definition, gradients, parts of long texts, kernels."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, StaticCache

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import compressed_attention, fused
from fathom.modeling.compressed_attention import SlidingWindowAttention
from fathom.modeling.compressed_cache import DOCUMENT, NOWHERE
from fathom.modeling.compressor import Compressor
from fathom.modeling.sinks import eager_with_sinks, sdpa_with_sinks
from fathom.modeling.text_parts import counted_entries, counted_reach, reach

SHAPE = {
    "hidden_size": 64,
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "token_mixers": ["swa", "csa", "hca", "swa"],
    "num_attention_heads": 4,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "sliding_window": 7,
    "compress_rate_hca": 12,
    "index_topk": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "initializer_range": 0.2,
}
WAYS = [eager_with_sinks, sdpa_with_sinks]


def model(attn_implementation: str = "sdpa", **overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    settings = {**SHAPE, **overrides, "attn_implementation": attn_implementation}
    created = FathomForCausalLM(FathomConfig.preset("v4", **settings)).eval()
    for name, parameter in created.named_parameters():
        # Streams that stay equal, as they do at first, leave nothing but rounding to the gradient of their collapse.
        if name.rsplit(".", 1)[-1] in ("sinks", "position_bias", "base", "hc_base", "scale", "hc_scale"):
            torch.nn.init.normal_(parameter, std=0.5)
    return created


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def inputs(queries: int, width: int = 16, scale: float = 1.0) -> list[torch.Tensor]:
    """Queries, keys, which see which (the first query of every row none), sinks."""
    torch.manual_seed(queries)
    visible = torch.rand(3, queries, 20) > 0.5
    visible[:, 0] = False
    tensors = torch.randn(3, 4, queries, width), torch.randn(3, 20, width), visible, scale * torch.randn(4)
    return [x if x.dtype == torch.bool else x.requires_grad_() for x in tensors]


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["sinks", "large sinks"])
@pytest.mark.parametrize("width", [16, 20, 23])
@pytest.mark.parametrize("queries", [1, 2, 13])
@pytest.mark.parametrize("attend", WAYS)
def test_output_and_gradients_by_definition(attend, queries, width, scale):
    """Query by query in float64: exp(q k) over the visible keys, and over the sink which has no value."""
    query, keys, visible, sinks = inputs(queries, width, scale)
    exact = [x.detach().double().requires_grad_() for x in (query, keys, sinks)]
    expected = torch.zeros(3, 4, queries, width, dtype=torch.float64)
    for row in range(3):
        for head in range(4):
            for t in range(queries):
                seen = exact[1][row, visible[row, t]]
                logits = torch.cat((seen @ exact[0][row, head, t] * 0.3, exact[2][head : head + 1]))
                expected[row, head, t] = logits.softmax(0)[:-1] @ seen
    direction = torch.randn_like(expected)
    output, _ = attend(query, keys, visible, sinks, 0.3)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=0)
    gradients = torch.autograd.grad((output * direction.float()).sum(), (query, keys, sinks))
    for got, right in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 13])
def test_a_fused_kernel_takes_it_forward_and_backward(queries, dtype):
    """With every other way forbidden: none would hold fewer than all products."""
    query, keys, visible, sinks = inputs(queries)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output, _ = sdpa_with_sinks(query.to(dtype), keys.to(dtype), visible, sinks.to(dtype), 0.25)
        output.float().square().sum().backward()
    expected, _ = eager_with_sinks(query, keys, visible, sinks, 0.25)
    torch.testing.assert_close(output.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.parametrize("attend", WAYS)
def test_dropout_keeps_the_mean(attend):
    query, keys, visible, sinks = (x.detach() for x in inputs(3))
    exact, _ = attend(query, keys, visible, sinks, 0.25)
    many = [x.repeat_interleave(2000, dim=0) for x in (query, keys, visible)]
    torch.manual_seed(0)
    dropped = attend(*many, sinks, 0.25, dropout=0.4)[0].unflatten(0, (3, 2000))
    deviation = dropped.std(dim=1) / 2000**0.5
    assert (deviation[:, :, 1:] > 0).all()
    assert ((dropped.mean(dim=1) - exact).abs() <= 5 * deviation + 1e-6).all()


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_dropout_in_training_only(attn_implementation):
    ours, ids = model(attn_implementation, attention_dropout=0.5), tokens(1, 20)
    assert torch.equal(ours(ids).logits, ours(ids).logits)
    ours.train()
    assert (ours(ids).logits - ours(ids).logits).abs().max() > 1e-3


def test_reach_by_definition():
    """Padding before, between and behind, documents, a past: no key outside is seen, the first and the last are."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows = []
        for _ in range(2):
            lengths = torch.randint(1, 9, (4,), generator=generator).tolist()
            row = [DOCUMENT * d + p for d, length in enumerate(lengths) for p in range(length)]
            for _ in range(int(torch.randint(0, 6, (), generator=generator))):
                row.insert(int(torch.randint(0, len(row) + 1, (), generator=generator)), NOWHERE)
            rows.append(([NOWHERE] * 40 + row)[-38:])
        key_places = torch.tensor(rows)
        start, count = torch.randint(0, 30, (2,), generator=generator).tolist()
        places = key_places[:, start : start + count + 1]
        distance = places.unsqueeze(2) - key_places.unsqueeze(1)
        seen = (distance >= 0) & (distance < 5) & (places != NOWHERE).unsqueeze(2)
        indices = seen.any(dim=1).any(dim=0).nonzero().flatten().tolist()
        near = reach(places, key_places, 5)
        if indices:
            assert near.start <= indices[0]
            assert near.stop >= indices[-1] + 1
            assert near.stop - near.start <= indices[-1] + 1 - indices[0] + 4
        else:
            assert near == slice(0)


def cases() -> dict[str, dict]:
    mask = torch.ones(3, 60, dtype=torch.long)
    mask[1, :23] = 0
    mask[2, :5] = mask[2, 20:31] = mask[2, 50:] = 0
    rows = [[13, 1, 24, 22], [60], [4, 5, 51]]
    positions = torch.tensor([[p for length in row for p in range(length)] for row in rows])
    return {"plain": {}, "padded, also in between": {"attention_mask": mask}, "packed": {"position_ids": positions}}


@torch.no_grad()
@pytest.mark.parametrize("case", cases())
@pytest.mark.usefixtures("host_reads")
def test_entries_read_alone_are_those_read_by_all(case, monkeypatch):
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(SlidingWindowAttention, "reading_alone_pays", lambda *_: True)
    options, ids = cases()[case], tokens(3, 60)
    real = options.get("attention_mask", torch.ones(3, 60)).bool()
    expected, found = (model(attend)(ids, use_cache=False, **options).logits[real] for attend in ("eager", "sdpa"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("at_once", [1, 5, 7, 59])
@pytest.mark.parametrize("case", cases())
@pytest.mark.usefixtures("host_reads")
def test_parts_are_the_whole(case, at_once, monkeypatch):
    """Logits and gradients of a text that is read in parts; borders fall into windows, blocks and documents."""
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", at_once)
    options, ids, results = cases()[case], tokens(3, 60), []
    real = options.get("attention_mask", torch.ones(3, 60)).bool()
    for attn_implementation in ("eager", "sdpa"):
        ours = model(attn_implementation)
        logits = ours(ids, use_cache=False, **options).logits[real]
        # Not the mean of their squares, which a norm before the head keeps nearly constant.
        logits.logsumexp(dim=-1).mean().backward()
        gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
        results.append({"logits": logits, **gradients})
    assert results[0].keys() == results[1].keys()
    # Some gradients are differences of large numbers (a norm follows the collapse of the streams).
    rounding = 1e-6 * max(p.abs().max().item() for name, p in results[0].items() if name != "logits")
    for name, expected in results[0].items():
        bound = 1e-5 * expected.abs().max().item() + rounding
        torch.testing.assert_close(results[1][name], expected, atol=bound, rtol=0, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.usefixtures("host_reads")
def test_parts_of_a_chunk_over_a_cache(alone, monkeypatch):
    """Whether queries read all entries or their own alone."""
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", 5)
    monkeypatch.setattr(SlidingWindowAttention, "reading_alone_pays", lambda *_: alone)
    ours, ids = model(), tokens(2, 60)
    cache, logits = None, []
    for piece in ids.split([3, 21, 1, 35], dim=1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    expected = model("eager")(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("form", ["dynamic", "static"])
@pytest.mark.usefixtures("host_reads")
def test_parts_of_padded_chunks_over_a_cache(form, monkeypatch):
    """Rows with padding before, between and behind their tokens, some of it in the cache and some in the chunk."""
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", 5)
    ours, ids, mask = model(), tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :13] = mask[1, 17:30] = mask[1, 40:44] = mask[2, 20:24] = mask[2, 52:] = 0
    cache = DynamicCache(config=ours.config) if form == "dynamic" else StaticCache(ours.config, max_cache_len=64)
    logits, seen = [], 0
    for piece in ids.split([22, 1, 30, 7], dim=1):
        seen += piece.shape[1]
        logits.append(ours(piece, attention_mask=mask[:, :seen], cache=cache).logits)
    expected = model("eager")(ids, attention_mask=mask, use_cache=False).logits
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 40])
def test_counted_columns_are_those_that_are_reached(window):
    """Rows whose padding comes first, of one length or several documents: what `reach` finds is among them."""
    block, queries, keys = 4, 23, 30
    places = torch.full((3, keys), NOWHERE)
    places[0] = torch.arange(5, 5 + keys)  # goes on from tokens that are not here
    places[1, 11:] = torch.cat((torch.arange(9), DOCUMENT + torch.arange(10)))
    places[2, -1:] = 0
    entry_places = torch.full((3, keys // block), NOWHERE)
    for row, entries in enumerate(([11, 15, 19, 23, 27, 31], [3, 7, DOCUMENT + 3, DOCUMENT + 7], [])):
        entry_places[row, : len(entries)] = torch.tensor(entries)
    for start in range(0, queries, 6):
        part = slice(start, start + 6)
        some = places[:, keys - queries :][:, part]
        near, counted = reach(some, places, window), counted_reach(part, queries, keys, window)
        assert counted.start <= near.start
        assert near.stop <= counted.stop <= keys
        assert counted.stop - counted.start <= 6 + window - 1
        count = counted_entries(part, queries, entry_places.shape[1], block)
        assert reach(some, entry_places, None).stop <= count <= entry_places.shape[1]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [1, 8])
def test_decoding_reads_the_window_and_the_chosen_entries(monkeypatch, lengths):
    """Token by token and by few keys, the logits of the definition over the whole text; one row is padded."""
    monkeypatch.setattr(fused, "SHORT_TEXT", 0)
    monkeypatch.setattr(compressed_attention, "LENGTHS", lengths)
    ours, ids = model(), tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    expected = model("eager")(ids, attention_mask=mask, use_cache=False).logits[:, 40:]
    cache = ours(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).cache
    read, attend = [], eager_with_sinks

    def spy(query, keys, *options):
        read.append(keys.shape[1])
        return attend(query, keys, *options)

    monkeypatch.setattr(compressed_attention, "eager_with_sinks", spy)
    for t in range(40, 60):
        logits = ours(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t - 40], atol=1e-4, rtol=0)
    window, top_k, block = 7, 4, 12
    needed = [[window, window + top_k, window + (t + 1) // block] for t in range(40, 60)]
    assert read == [-(-keys // lengths) * lengths for step in needed for keys in step]


@torch.no_grad()
def test_entries_are_made_by_tokens_that_complete_a_block(monkeypatch):
    """Two rows whose blocks of 4 end two tokens apart; other tokens make none."""
    ours, ids = model(token_mixers="csa", num_hidden_layers=1, num_nextn_predict_layers=0), tokens(2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, :2] = 0
    cache = ours(ids[:, :16], attention_mask=mask[:, :16], use_cache=True).cache
    made, make = [], Compressor.forward

    def spy(compressor, *inputs):
        made.append(t)
        return make(compressor, *inputs)

    monkeypatch.setattr(Compressor, "forward", spy)
    for t in range(16, 30):
        ours(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache)
    assert sorted(set(made)) == [17, 19, 21, 23, 25, 27, 29]


@torch.no_grad()
def test_a_long_text_needs_no_square(monkeypatch):
    """Every part reads its window and no more; only entries, a twelfth as many as tokens, are read by all after."""
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", 16)
    sizes, attend = [], F.scaled_dot_product_attention

    def spy(query, key, value, **options):
        sizes.append((query.shape[2], key.shape[2], options["attn_mask"].shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    model(num_hidden_layers=2, token_mixers=["swa", "hca"], num_nextn_predict_layers=0)(tokens(2, 240))
    sink, window = 1, 7 - 1
    assert len(sizes) == 2 * 15
    for layer, block in ((sizes[:15], 1000), (sizes[15:], 12)):
        assert [queries for queries, _, _ in layer] == [16] * 15
        near = [16] + [16 + window] * 14
        entries = [16 * part // block for part in range(1, 16)]
        assert [keys for _, keys, _ in layer] == [n + e + sink for n, e in zip(near, entries, strict=True)]
        assert all(mask == (2, 1, queries, keys) for queries, keys, mask in layer)


@torch.no_grad()
def test_weights_need_eager(monkeypatch):
    """As in transformers: SDPA has none and says so, and a config that asks for both is refused."""
    ours, ids, warnings = model(), tokens(2, 30), []
    monkeypatch.setattr(compressed_attention.logger, "warning_once", warnings.append)
    assert not ours(ids).attentions
    assert not warnings
    assert not ours(ids, output_attentions=True).attentions
    assert all("eager" in warning for warning in warnings)
    assert warnings
    with pytest.raises(ValueError, match="eager"):
        ours.config.output_attentions = True
    ours.set_attn_implementation("eager")
    attentions = ours(ids, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(2, 4, 30, 30 + entries) for entries in (0, 7, 2)]
    for weights, layer in zip(attentions, ours.model.layers[:3], strict=True):
        assert (weights.sum(-1) < 1).all()
        # The first token sees itself and the sink.
        assert (weights[:, :, 0, 0] > 0).all()
        assert not weights[:, :, 0, 1:].any()
        assert layer.self_attn.sinks.shape == (4,)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_backends_without_sinks_are_refused(implementation):
    with pytest.raises(ValueError, match="does not support"):
        model(implementation)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
def test_prefill_compiles_as_one_graph(kind, monkeypatch):
    """Not in parts, whose keys depend on the data."""
    monkeypatch.setattr(compressed_attention, "QUERIES_AT_ONCE", 5)
    ours = model(token_mixers=kind, num_hidden_layers=2, num_nextn_predict_layers=0)
    compiled = torch.compile(ours.model, fullgraph=True, backend="eager")
    ids = tokens(2, 30)
    states = compiled(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(states, ours.model(ids, use_cache=False).last_hidden_state, atol=1e-5, rtol=0)

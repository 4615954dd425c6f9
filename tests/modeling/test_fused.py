"""The native functions against the definitions they stand for, and when they are called at all.

Every definition is the module's own: it runs where gradients are enabled, which no native function serves.
"""

import math

import pytest
import torch
from torch import nn

from fathom.modeling import decoder_layer, fused, native, native_arguments
from fathom.modeling.attention import MultiHeadAttention, MultiHeadLatentAttention, masked_softmax
from fathom.modeling.compressed_attention import GroupedLinear
from fathom.modeling.configuration_fathom import FathomConfig
from fathom.modeling.experts import HashRouter, RoutedExperts, TopKRouter
from fathom.modeling.feed_forward import FeedForward
from fathom.modeling.fused import multiplies_texts
from fathom.modeling.hyper_connections import HyperConnection, StreamCollapse
from fathom.modeling.indexing import best_of, index_scores
from fathom.modeling.modeling_fathom import FathomForCausalLM
from fathom.modeling.normalization import FathomRMSNorm
from fathom.modeling.rotary import apply_rotary, rotate_end
from fathom.modeling.sinks import eager_with_sinks
from fathom.modeling.sparse_attention import DeepseekSparseAttention

pytestmark = pytest.mark.skipif(not native.wait(), reason="there is no C++ compiler")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest number: fp32 sums in another order, and bf16 rounds what fp32 would not.
CLOSE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


@pytest.fixture(params=list(DTYPES))
def dtype(request) -> torch.dtype:
    torch.manual_seed(0)
    return DTYPES[request.param]


@pytest.fixture(autouse=True)
def texts_of_any_length(monkeypatch) -> None:
    """As if on a processor where that pays, for other processors compute the same."""
    monkeypatch.setattr(fused, "multiplies_texts", lambda dtype: True)


def assert_close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    scale = expected.detach().abs().max().clamp(min=1e-6).float()
    torch.testing.assert_close(found.float() / scale, expected.detach().float() / scale, atol=CLOSE[dtype], rtol=0)


def both_ways(module: nn.Module, *inputs, calls: str, monkeypatch: pytest.MonkeyPatch):
    """What a module returns natively, as is made sure of, and by its definition."""
    called = []
    original = getattr(fused.Kernels, calls)
    monkeypatch.setattr(fused.Kernels, calls, lambda *args, **kw: called.append(calls) or original(*args, **kw))
    with torch.no_grad():
        found = module(*inputs)
    assert called
    called.clear()
    expected = module(*inputs)
    assert not called
    return found, expected


def shuffled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).eval()


# Widths that are multiples of the vectors' and not, and wider than is in columns at a time; tokens that are and are not
# a pair, and so many that weights are put into columns.
@pytest.mark.parametrize("width", [16, 80, 37, 2100])
@pytest.mark.parametrize("tokens", [(1, 1), (1, 2), (3, 5), (3, 111)])
def test_several_linear_maps(dtype, width, tokens):
    x = torch.randn(*tokens, width).to(dtype)
    maps = [shuffled(nn.Linear(width, rows, bias=False), dtype) for rows in (1, 8, 50, 129)]
    with torch.no_grad():
        found = fused.kernels_for(False, tokens[0] * tokens[1], x, any_text=True).project(
            x, *[each.weight for each in maps]
        )
        assert [torch.equal(one, two) for one, two in zip(found, fused.project(x, *maps), strict=True)] == [True] * 4
    for each, output in zip(maps, found, strict=True):
        assert_close(output, each(x), dtype)


def test_a_linear_map_per_group(dtype, monkeypatch):
    module = shuffled(GroupedLinear(24, 20, 3), dtype)
    assert_close(
        *both_ways(module, torch.randn(2, 3, 3, 24).to(dtype), calls="project_groups", monkeypatch=monkeypatch), dtype
    )


@pytest.mark.parametrize("width", [8, 100, 256])
@pytest.mark.parametrize("tokens", [3, 601])
def test_norm(dtype, width, tokens, monkeypatch):
    x = 5 * torch.randn(2, tokens, width).to(dtype)
    module = shuffled(FathomRMSNorm(width), dtype)
    assert_close(*both_ways(module, x, calls="rms_norm", monkeypatch=monkeypatch), dtype)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rows", [1, 2], ids=["shared-positions", "own-positions"])
def test_rotation_of_a_part_of_every_head(dtype, interleaved, rows):
    x = torch.randn(2, 3, 4, 20).to(dtype)
    angles = torch.randn(rows, 3, 4)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    with torch.no_grad():
        found = fused.kernels_for(False, 6, x).norm_rotate(x, cos, sin, first=6, interleaved=interleaved)
    turned = apply_rotary(x[..., 6:14].transpose(1, 2).float(), cos.float(), sin.float(), interleaved).transpose(1, 2)
    assert_close(found, torch.cat((x[..., :6].float(), turned, x[..., 14:].float()), -1), dtype)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("norm_eps", [None, 1e-3])
def test_rotation_of_the_end(dtype, backwards, norm_eps):
    x = torch.randn(2, 3, 4, 20).to(dtype).transpose(1, 2)
    angles = torch.randn(2, 3, 4)
    arguments = x, angles.cos().to(dtype), angles.sin().to(dtype)
    expected = rotate_end(*arguments, training=False, backwards=backwards, norm_eps=norm_eps)
    with torch.no_grad():
        assert_close(rotate_end(*arguments, training=False, backwards=backwards, norm_eps=norm_eps), expected, dtype)


def mla(kind=MultiHeadLatentAttention, **settings) -> MultiHeadLatentAttention:
    return kind(FathomConfig.preset("v3.2", attn_implementation="sdpa", index_topk=40, **settings), 0)


def visible_keys(batch: int, tokens: int, keys: int) -> torch.Tensor:
    """Causal, some more keys hidden, and a query that sees nothing."""
    mask = torch.ones(tokens, keys, dtype=torch.bool).tril(keys - tokens).expand(batch, 1, tokens, keys).clone()
    mask &= torch.rand(mask.shape) < 0.7
    mask[..., -tokens] = True
    mask[-1, :, 0] = False
    return mask


# Keys of one task, of several, and a number that is no multiple of anything.
@pytest.mark.parametrize("keys", [9, 64, 1333])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_over_latents(dtype, keys, tokens, masked):
    attention = shuffled(mla(), dtype)
    width = attention.kv_lora_rank + attention.qk_rope_head_dim
    # A part of a larger buffer, as caches give it.
    latents = torch.randn(2, 1, keys + 7, width).to(dtype)[:, :, :keys]
    query = torch.randn(2, tokens, attention.num_heads, attention.qk_head_dim).to(dtype).transpose(1, 2)
    mask = visible_keys(2, tokens, keys) if masked else None
    expected, _ = attention.absorbed_attention(query, latents, mask)
    with torch.no_grad():
        found = attention.fused_attention(query, latents, None if mask is None else mask[:, 0])
    assert found is not None
    used = torch.ones(2, tokens, 1, dtype=torch.bool) if mask is None else mask.any(-1).transpose(1, 2)
    assert_close(found * used, expected * used, dtype)
    assert found.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 5, 64, 197])
@pytest.mark.parametrize("sizes", [(4, 4, 16, 16), (4, 2, 20, 12), (2, 1, 70, 33)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_of_a_text(dtype, tokens, sizes, masked):
    """Of blocks of queries that are full and not, heads that share keys, rows that stand anywhere."""
    heads, kv_heads, width, value_width = sizes
    keys = tokens + 90 if masked else tokens

    def rows(heads: int, tokens: int, width: int) -> torch.Tensor:
        return torch.randn(2, tokens, heads, width + 3).to(dtype)[..., :width].transpose(1, 2)

    query, key, value = rows(heads, tokens, width), rows(kv_heads, keys, width), rows(kv_heads, keys, value_width)
    mask = visible_keys(2, tokens, keys) if masked else torch.ones(tokens, keys, dtype=torch.bool).tril()[None, None]
    key_for_all, value_for_all = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (key, value))
    weights = masked_softmax(query.float() @ key_for_all.float().mT * 0.3, mask)
    expected = ((weights @ value_for_all.float()) * mask.any(-1, keepdim=True)).transpose(1, 2)
    with torch.no_grad():
        found = fused.kernels_of(False, query).attend_text(query, key, value, mask[:, 0] if masked else None, 0.3)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("generation", ["classic", "v3", "v3.2"])
def test_texts_are_read_natively(generation, monkeypatch):
    """Padded and not, at once and in parts: the logits of PyTorch's own attention."""
    torch.manual_seed(0)
    config = FathomConfig.preset(generation, num_nextn_predict_layers=0, attn_implementation="sdpa", index_topk=300)
    model, calls = FathomForCausalLM(config).eval(), []
    ids, mask = torch.randint(5, 4000, (2, 220)), torch.ones(2, 220, dtype=torch.int64)
    mask[1, :31] = 0
    original = fused.Kernels.attend_text
    monkeypatch.setattr(decoder_layer, "decode_layer", lambda *_: None)  # which calls the function itself
    monkeypatch.setattr(fused.Kernels, "attend_text", lambda *args: calls.append(1) or original(*args))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            whole = model(ids[:1]).logits
            first = model(ids[:, :130], attention_mask=mask[:, :130], use_cache=True)
            rest = model(ids[:, 130:], attention_mask=mask, cache=first.cache, use_cache=True)
        padded = torch.cat((first.logits, rest.logits), dim=1) * mask[..., None]
        return torch.cat((whole, padded))

    found = logits()
    assert len(calls) >= 2 * config.num_hidden_layers
    calls.clear()
    monkeypatch.setattr(MultiHeadLatentAttention, "read_text", lambda *_, **__: None)
    monkeypatch.setattr(MultiHeadAttention, "read_text", lambda *_, **__: None)
    torch.testing.assert_close(found, logits(), atol=5e-6, rtol=0)
    assert not calls


def test_attention_over_chosen_latents(dtype):
    attention = shuffled(mla(), dtype)
    width = attention.kv_lora_rank + attention.qk_rope_head_dim
    latents = torch.randn(2, 1, 300, width).to(dtype)
    query = torch.randn(2, 3, attention.num_heads, attention.qk_head_dim).to(dtype).transpose(1, 2)
    chosen = torch.stack([torch.randperm(300)[:70] for _ in range(6)]).view(2, 3, 70)
    visible = torch.rand(2, 3, 70) < 0.6
    mask = torch.zeros(2, 3, 300, dtype=torch.bool).scatter(2, chosen, visible).unsqueeze(1)
    with torch.no_grad():
        found = attention.fused_attention(query, latents, visible, chosen)
    assert_close(found, attention.absorbed_attention(query, latents, mask)[0], dtype)


@pytest.mark.parametrize("keys", [5, 700])
def test_attention_with_sinks(dtype, keys):
    query = torch.randn(2, 3, 4, 20).to(dtype)
    both, sinks = torch.randn(2, keys, 20).to(dtype), torch.randn(4).to(dtype)
    visible = torch.rand(2, 3, keys) < 0.5
    visible[0, 0] = False
    with torch.no_grad():
        found = fused.kernels_for(False, 6, query).attend_shared(query, both, visible, sinks, 0.3)
    expected, _ = eager_with_sinks(query.transpose(1, 2).float(), both.float(), visible, sinks.float(), 0.3)
    assert_close(found, expected.transpose(1, 2), dtype)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_k", [50, 12], ids=["many", "fewer than blocks"])
def test_choice_of_keys(dtype, masked, ties, top_k):
    """The same keys, also where most scores are 0: numbers that both ways add up to exactly the same."""
    # 1 / sqrt(J D) = 1/8 keeps sums of whole numbers exact: ties are ties in whatever order they are summed.
    batch, tokens, heads, width, keys = 2, 3, 4, 16, 900
    whole = (lambda *shape: torch.randint(-3, 4, shape).to(dtype)) if ties else (lambda *s: torch.randn(s).to(dtype))
    query, cached, hidden = whole(batch, tokens, heads, width), whole(batch, keys, width), whole(batch, tokens, 16)
    if ties:
        cached[:, ::3] = 0
    weight = torch.eye(heads, 16).to(dtype)
    mask = visible_keys(batch, tokens, keys)[:, 0] if masked else None
    with torch.no_grad():
        chosen, sees = fused.kernels_for(False, 6, query).choose_keys(query, cached, hidden, weight, mask, top_k)
    weights = (hidden.float() @ weight.float().T) * (heads * width) ** -0.5
    scores = index_scores(query.transpose(1, 2), cached, weights)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    expected = best_of(scores, top_k)
    found = torch.zeros_like(expected).scatter(2, chosen, sees)
    assert torch.equal(found, expected if mask is None else expected & mask)
    assert (chosen.diff(dim=-1) > 0).all()


ROUTERS = {
    "softmax": {"scoring_func": "softmax", "topk_method": "greedy"},
    "groups": {"scoring_func": "softmax", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "sigmoid": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "sigmoid-groups": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2},
    "sqrtsoftplus": {"scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc"},
}


@pytest.mark.parametrize("kind", list(ROUTERS))
@pytest.mark.parametrize("normalises", [True, False])
def test_routing(dtype, kind, normalises, monkeypatch):
    settings = {"n_group": 1, "topk_group": 1, "norm_topk_prob": normalises, **ROUTERS[kind]}
    router = shuffled(TopKRouter(FathomConfig.preset("v3", routed_scaling_factor=2.5, **settings)), dtype)
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.normal_(std=0.1)
    x = torch.randn(9, 256).to(dtype)
    found, expected = both_ways(router, x, calls="route", monkeypatch=monkeypatch)
    assert_close(found[0], expected[0], torch.float32)
    dense = [torch.zeros_like(logits).scatter(1, indices, weights) for logits, weights, indices in (found, expected)]
    assert_close(*dense, torch.float32)
    assert found[2].dtype == torch.int64


def test_routing_by_token_id(dtype, monkeypatch):
    router = shuffled(HashRouter(FathomConfig.preset("v4")), dtype)
    router.reset_table()
    # A column of a larger batch: ids that do not stand side by side.
    ids = torch.randint(0, 4096, (9, 5))[:, 2]
    found, expected = both_ways(router, torch.randn(9, 256).to(dtype), ids, calls="route", monkeypatch=monkeypatch)
    assert torch.equal(found[2], expected[2])
    assert_close(found[1], expected[1], torch.float32)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("tokens", [1, 7, 129, 2500])
def test_experts(dtype, limit, tokens, monkeypatch):
    settings = {"swiglu_limit": limit, "experts_implementation": "sorted_mm", "moe_intermediate_size": 40}
    experts = shuffled(RoutedExperts(FathomConfig.preset("v3", **settings)), dtype)
    x = torch.randn(tokens, 256).to(dtype)
    indices = torch.stack([torch.randperm(16)[:4] for _ in range(tokens)])
    arguments = x, indices, torch.rand(tokens, 4)
    assert_close(*both_ways(experts, *arguments, calls="mix_experts", monkeypatch=monkeypatch), dtype)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("tokens", [3, 150])
def test_feed_forward(dtype, limit, tokens, monkeypatch):
    module = shuffled(FeedForward(FathomConfig.preset("v3", swiglu_limit=limit), 90), dtype)
    assert_close(
        *both_ways(module, torch.randn(2, tokens, 256).to(dtype), calls="mix_channels", monkeypatch=monkeypatch), dtype
    )


def test_another_activation_is_left_to_its_definition():
    with torch.no_grad():
        assert not FeedForward(FathomConfig.preset("v3", hidden_act="gelu"), 90).is_swiglu


@pytest.mark.parametrize("streams", [2, 4])
def test_hyper_connections(dtype, streams, monkeypatch):
    connection = shuffled(HyperConnection(FathomConfig.preset("v4", hc_mult=streams)), dtype)
    x, output = torch.randn(2, 3, streams, 256).to(dtype), torch.randn(2, 3, 256).to(dtype)
    (read, mixing), (expected, expected_mixing) = both_ways(
        connection, x, calls="read_streams", monkeypatch=monkeypatch
    )
    assert_close(read, expected, dtype)
    # Followed by many exponentials, and in fp32 both ways, of the same rounded numbers.
    for found, wanted in zip(mixing, expected_mixing, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    written, expected = both_ways(
        lambda: connection.write(x, output, expected_mixing._replace(post=mixing.post.detach())),
        calls="write_streams",
        monkeypatch=monkeypatch,
    )
    assert_close(written, expected, dtype)


@pytest.mark.parametrize("streams", [2, 4])
def test_the_streams_as_one(dtype, streams, monkeypatch):
    collapse = shuffled(StreamCollapse(FathomConfig.preset("v4", hc_mult=streams)), dtype)
    x = torch.randn(2, 3, streams, 256).to(dtype)
    assert_close(*both_ways(collapse, x, calls="collapse_streams", monkeypatch=monkeypatch), dtype)


@pytest.mark.parametrize("generation", ["moe", "v2", "v3", "v3.2", "v4"])
def test_steps_of_every_generation(generation, monkeypatch):
    """One token at a time, a few and a short text, padded on the left: the same with and without native functions."""
    torch.manual_seed(0)
    config = FathomConfig.preset(generation, num_nextn_predict_layers=0)
    model = FathomForCausalLM(config).eval()
    ids, mask = torch.randint(5, 4000, (2, 260)), torch.ones(2, 260, dtype=torch.int64)
    mask[1, :17] = 0
    logits = []
    for tokens in (fused.SHORT_TEXT, 0):
        monkeypatch.setattr(fused, "SHORT_TEXT", tokens)
        with torch.no_grad():
            read = 180
            cache = model(ids[:, :read], attention_mask=mask[:, :read], use_cache=True).cache
            steps = []
            for count in (1, 1, 3, 1, 8, 1, 1, 4, 60):
                step = slice(read, read + count)
                output = model(ids[:, step], attention_mask=mask[:, : step.stop], cache=cache, use_cache=True)
                steps.append(output.logits)
                read += count
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*logits, atol=5e-6, rtol=0)


@pytest.mark.parametrize("tokens", [17, 90, 300])
@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3", "v3.2", "v4"])
def test_texts_of_every_generation(generation, tokens, dtype, monkeypatch):
    """Prompts, padded on the left: the logits of PyTorch's products."""
    everything = {"num_experts_per_tok": 4, "n_routed_experts": 4} if generation != "classic" else {}
    torch.manual_seed(0)  # all experts are chosen: rounding would choose others
    everything |= {"n_group": 1, "topk_group": 1, "index_topk": 4096}
    config = FathomConfig.preset(generation, num_nextn_predict_layers=0, **everything)
    model, project, called = FathomForCausalLM(config).eval().to(dtype), fused.Kernels.project, []
    monkeypatch.setattr(fused.Kernels, "project", lambda *args: called.append(1) or project(*args))
    ids, mask = torch.randint(5, 4000, (1, tokens)), torch.ones(1, tokens, dtype=torch.int64)
    mask[:, :5] = 0
    logits, calls = [], []
    for most, of_any_length in ((fused.SHORT_TEXT, True), (0, False)):
        monkeypatch.setattr(fused, "SHORT_TEXT", most)
        monkeypatch.setattr(fused, "multiplies_texts", lambda dtype, says=of_any_length: says)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[:, 5:])
        calls.append(len(called))
    assert calls[0] == calls[1] > 0
    close = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(*logits, atol=close * logits[1].abs().max().item(), rtol=0)


# Not V4, where entries and the sum of the streams are PyTorch's.
@pytest.mark.parametrize("generation", ["v3", "v3.2"])
def test_tokens_do_not_depend_on_those_beside_them(generation, dtype):
    """Read one by one, three at once and in a batch: the same to the last bit, whatever the number of threads."""
    model = FathomForCausalLM(FathomConfig.preset(generation, num_nextn_predict_layers=0)).eval().to(dtype)
    ids = torch.randint(5, 4000, (1, 163))
    results = []
    threads = torch.get_num_threads()
    for steps, rows, using in (([1, 1, 1], 1, 1), ([3], 1, 2), ([1, 1, 1], 4, 2)):
        with torch.no_grad():
            cache = model(ids[:, :160], use_cache=True).cache
            torch.set_num_threads(using)
            cache.batch_repeat_interleave(rows)
            read, logits = 160, []
            for count in steps:
                chunk = ids[:, read : read + count].expand(rows, -1)
                logits.append(model(chunk, cache=cache, use_cache=True).logits[:1])
                read += count
        torch.set_num_threads(threads)
        results.append(torch.cat(logits, dim=1))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_served(monkeypatch):
    """Gradients, training, many tokens, autocast, other dtypes, strided and meta tensors, subclasses, graphs."""
    x = torch.randn(2, 3, 16)
    assert fused.kernels_for(False, 6, x) is None  # gradients are enabled
    with torch.no_grad():
        assert fused.kernels_for(False, 6, x) is not None
        assert fused.kernels_for(True, 6, x) is None
        assert fused.kernels_for(False, fused.SHORT_TEXT + 1, x) is None
        assert fused.kernels_for(False, fused.SHORT_TEXT + 1, x, most=math.inf) is not None
        for says in (True, False):
            monkeypatch.setattr(fused, "multiplies_texts", lambda dtype, says=says: says)
            assert (fused.kernels_for(False, fused.SHORT_TEXT + 1, x, any_text=True) is not None) == says
        assert fused.kernels_for(False, 6, x.half()) is None
        assert fused.kernels_for(False, 6, x, x.bfloat16()) is None
        assert fused.kernels_for(False, 6, x.transpose(1, 2)) is None
        assert fused.kernels_for(False, 6, x.to("meta")) is None
        assert fused.kernels_for(False, 6, x, nn.Buffer(x)) is not None
        assert fused.kernels_for(False, 6, x.as_subclass(type("Quantised", (torch.Tensor,), {}))) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert fused.kernels_for(False, 6, x) is None
        found = []
        torch.jit.trace(lambda x: found.append(fused.kernels_for(False, 6, x)) or x, x, check_trace=False)
        assert found == [None]


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, [True, True]),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, [True, False]),
        ({"avx512_f": True, "avx512_bf16": True, "amx_bf16": True}, [True, False]),  # tiles multiply faster
        ({"avx512_f": False}, [False, False]),
        ({}, [False, False]),
    ],
)
def test_texts_are_multiplied_where_vectors_are_long(about, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: about)
    multiplies_texts.cache_clear()
    try:
        assert [multiplies_texts(dtype) for dtype in (torch.float32, torch.bfloat16)] == expected
    finally:
        multiplies_texts.cache_clear()


def test_a_map_with_a_hook_a_bias_or_an_adapter_is_called():
    linear = nn.Linear(16, 8, bias=False)
    assert fused.is_plain(linear)
    assert not fused.is_plain(nn.Linear(16, 8))
    assert not fused.is_plain(nn.Sequential(linear))
    handle = linear.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        (output,) = fused.project(x, linear)
        handle.remove()
        torch.testing.assert_close(output, linear(x) + 1)
        assert fused.is_plain(linear)


@pytest.mark.parametrize("generation", ["v3.2", "v4"])
def test_an_adapter_of_an_indexers_weights_is_heard(generation, monkeypatch):
    """PEFT's has the adapted module's `weight`, which alone would choose other keys."""

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.out_features = base, base.out_features

        weight = property(lambda self: self.base.weight)

        def forward(self, x):
            return -self.base(x)

    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset(generation, index_topk=8, num_nextn_predict_layers=0)).eval()
    adapted = [each for name, each in model.named_modules() if name.endswith(("indexer", "indexer.scorer"))]
    for module in adapted:
        if hasattr(module, "weights_proj"):
            module.weights_proj = Adapter(module.weights_proj)
    ids = torch.randint(5, 4000, (1, 120))
    logits = []
    for tokens in (fused.SHORT_TEXT, 0):
        monkeypatch.setattr(fused, "SHORT_TEXT", tokens)
        with torch.no_grad():
            cache = model(ids[:, :117], use_cache=True).cache
            steps = [model(ids[:, t : t + 1], cache=cache, use_cache=True).logits for t in (117, 118, 119)]
        logits.append(torch.cat(steps, dim=1))
    torch.testing.assert_close(*logits, atol=5e-6, rtol=0)


def test_masks_that_can_be_read():
    mask = torch.rand(2, 3, 5) < 0.5
    assert native_arguments.readable(None, 2, 3, 5)
    assert native_arguments.readable(mask, 2, 3, 5)
    assert not native_arguments.readable(mask, 2, 3, 4)
    assert native_arguments.readable(mask[:1], 2, 3, 5)
    assert native_arguments.readable(mask[:1].expand(2, -1, -1), 2, 3, 5)
    assert not native_arguments.readable(mask, 2, 3, 6)
    assert not native_arguments.readable(mask, 2, 4, 5)
    assert not native_arguments.readable(mask, 3, 3, 5)
    assert not native_arguments.readable(mask.float(), 2, 3, 5)
    assert not native_arguments.readable(mask.transpose(1, 2), 2, 5, 3)


def test_sparse_steps_are_native(monkeypatch):
    """Where a layer has more keys than it reads, choice and attention are both native, each by itself too."""
    called = []
    for name in ("choose_keys", "attend_latents"):
        original = getattr(fused.Kernels, name)
        monkeypatch.setattr(
            fused.Kernels, name, lambda *args, n=name, o=original, **kw: called.append(n) or o(*args, **kw)
        )
    monkeypatch.setattr(decoder_layer, "decode_layer", lambda *_: None)
    model = FathomForCausalLM(FathomConfig.preset("v3.2", index_topk=8, num_nextn_predict_layers=0)).eval()
    assert isinstance(model.model.layers[0].self_attn, DeepseekSparseAttention)
    ids = torch.randint(5, 4000, (1, 21))
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).cache
        called.clear()
        model(ids[:, 20:], cache=cache, use_cache=True)
    assert called == ["choose_keys", "attend_latents"] * 4


@pytest.mark.parametrize("rows", [fused.LARGE // 64, fused.LARGE // 64 - 1], ids=["large", "small"])
def test_large_maps_are_operators_of_a_graph(dtype, rows):
    linear, x, graphs = shuffled(nn.Linear(64, rows, bias=False), dtype), torch.randn(1, 2, 64).to(dtype), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        (found,) = torch.compile(fused.project, fullgraph=True, backend=backend)(x, linear)
        assert_close(found, linear(x), dtype)
    called = [node.target for graph in graphs for node in graph.graph.nodes]
    assert (fused.PROJECT in called) == (rows * 64 >= fused.LARGE)


def test_an_operator_of_the_same_name_is_another():
    schema = "(Tensor x) -> Tensor"
    one, other = (fused.new_operator("some-folder.with dots", "same", schema) for _ in range(2))
    assert one.name() != other.name()


def test_chosen_keys_of_a_text_are_read_natively(monkeypatch):
    torch.manual_seed(0)
    config = FathomConfig.preset("v3.2", num_nextn_predict_layers=0, attn_implementation="sdpa", index_topk=16)
    model, called = FathomForCausalLM(config).eval(), []
    ids, mask = torch.randint(5, 4000, (2, 600)), torch.ones(2, 600, dtype=torch.int64)
    mask[1, :31] = 0
    original = DeepseekSparseAttention.read_part

    def spy(*args):
        called.append(original(*args))
        return called[-1]

    monkeypatch.setattr(DeepseekSparseAttention, "read_part", spy)
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        alone = model(ids[:1]).logits
        assert len(called) >= 2 * config.num_hidden_layers
        assert all(output is not None for output in called)
        monkeypatch.setattr(DeepseekSparseAttention, "read_part", lambda *_: None)
        expected = model(ids, attention_mask=mask).logits
        expected_alone = model(ids[:1]).logits
    # Sums in another order choose another key where two score nearly the same.
    for one, other in ((found[mask == 1], expected[mask == 1]), (alone[0], expected_alone[0])):
        assert ((one - other).abs().amax(dim=-1) < 5e-6).float().mean() > 0.98


def test_choice_of_more_queries_than_there_is_room_for(dtype):
    """All at once and a few at a time, with keys that they do not see."""
    batch, tokens, keys, heads, width, top_k = 2, 300, 9000, 2, 8, 7
    query, index_keys = torch.randn(batch, tokens, heads, width).to(dtype), torch.randn(batch, keys, width).to(dtype)
    x, weight = torch.randn(batch, tokens, 16).to(dtype), torch.randn(heads, 16).to(dtype)
    visible = torch.rand(batch, tokens, keys) < 0.5
    with torch.no_grad():
        kernels = fused.kernels_of(False, query)
        chosen, sees = kernels.choose_keys(query, index_keys, x, weight, visible, top_k)
        for start in range(0, tokens, 60):
            part = slice(start, start + 60)
            some = kernels.choose_keys(
                query[:, part], index_keys, x[:, part].contiguous(), weight, visible[:, part], top_k
            )
            assert torch.equal(some[0], chosen[:, part])
            assert torch.equal(some[1], sees[:, part])
    assert visible.gather(2, chosen).all()
    assert sees.all()


@pytest.mark.parametrize("generation", ["classic", "v3"])
def test_masks_of_single_heads_and_of_other_sizes_are_pytorchs(generation):
    """What native functions would read wrongly, or beyond its end."""
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset(generation, num_nextn_predict_layers=0)).eval()
    ids = torch.randint(5, 4000, (1, 40))
    causal = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    heads = causal.repeat(1, model.config.num_attention_heads, 1, 1)
    heads[:, 1:, :, :20] &= torch.eye(40, dtype=torch.bool)[:, :20]  # the others do not see the beginning
    with torch.no_grad():
        plain = model(ids, attention_mask=causal, use_cache=False).logits
        torch.testing.assert_close(plain, model(ids, use_cache=False).logits, atol=5e-6, rtol=0)
        apart = model(ids, attention_mask=heads, use_cache=False).logits
        assert (apart - plain).abs().max() > 1e-3
        with pytest.raises(RuntimeError):
            model(ids, attention_mask=causal[..., :30], use_cache=False)
        cache = model(ids[:, :39], use_cache=True).cache
        with pytest.raises(RuntimeError):
            model(ids[:, 39:], attention_mask=causal[..., 39:, :30], cache=cache)

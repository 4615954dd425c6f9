"""MLA's two ways of computing the same numbers, its compressed cache, and classic attention against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from transformers import StaticCache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.attention import MultiHeadAttention, MultiHeadLatentAttention
from fathom.modeling.rotary import apply_rotary

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 97,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def mla(attn_implementation: str, **overrides) -> MultiHeadLatentAttention:
    torch.manual_seed(0)
    config = FathomConfig.preset("v3", **{**TINY, **overrides}, attn_implementation=attn_implementation)
    attention = MultiHeadLatentAttention(config, layer_idx=0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attention


def visible(batch: int, new: int, total: int) -> torch.Tensor:
    """Causal mask [B, 1, T, S] of the last `new` of `total` tokens; sequence b starts with b tokens of padding."""
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new).expand(batch, 1, new, total).clone()
    for sequence in range(batch):
        mask[sequence, ..., :sequence] = False
    return mask


@pytest.mark.parametrize(
    ("new", "total", "mask_kind"),
    [
        *((new, total, kind) for new, total in ((1, 9), (4, 9), (9, 9), (2, 33)) for kind in ("boolean", "additive")),
        (1, 9, "none"),  # with more than one query and no mask SDPA is causal and eager is not
    ],
)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_absorbed_equals_expanded(attn_implementation, new, total, mask_kind):
    """Outputs, and gradients with respect to every input and to the matrix that is absorbed."""
    attention = mla(attn_implementation, v_head_dim=24)
    batch, heads = 3, attention.num_heads
    shapes = [(batch, heads, new, 48), (batch, 1, total, 32)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    mask = visible(batch, new, total)
    if mask_kind == "none":
        mask = None
    elif mask_kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    # The row of a query that sees nothing is never used.
    used = torch.ones(batch, new, dtype=torch.bool) if mask is None else visible(batch, new, total).any(-1)[:, 0]
    direction = torch.randn(batch, new, heads * 24) * used[..., None]

    results = []
    for attend in (attention.expanded_attention, attention.absorbed_attention):
        output, _ = attend(*inputs, mask)
        weights = [*inputs, attention.kv_b_proj.weight]
        results.append([output * used[..., None], *torch.autograd.grad((output * direction).sum(), weights)])
    for name, expanded, absorbed in zip(("output", "query", "latents", "kv_b_proj"), *results, strict=True):
        scale = expanded.abs().max().clamp(min=1)
        torch.testing.assert_close(
            absorbed / scale, expanded / scale, atol=2e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("v_head_dim", [8, 48, 64], ids=["narrower", "equal", "wider"])
def test_backends_agree_whatever_the_width_of_values(v_head_dim):
    """SDPA pads values narrower than keys."""
    eager, sdpa = mla("eager", v_head_dim=v_head_dim), mla("sdpa", v_head_dim=v_head_dim)
    inputs = [torch.randn(2, 2, 7, 48), torch.randn(2, 1, 7, 32)]
    mask = visible(2, 7, 7)
    used = mask.any(-1)[:, 0]
    expected, weights = eager.expanded_attention(*inputs, mask)
    output, none = sdpa.expanded_attention(*inputs, mask)
    assert output.shape == (2, 7, 2 * v_head_dim)
    assert weights.shape == (2, 2, 7, 7)
    assert none is None
    torch.testing.assert_close(output[used], expected[used], atol=1e-5, rtol=0)


def test_the_cheaper_way_is_taken():
    """Multiplications per head at DeepSeek-V3's sizes, everything counted, over a cache of 100 000 tokens."""
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(FathomConfig.preset("v3-671b", attn_implementation="sdpa"), 0)
    latent_width, nope, rope, value, cached = 512, 128, 64, 128, 100_000
    decided = {}
    for new in (1, 2, 8, 64, 128, 170, 171, 200, 512, 4096):
        expanding = cached * latent_width * (nope + value) + new * cached * (nope + rope + value)
        absorbing = new * latent_width * (nope + value) + new * cached * (latent_width + rope + latent_width)
        decided[new] = attention.absorbing_pays(new, cached)
        assert decided[new] == (absorbing < expanding), new
    assert decided[170]
    assert not decided[171]


def test_a_training_step_and_other_backends_expand():
    assert mla("sdpa").absorbing_pays(1, 50)
    assert not mla("sdpa").absorbing_pays(1, 1)
    flex = mla("sdpa")
    flex.config._attn_implementation = "flex_attention"
    assert not flex.absorbing_pays(1, 50)


def test_cache_holds_one_latent_and_one_rotary_key_per_token():
    model = FathomForCausalLM(FathomConfig.preset("v3", **{**TINY, "kv_lora_rank": 24, "qk_rope_head_dim": 8})).eval()
    cache = model(torch.randint(3, 97, (3, 11))).cache
    assert len(cache.layers) == 2
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == 3 * 11 * (24 + 8)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("key_heads", [1, 2, 8])
def test_grouped_queries_equal_pytorch(attn_implementation, key_heads):
    config = FathomConfig.preset(
        "classic",
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=key_heads,
        head_dim=8,
        attn_implementation=attn_implementation,
    )
    torch.manual_seed(0)
    attention = MultiHeadAttention(config, layer_idx=0)
    hidden = torch.randn(2, 9, 64)
    query = attention.q_proj(hidden).view(2, 9, 8, 8).transpose(1, 2)
    key = attention.k_proj(hidden).view(2, 9, key_heads, 8).transpose(1, 2)
    value = attention.v_proj(hidden).view(2, 9, key_heads, 8).transpose(1, 2)
    # Query head h reads key head h // (heads per key head).
    shared = [head // (8 // key_heads) for head in range(8)]
    expected = F.scaled_dot_product_attention(query, key[:, shared], value[:, shared], is_causal=True)
    expected = attention.o_proj(expected.transpose(1, 2).flatten(2))
    output, *_ = attention(hidden, None, visible(1, 9, 9))
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation(interleaved):
    """Neighbours: multiplication by e^(i angle) in the complex plane. Halves: as in stock transformers."""
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 4)
    rotated = apply_rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    if interleaved:
        turn = torch.polar(torch.ones_like(angles), angles)[:, None]
        expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    else:
        cos, sin = (torch.cat((part, part), dim=-1) for part in (angles.cos(), angles.sin()))
        expected, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(rotated, expected)


# With these widths a chunk of up to 9 tokens over a cache is absorbed, and a longer one expanded.
BOTH_WAYS = {**TINY, "kv_lora_rank": 48, "qk_nope_head_dim": 8, "v_head_dim": 8}


@torch.no_grad()
@pytest.mark.parametrize("more", [1, 5, 14])
@pytest.mark.parametrize("generation", ["v3", "classic"])
def test_cache_after_beam_reorder_and_crop(generation, more):
    torch.manual_seed(0)
    sizes = BOTH_WAYS if generation == "v3" else {"hidden_size": 64, "vocab_size": 97}
    model = FathomForCausalLM(FathomConfig.preset(generation, **sizes, initializer_range=0.1)).eval()
    first, second = torch.randint(3, 97, (3, 12)), torch.randint(3, 97, (3, more))

    cache = model(first, use_cache=True).cache
    beams = torch.tensor([2, 0, 0])
    cache.reorder_cache(beams)
    continued = model(second, cache=cache).logits
    full = model(torch.cat((first[beams], second), dim=1), use_cache=False).logits
    torch.testing.assert_close(continued, full[:, 12:], atol=1e-5, rtol=0)

    cache.crop(7 - cache.get_seq_length())
    continued = model(second, cache=cache).logits
    full = model(torch.cat((first[beams, :7], second), dim=1), use_cache=False).logits
    torch.testing.assert_close(continued, full[:, 7:], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 7 + more


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("generation", ["v3", "moe"])
def test_a_prompt_into_a_static_cache(generation, attn_implementation):
    """Without padding SDPA gets no mask: the prompt is causal, and the free places behind it are not seen."""
    torch.manual_seed(0)
    sizes = TINY if generation == "v3" else {"hidden_size": 64, "vocab_size": 97, "num_hidden_layers": 2}
    config = FathomConfig.preset(generation, **sizes, initializer_range=0.1, attn_implementation=attn_implementation)
    model = FathomForCausalLM(config).eval()
    tokens = torch.randint(3, 97, (2, 12))
    cache = StaticCache(config=config, max_cache_len=40)
    expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens[:, :9], cache=cache).logits, expected[:, :9], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tokens[:, 9:], cache=cache).logits, expected[:, 9:], atol=1e-5, rtol=0)


def test_rotary_frequencies_stay_in_fp32():
    """In bf16 the angle of position 1000 would be off by radians."""
    model = FathomForCausalLM(FathomConfig.preset("v3", **TINY))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    for convert in (torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.bfloat16)):
        assert torch.equal(convert(model).model.rotary_emb.inv_freq, frequencies)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        assert model.lm_head.weight.dtype in (torch.bfloat16, torch.float16)

"""The plain transformer: hand-worked attention numbers, and the whole model against a float64 reference."""

import math

import torch
import torch.nn.functional as F

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.attention import MultiHeadAttention


def tenths(first: float) -> torch.Tensor:
    """Eight numbers from `first` in steps of 0.1, as a [4, 2] matrix."""
    return torch.tensor([first + i / 10 for i in range(8)], dtype=torch.float64).view(4, 2)


def test_attention_by_hand():
    """softmax(Q K^T / sqrt(2)) V with X = 1..12, W_Q = .1...8, W_K = .9..1.6, W_V = 1.7..2.4, worked by hand.

    Q = X W_Q: row 0 is (1*.1 + 2*.3 + 3*.5 + 4*.7, 1*.2 + 2*.4 + 3*.6 + 4*.8) = (5.0, 6.0); each further row of X
    is 4 larger in every place and adds 4 * (column sums 1.6, 2.0) = (6.4, 8.0).
    K = X W_K: row 0 is (.9 + 2.2 + 3.9 + 6.0, 1.0 + 2.4 + 4.2 + 6.4) = (13.0, 14.0); further rows add 4 * (4.8, 5.2).
    V = X W_V: row 0 is (1.7 + 3.8 + 6.3 + 9.2, 1.8 + 4.0 + 6.6 + 9.6) = (21.0, 22.0); further rows add 4 * (8.0, 8.4).
    """
    config = FathomConfig.preset(
        "classic", hidden_size=4, num_attention_heads=1, head_dim=2, attn_implementation="eager"
    )
    attention = MultiHeadAttention(config, layer_idx=0).double()
    x = torch.arange(1, 13, dtype=torch.float64).view(1, 3, 4)
    w_q, w_k, w_v = tenths(0.1), tenths(0.9), tenths(1.7)
    with torch.no_grad():
        for projection, weight in ((attention.q_proj, w_q), (attention.k_proj, w_k), (attention.v_proj, w_v)):
            projection.weight.copy_(weight.T)

    query = [[5.0, 6.0], [11.4, 14.0], [17.8, 22.0]]
    key = [[13.0, 14.0], [32.2, 34.8], [51.4, 55.6]]
    value = [[21.0, 22.0], [53.0, 55.6], [85.0, 89.2]]
    for projection, expected in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value)):
        torch.testing.assert_close(projection(x)[0], torch.tensor(expected, dtype=torch.float64))

    # Token 0 sees itself. Token 1: scores (11.4*13 + 14*14, 11.4*32.2 + 14*34.8)/sqrt(2) = (344.2, 854.28)/sqrt(2),
    # 360.7 apart, so the softmax puts all but e^-360 on token 1; token 2 likewise on itself.
    mask = torch.full((3, 3), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    attention.o_proj = torch.nn.Identity()
    output, weights, _ = attention(x, None, mask)
    torch.testing.assert_close(weights[0, 0], torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(output[0], torch.tensor(value, dtype=torch.float64))

    # A hundredth of X gives soft weights: token 1's scores differ by (854.28 - 344.2) / 100^2 / sqrt(2) = 0.036068.
    output, weights, _ = attention(x / 100, None, mask)
    difference = 0.051008 / math.sqrt(2)
    later = 1 / (1 + math.exp(-difference))
    torch.testing.assert_close(
        weights[0, 0, 1], torch.tensor([1 - later, later, 0.0], dtype=torch.float64), atol=1e-6, rtol=0
    )
    expected = [(1 - later) * a / 100 + later * b / 100 for a, b in zip(value[0], value[1], strict=True)]
    torch.testing.assert_close(output[0, 1], torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def reference_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, heads: int, layers: int) -> torch.Tensor:
    """The whole model in float64, from the formulas of arXiv 1706.03762, with pre-normalisation by RMSNorm."""

    def norm(x, weight):
        return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    width = weights["model.embed_tokens.weight"].shape[1]
    position = torch.arange(len(tokens), dtype=torch.float64)[:, None]
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    x = weights["model.embed_tokens.weight"][tokens] * math.sqrt(width)
    x = x + torch.stack(((position * frequency).sin(), (position * frequency).cos()), -1).flatten(-2)
    for i in range(layers):
        layer = {name.removeprefix(f"model.layers.{i}."): value for name, value in weights.items()}
        u = norm(x, layer["input_layernorm.weight"])
        q, k, v = ((u @ layer[f"self_attn.{n}_proj.weight"].T).view(len(u), heads, -1).transpose(0, 1) for n in "qkv")
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(
            torch.ones(len(u), len(u)).triu(1) > 0, -torch.inf
        )
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T
        u = norm(x, layer["post_attention_layernorm.weight"])
        x = x + F.relu(u @ layer["mlp.up_proj.weight"].T) @ layer["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def test_logits_equal_float64_reference():
    config = FathomConfig.preset("classic", hidden_size=64, num_hidden_layers=3, vocab_size=97, initializer_range=0.15)
    torch.manual_seed(0)
    model = FathomForCausalLM(config).eval()
    tokens = torch.randint(3, 97, (33,))
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    expected = reference_logits(weights, tokens, config.num_attention_heads, config.num_hidden_layers)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None]).logits[0].double(), expected, atol=1e-4, rtol=0)


def test_decoding_with_cache_equals_prefill():
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset("classic", hidden_size=64, num_hidden_layers=2, vocab_size=97)).eval()
    tokens = torch.randint(3, 97, (2, 20))
    cache, logits = None, []
    with torch.no_grad():
        for token in tokens.split(1, dim=1):
            output = model(token, cache=cache, use_cache=True)
            cache = output.cache
            logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(tokens).logits, atol=1e-5, rtol=0)

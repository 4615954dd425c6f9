"""DeepSeekMoE and V2's routing, where stock transformers has no class or deviates: against float64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.experts import MixtureOfExperts, TopKRouter, expert_balance_loss

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "num_attention_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
}


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def rotate_halves(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D], pairs (i, i + D/2) turned by position * 10000^(-2i/D)."""
    length, _, width = x.shape
    frequency = 10000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.arange(length)[:, None] * frequency)[:, None]
    turned = torch.complex(*x.chunk(2, dim=-1)) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def reference_logits(model: FathomForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """DeepSeekMoE (arXiv 2401.06066, section 3) in float64 for one sequence [T], expert by expert."""
    config = model.config
    weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(config.num_hidden_layers):
        layer = {name.removeprefix(f"model.layers.{i}."): value for name, value in weights.items()}
        u = norm(x, layer["input_layernorm.weight"])
        q, k, v = (
            (u @ layer[f"self_attn.{n}_proj.weight"].T).view(len(u), config.num_attention_heads, -1) for n in "qkv"
        )
        scores = torch.einsum("thd,shd->hts", rotate_halves(q), rotate_halves(k)) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(len(u), len(u)).triu(1) > 0, -torch.inf)
        x = x + torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1) @ layer["self_attn.o_proj.weight"].T
        u = norm(x, layer["post_attention_layernorm.weight"])
        if i < config.first_k_dense_replace:
            x = x + swiglu(u, *(layer[f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")))
            continue
        mixed = swiglu(u, *(layer[f"mlp.shared_experts.{n}_proj.weight"] for n in ("gate", "up", "down")))
        affinity = (u @ layer["mlp.gate.weight"].T).softmax(-1)
        for t in range(len(u)):
            for expert in affinity[t].argsort(descending=True)[: config.num_experts_per_tok]:
                gate, up = layer["mlp.experts.gate_up_proj"][expert].chunk(2)
                down = layer["mlp.experts.down_proj"][expert]
                mixed[t] += affinity[t, expert] * swiglu(u[t], gate, up, down)
        x = x + mixed
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def moe_model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    return FathomForCausalLM(FathomConfig.preset("moe", **{**TINY, "initializer_range": 0.15, **overrides})).eval()


@pytest.mark.parametrize("experts_implementation", ["eager", "sorted_mm", "grouped_mm"])
def test_logits_equal_float64_reference(experts_implementation):
    model = moe_model()
    model.set_experts_implementation(experts_implementation)
    tokens = torch.randint(3, 97, (33,))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0].double()
    torch.testing.assert_close(logits, reference_logits(model, tokens), atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 12]], ids=str)
@pytest.mark.parametrize("generation", ["moe", "v2"])
def test_decoding_with_cache_equals_prefill(generation, chunks):
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset(generation, **TINY, initializer_range=0.15)).eval()
    tokens = torch.randint(3, 97, (2, 20))
    cache, logits = None, []
    for piece in tokens.split(chunks, dim=1):
        output = model(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens, use_cache=False).logits, atol=1e-5, rtol=0)


def route_by_definition(config: FathomConfig, weight: torch.Tensor, x: torch.Tensor) -> dict[int, float]:
    """One token by DeepSeek-V2's code (modeling_deepseek.py, MoEGate), in float64: chosen expert -> weight."""
    logits = (weight.double() @ x.double()).tolist()
    total = sum(math.exp(logit) for logit in logits)
    score = [math.exp(logit) / total for logit in logits]
    allowed = list(range(len(score)))
    if config.topk_method == "group_limited_greedy":
        size = len(score) // config.n_group
        groups = [range(group * size, (group + 1) * size) for group in range(config.n_group)]
        best = sorted(groups, key=lambda group: -max(score[i] for i in group))[: config.topk_group]
        allowed = [i for group in best for i in group]
    chosen = sorted(allowed, key=lambda i: -score[i])[: config.num_experts_per_tok]
    if config.norm_topk_prob and config.num_experts_per_tok > 1:
        return {i: score[i] / sum(score[j] for j in chosen) for i in chosen}
    return {i: score[i] * config.routed_scaling_factor for i in chosen}


@torch.no_grad()
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("groups", [None, (4, 2), (8, 4)], ids=str)
def test_router_by_definition(groups, norm_topk_prob, top_k):
    """`norm_topk_prob` too, which stock's V2 ignores: it normalises instead of scaling."""
    overrides = {"num_experts_per_tok": top_k, "norm_topk_prob": norm_topk_prob, "routed_scaling_factor": 16.0}
    if groups is None:
        # A greedy router looks at no groups, whatever the config says of them.
        overrides |= {"topk_method": "greedy", "n_group": 3, "topk_group": 1}
    else:
        overrides |= {"topk_method": "group_limited_greedy", "n_group": groups[0], "topk_group": groups[1]}
    config = FathomConfig.preset("v2", **{**TINY, **overrides})
    torch.manual_seed(0)
    router = TopKRouter(config)
    torch.nn.init.normal_(router.weight, std=0.3)
    hidden = torch.randn(40, 64)
    _, weights, indices = router(hidden)
    for token in range(40):
        expected = route_by_definition(config, router.weight, hidden[token])
        assert set(indices[token].tolist()) == set(expected)
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(expected[expert], abs=1e-5)


def balance_by_equations(score: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor) -> float:
    """arXiv 2401.06066, eqs 12-14, for one sequence [T, E], [T, K], [T]."""
    real = [t for t in range(len(score)) if mask[t]]
    experts, top_k = score.shape[1], indices.shape[1]
    loss = 0.0
    for i in range(experts):
        chosen = sum(i in indices[t].tolist() for t in real)
        loss += experts / (top_k * len(real)) * chosen * sum(score[t, i].item() for t in real) / len(real)
    return loss


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("seq_aux", [True, False])
def test_expert_balance_loss_by_equations(seq_aux, padded):
    """Counted is where tokens really went, also where groups keep them from their best experts."""
    config = FathomConfig.preset("v2", **TINY, n_group=4, topk_group=2, aux_loss_alpha=0.5, seq_aux=seq_aux)
    torch.manual_seed(0)
    module = MixtureOfExperts(config).train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden, mask = torch.randn(3, 7, 64), torch.ones(3, 7, dtype=torch.bool)
    if padded:
        mask[0, :3] = False
        mask[2, 5:] = False
    _, _, loss = module(hidden, token_mask=mask if padded else None)
    logits, _, indices = module.gate(hidden.flatten(0, 1))
    score, indices = logits.softmax(-1).view(3, 7, -1), indices.view(3, 7, -1)
    if not seq_aux:
        score, indices, mask = score.view(1, 21, -1), indices.view(1, 21, -1), mask.view(1, 21)
    expected = sum(map(balance_by_equations, score, indices, mask)) / len(score)
    assert loss.item() == pytest.approx(0.5 * expected, rel=1e-5)
    assert module.eval()(hidden)[2] is None


def test_expert_balance_loss_falls_when_the_load_evens_out():
    even = torch.full((1, 8, 8), 1 / 8)
    spread = (torch.arange(8)[:, None] + torch.arange(2)) % 8  # every expert gets two of the eight tokens
    assert expert_balance_loss(even, spread[None]).item() == pytest.approx(1.0)
    skewed = torch.tensor([0.44, 0.44, *[0.02] * 6]).expand(1, 8, 8)
    assert expert_balance_loss(skewed, torch.tensor([0, 1]).expand(1, 8, 2)).item() == pytest.approx(4 * 0.88)


@pytest.mark.parametrize("generation", ["moe", "v2"])
def test_both_balance_losses_add_up(generation):
    """`aux_loss_alpha` and `seq_aux_loss_coef` are weights of two losses, each of which can be had alone."""
    losses = {}
    tokens = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    for alpha, coefficient in ((0.3, 0.0), (0.0, 0.2), (0.3, 0.2), (0.0, 0.0)):
        torch.manual_seed(0)
        config = FathomConfig.preset(generation, **TINY, aux_loss_alpha=alpha, seq_aux_loss_coef=coefficient)
        output = FathomForCausalLM(config).train()(tokens, labels=tokens)
        losses[alpha, coefficient] = 0.0 if output.balance_loss is None else output.balance_loss.item()
    assert losses[0.3, 0.2] == pytest.approx(losses[0.3, 0.0] + losses[0.0, 0.2], rel=1e-5)
    assert losses[0.3, 0.0] > 0.3
    assert losses[0.0, 0.2] > 0.2
    assert losses[0.0, 0.0] == 0.0


@pytest.mark.parametrize("generation", ["moe", "v2"])
def test_greedy_routers_have_no_bias(generation):
    """Neither in the checkpoint nor in memory; the load is still counted and reported."""
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset(generation, **TINY)).train()
    assert [name for name in model.state_dict() if "bias" in name] == []
    tokens = torch.randint(3, 97, (2, 20))
    model(tokens, labels=tokens)
    load = model.update_router_bias()
    assert load.shape == (2, 8)
    assert load.sum(dim=1).tolist() == [2 * 20 * 3] * 2
    assert model.update_router_bias().sum() == 0

"""Routing by token id, square-root-softplus scores and clamped SwiGLU, each against its definition."""

import math

import pytest
import torch
import torch.nn.functional as F

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.experts import HashRouter, MixtureOfExperts, TopKRouter, balanced_table
from fathom.modeling.feed_forward import FeedForward

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "vocab_size": 97,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "scoring_func": "sqrtsoftplus",
    "num_hash_layers": 2,
    "first_k_dense_replace": 0,
}


def config(**overrides) -> FathomConfig:
    return FathomConfig.preset("v3", **{**TINY, **overrides})


def model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    return FathomForCausalLM(config(**overrides))


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def table_of(model: FathomForCausalLM, layer: int) -> torch.Tensor:
    return model.model.layers[layer].mlp.gate.tid2eid


@pytest.mark.parametrize(("vocabulary", "top_k", "experts"), [(97, 3, 8), (4096, 4, 16), (64, 8, 8), (5, 2, 8)])
def test_table_is_balanced(vocabulary, top_k, experts):
    table = balanced_table(vocabulary, top_k, experts, seed=0)
    assert table.shape == (vocabulary, top_k)
    assert table.dtype == torch.int64
    assert all(len(set(row)) == top_k for row in table.tolist())
    for block in table.split(experts):
        if len(block) == experts:
            assert block.flatten().bincount(minlength=experts).tolist() == [top_k] * experts
    assert torch.equal(table, balanced_table(vocabulary, top_k, experts, seed=0))
    assert vocabulary == 5 or not torch.equal(table, balanced_table(vocabulary, top_k, experts, seed=1))


def test_tokens_with_zipf_frequencies_load_experts_evenly():
    """Id r is drawn as often as 1 / (r + 10): no expert gets twice or half its share."""
    frequency = 1 / (torch.arange(4096) + 10.0)
    load = torch.zeros(16).index_add(0, balanced_table(4096, 4, 16, 0).flatten(), frequency.repeat_interleave(4))
    share = load / load.mean()
    assert 0.7 < share.min() <= share.max() < 1.4


@pytest.mark.parametrize("kind", [HashRouter, TopKRouter])
def test_weights_by_definition(kind):
    torch.manual_seed(0)
    router = kind(config(routed_scaling_factor=1.5))
    torch.nn.init.normal_(router.weight, std=0.3)
    if kind is HashRouter:
        router.reset_table()
    hidden, ids = torch.randn(20, 64), tokens(1, 20)[0]
    _, weights, indices = router(hidden, ids)
    for token in range(20):
        score = [math.sqrt(math.log1p(math.exp(value))) for value in (router.weight @ hidden[token]).tolist()]
        if kind is HashRouter:
            chosen = router.tid2eid[ids[token]].tolist()
        else:
            chosen = sorted(range(8), key=lambda i, s=score: -s[i])[:3]
        assert set(indices[token].tolist()) == set(chosen)
        for expert, weight in zip(indices[token].tolist(), weights[token].tolist(), strict=True):
            assert weight == pytest.approx(1.5 * score[expert] / sum(score[i] for i in chosen), abs=1e-5)


def test_balance_loss_uses_the_routers_scores():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(config(seq_aux_loss_coef=1.0)).train()
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    hidden = torch.randn(1, 30, 64)
    scores = F.softplus(hidden[0] @ mixture.gate.weight.T).sqrt()
    fraction = torch.zeros(8).index_add(0, scores.topk(3).indices.flatten(), torch.ones(90)) * 8 / 90
    expected = (fraction * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum()
    torch.testing.assert_close(mixture(hidden)[2], expected)


def test_clamped_swiglu():
    settings = config(swiglu_limit=0.5)
    torch.manual_seed(0)
    network, x = FeedForward(settings, 16), 30 * torch.randn(9, 64)
    for gate, up, output in zip(network.gate_proj(x), network.up_proj(x), network(x), strict=True):
        inner = [
            min(g, 0.5) / (1 + math.exp(-min(g, 0.5))) * max(-0.5, min(u, 0.5))
            for g, u in zip(gate.tolist(), up.tolist(), strict=True)
        ]
        torch.testing.assert_close(output, network.down_proj.weight @ torch.tensor(inner))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_expert_implementation_clamps(implementation):
    def output(**overrides):
        ours = model(experts_implementation=implementation, initializer_range=1.0, **overrides).eval()
        return ours.model.layers[2].mlp.experts(hidden, indices, weights)

    torch.manual_seed(0)
    hidden, weights = torch.randn(10, 64), torch.rand(10, 3)
    indices = torch.rand(10, 8).argsort(-1)[:, :3]
    reference = model(experts_implementation="eager", initializer_range=1.0, swiglu_limit=0.5)
    experts = reference.model.layers[2].mlp.experts
    expected = torch.zeros(10, 64)
    for token in range(10):
        for expert, weight in zip(indices[token], weights[token], strict=True):
            gate, up = (experts.gate_up_proj[expert] @ hidden[token]).chunk(2)
            inner = F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
            expected[token] += weight * (experts.down_proj[expert] @ inner)
    torch.testing.assert_close(output(swiglu_limit=0.5), expected, atol=1e-4, rtol=1e-4)
    assert (output() - expected).abs().max() > 1


def test_layers_have_tables_of_their_own_and_keep_them(tmp_path):
    saved = model()
    assert not torch.equal(table_of(saved, 0), table_of(saved, 1))
    assert isinstance(saved.model.layers[2].mlp.gate, TopKRouter)
    table_of(saved, 0).copy_(table_of(saved, 0).flip(0))
    saved.save_pretrained(tmp_path)
    loaded = FathomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for layer in (0, 1):
        assert table_of(loaded, layer).dtype == torch.int64
        assert torch.equal(table_of(loaded, layer), table_of(saved, layer))


def test_only_the_id_decides():
    """The same ids in other places of other texts go to the same experts, and their gates still learn."""
    ours = model().train()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    gate = ours.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, inputs, output: seen.append((inputs[1], output[2])))
    ours(tokens(2, 20), labels=tokens(2, 20)).loss.backward()
    ours(tokens(3, 11))
    for ids, indices in seen:
        assert torch.equal(indices, table_of(ours, 1)[ids])
    assert gate.weight.grad.any()


def test_embeddings_need_their_ids():
    ours, ids = model().eval(), tokens()
    embeds = ours.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="pass input_ids along with inputs_embeds"):
        ours(inputs_embeds=embeds)
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        ours()


@pytest.mark.parametrize("size", [130, 60])
def test_resizing_the_vocabulary_resizes_the_tables(size):
    ours = model().eval()
    before = [table_of(ours, layer).clone() for layer in (0, 1)]
    ours.resize_token_embeddings(size)
    for layer in (0, 1):
        table = table_of(ours, layer)
        assert len(table) == size
        assert torch.equal(table[: min(size, 97)], before[layer][: min(size, 97)])
        assert all(len(set(row)) == 3 for row in table.tolist())
    assert ours(torch.tensor([[size - 1, 5]])).logits.shape == (1, 2, size)


def test_bias_moves_where_there_is_one():
    ours = model().train()
    counts = ours(tokens(), labels=tokens()).expert_counts
    assert counts.shape == (4, 8)  # two hash layers, one routed, one MTP layer
    assert torch.equal(ours.update_router_bias(), counts)
    for layer in (2, 3):
        assert ours.model.layers[layer].mlp.gate.e_score_correction_bias.any()

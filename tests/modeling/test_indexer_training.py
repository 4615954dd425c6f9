"""How indexers learn: their loss by definition, who feels it, and that it teaches them to choose.

Small dsa and csa models whose queries see several times more keys than are selected.
"""

import math

import pytest
import torch
from torch import nn

from fathom import FathomConfig, FathomForCausalLM, FathomForSequenceClassification
from fathom.modeling.indexing import REPORT, head_summed_attention, indexer_report

LENGTH = 48
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.1,
}
KINDS = {
    "v3.2": {"kv_lora_rank": 16, "index_topk": 6, "index_head_dim": 16},
    "v4": {
        "token_mixers": ["csa", "csa", "swa"],
        "sliding_window": 5,
        "index_topk": 3,
        "head_dim": 16,
        "o_lora_rank": 16,
        "num_hash_layers": 0,
    },
}


def model(generation: str, **overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    config = FathomConfig.preset(generation, **{**COMMON, **KINDS[generation], **overrides})
    return FathomForCausalLM(config)


def tokens(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (batch, LENGTH), generator=torch.Generator().manual_seed(seed))


def indexers(trained: nn.Module) -> set[str]:
    return {name for name, _ in trained.named_parameters() if ".indexer." in name}


def gradients(trained: FathomForCausalLM, **inputs) -> dict[str, torch.Tensor | None]:
    trained.zero_grad()
    trained(**inputs).loss.backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in trained.named_parameters()}


def example(seed: int = 0):
    """Scores, what is visible (causal, a row of padding before), the best three, and attention weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 7, 7, generator=generator)
    visible = torch.ones(1, 7, 7, dtype=torch.bool).tril()
    visible[:, :, 0] = False
    query, keys = torch.randn(1, 2, 7, 5, generator=generator), torch.randn(1, 1, 7, 5, generator=generator)
    selected = torch.zeros_like(visible)
    for t in range(7):
        seen = [s for s in range(7) if visible[0, t, s]]
        for s in sorted(seen, key=lambda s: -scores[0, t, s].item())[:3]:
            selected[0, t, s] = True
    return scores, visible, selected, query, keys


def weights_by_definition(query, keys, t: int, seen: list[int], scaling: float, sinks=None) -> dict[int, float]:
    """Attention weights of query t on the keys `seen`, summed over the heads, in float64."""
    sums = dict.fromkeys(seen, 0.0)
    for h in range(query.shape[1]):
        logits = {s: (query[0, h, t].double() @ keys[0, 0, s].double()).item() * scaling for s in seen}
        total = sum(math.exp(logit) for logit in logits.values())
        total += 0.0 if sinks is None else math.exp(sinks[h].item())
        for s in seen:
            sums[s] += math.exp(logits[s]) / total
    return sums


@pytest.mark.parametrize("dense", [False, True])
def test_every_figure_by_definition(dense):
    scores, visible, selected, query, keys = example()
    scaling = 0.5

    def attention(attended):
        return head_summed_attention(query, keys, attended, scaling)

    report = indexer_report(scores, visible, selected, attention, dense, measure=True, top_k=3)
    figures = dict(zip(REPORT, report, strict=True))
    for t in range(7):
        seen = [s for s in range(7) if visible[0, t, s]]
        chosen = [s for s in seen if selected[0, t, s]]
        domain = seen if dense else chosen
        p = weights_by_definition(query, keys, t, domain, scaling)
        p = {s: value / sum(p.values()) for s, value in p.items()}
        total = sum(math.exp(scores[0, t, s]) for s in domain)
        kl = sum(p[s] * math.log(p[s] / (math.exp(scores[0, t, s]) / total)) for s in domain)
        assert figures["loss"][0, t].item() == pytest.approx(kl, abs=1e-5)
        if len(seen) <= 3:
            assert all(figures[name][0, t] == 0 for name in REPORT[1:])
            continue
        everything = weights_by_definition(query, keys, t, seen, scaling)
        share = {s: value / sum(everything.values()) for s, value in everything.items()}
        best = sorted(seen, key=lambda s: -share[s])[:3]
        recent = seen[-3:]
        expected = {
            "chooses": 1,
            "recall": len(set(best) & set(chosen)) / 3,
            "mass": sum(share[s] for s in chosen),
            "recent_recall": len(set(best) & set(recent)) / 3,
            "recent_mass": sum(share[s] for s in recent),
            "random": 3 / len(seen),
        }
        assert {name: figures[name][0, t].item() for name in expected} == pytest.approx(expected, abs=1e-5)


def test_attention_with_sinks_by_definition(monkeypatch):
    monkeypatch.setattr("fathom.modeling.indexing.PRODUCTS_AT_ONCE", 2 * 7 * 2)  # two queries at a time
    _, visible, _, query, keys = example()
    sinks = torch.tensor([0.3, -1.0])
    found = head_summed_attention(query, keys, visible, 0.5, sinks)
    for t in range(7):
        seen = [s for s in range(7) if visible[0, t, s]]
        expected = weights_by_definition(query, keys, t, seen, 0.5, sinks)
        assert [found[0, t, s].item() for s in range(7)] == pytest.approx([expected.get(s, 0.0) for s in range(7)])


@pytest.mark.parametrize("generation", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_target_is_the_attention_of_the_layer(generation, implementation):
    """The eager weights of a dense layer, summed over the heads, are what the report's attention is made of."""
    trained = model(generation, index_dense=True, attn_implementation="eager").eval()
    ids = tokens(1)
    attentions = trained(ids, output_attentions=True).attentions
    seen = []
    mixers = [layer.self_attn for layer in trained.model.layers[:2]]
    trained.set_attn_implementation(implementation)
    import fathom.modeling.compressed_attention as compressed
    import fathom.modeling.sparse_attention as sparse

    def watched(*arguments, **options):
        found = head_summed_attention(*arguments, **options)
        seen.append(found)
        return found

    module = sparse if generation == "v3.2" else compressed
    original = module.head_summed_attention
    module.head_summed_attention = watched
    try:
        trained(ids, labels=ids)
    finally:
        module.head_summed_attention = original
    assert len(mixers) == 2
    for weights, found in zip(attentions, seen, strict=False):
        torch.testing.assert_close(found, weights.sum(dim=1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("generation", KINDS)
def test_gradients_reach_every_parameter(generation, checkpointing):
    trained = model(generation).train()
    plain = gradients(trained, input_ids=tokens(), labels=tokens())
    assert [name for name, gradient in plain.items() if gradient is None or not gradient.any()] == []
    if checkpointing is not None:
        trained.activation_checkpointing_enable({"use_reentrant": checkpointing})
        torch.testing.assert_close(gradients(trained, input_ids=tokens(), labels=tokens()), plain)


@pytest.mark.parametrize("generation", KINDS)
def test_only_the_indexers_feel_their_loss_and_nothing_else(generation):
    inputs = {"input_ids": tokens(), "labels": tokens()}
    of_coefficient = {
        coefficient: gradients(model(generation, indexer_loss_coef=coefficient).train(), **inputs)
        for coefficient in (0.0, 1.0, 2.0)
    }
    for name, gradient in of_coefficient[1.0].items():
        if ".indexer." in name:
            assert of_coefficient[0.0][name] is None
            torch.testing.assert_close(of_coefficient[2.0][name], 2 * gradient)
        else:
            assert torch.equal(of_coefficient[0.0][name], gradient)
            assert torch.equal(of_coefficient[2.0][name], gradient)


@pytest.mark.parametrize("generation", KINDS)
def test_accumulation_and_padding_do_not_change_the_gradient(generation):
    trained = model(generation, seq_aux_loss_coef=0.0).train()
    ids = tokens(4)
    labels = ids.clone()
    labels[0, :20] = labels[2, 30:] = -100
    count = int((labels[:, 1:] != -100).sum())
    whole = gradients(trained, input_ids=ids, labels=labels, num_items_in_batch=count)
    parts = [
        gradients(trained, input_ids=ids[rows], labels=labels[rows], num_items_in_batch=count)
        for rows in ([0], [1, 2], [3])
    ]
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), gradient, atol=1e-6, rtol=1e-4)

    padded = torch.cat((torch.full((4, 9), 2), ids), dim=1)
    mask = (torch.arange(LENGTH + 9) >= 9).long().expand(4, -1)
    padded_labels = torch.cat((torch.full((4, 9), -100), labels), dim=1)
    with_padding = gradients(
        trained, input_ids=padded, attention_mask=mask, labels=padded_labels, num_items_in_batch=count
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(with_padding[name], gradient, atol=1e-5, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("generation", KINDS)
def test_packed_documents_are_as_if_alone(generation):
    trained = model(generation).eval()
    ids = tokens(1)
    positions = torch.tensor([[*range(30), *range(18)]])
    labels = ids.clone()
    labels[:, [0, 30]] = -100

    def figures(**inputs) -> dict[str, torch.Tensor]:
        return trained(num_items_in_batch=1, **inputs).indexer_figures

    packed = figures(input_ids=ids, labels=labels, position_ids=positions)
    alone = [figures(input_ids=ids[:, part], labels=labels[:, part]) for part in (slice(0, 30), slice(30, None))]
    # The MTP layer's last targets of the first document lie in the next one; only the main layers are compared in V4,
    # whose MTP layer has no indexer.
    if generation == "v4":
        for name in REPORT:
            torch.testing.assert_close(packed[name], alone[0][name] + alone[1][name], atol=1e-4, rtol=1e-4)
    else:
        assert packed["loss"] == pytest.approx((alone[0]["loss"] + alone[1]["loss"]).item(), rel=0.02)


@pytest.mark.parametrize("generation", KINDS)
def test_a_dense_model_attends_to_everything(generation):
    dense = model(generation, index_dense=True).eval()
    all_selected = model(generation, index_topk=LENGTH).eval()
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens()).logits, all_selected(tokens()).logits)
        assert not torch.allclose(dense(tokens()).logits, model(generation).eval()(tokens()).logits, atol=1e-3)


@pytest.mark.parametrize("generation", KINDS)
def test_a_warm_up_teaches_the_indexers_to_choose(generation):
    trained = model(generation, index_dense=True)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)

    @torch.no_grad()
    def figures() -> dict[str, float]:
        found = trained.eval()(tokens(8, seed=99), labels=tokens(8, seed=99)).indexer_figures
        choices = found["chooses"]
        return {name: (found[name] / (1 if name == "loss" else choices)).item() for name in REPORT}

    before = figures()
    for step in range(60):
        trained.train()
        trained(tokens(8, seed=step), labels=tokens(8, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = figures()
    assert after["loss"] < 0.75 * before["loss"]
    assert after["recall"] > before["recall"] + 0.1
    assert after["mass"] > before["mass"]
    # What attention does, and so what a blind choice gets of it, is the same: the trunk was frozen.
    for name in ("random", "recent_recall", "recent_mass"):
        assert after[name] == before[name]


@pytest.mark.parametrize("generation", KINDS)
def test_frozen_where_no_loss_reaches_them(generation, tmp_path):
    for coefficient in (0.0, 1.0):
        trained = model(generation, indexer_loss_coef=coefficient)
        trained.save_pretrained(tmp_path / str(coefficient))
        loaded = FathomForCausalLM.from_pretrained(tmp_path / str(coefficient))
        for each in (trained, loaded):
            frozen = {name for name, p in each.named_parameters() if not p.requires_grad}
            assert frozen == (indexers(each) if coefficient == 0 else set())
    for classifier in (
        FathomForSequenceClassification(trained.config),
        FathomForSequenceClassification.from_pretrained(tmp_path / "1.0"),
    ):
        assert {name for name, p in classifier.named_parameters() if not p.requires_grad} == indexers(classifier)

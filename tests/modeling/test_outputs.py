"""What every generation returns: recorded states, weights and router logits, chosen logits, embeddings as input."""

import pytest
import torch
import torch.nn.functional as F

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.experts import ExpertRouter, HashRouter

GENERATIONS = ["classic", "moe", "v2", "v3", "v3.2", "v4"]
DEPTHS = 2


def model(generation: str, attn_implementation: str = "sdpa") -> FathomForCausalLM:
    """Two layers of every kind that the generation has, and two MTP layers behind them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 97}
    overrides = {**sizes, "index_topk": 6, "num_nextn_predict_layers": DEPTHS, "initializer_range": 0.15}
    if generation == "v4":
        overrides |= {"token_mixers": ["swa", "csa", "hca", *["swa"] * DEPTHS], "compress_rate_hca": 8}
    config = FathomConfig.preset(generation, **overrides, attn_implementation=attn_implementation)
    return FathomForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def layer_inputs(ours: FathomForCausalLM) -> list[torch.Tensor]:
    """What every layer, MTP layers too, will be called with: an oracle independent of transformers' recorder."""
    seen: list[torch.Tensor] = []
    for layer in ours.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


@torch.no_grad()
@pytest.mark.usefixtures("long_texts")
@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_hidden_states(generation, with_labels):
    """Before every layer, and after the final norm; with several streams all of them. None of the MTP layers."""
    ours, ids = model(generation), tokens()
    seen = layer_inputs(ours)
    outputs = ours(ids, labels=ids if with_labels else None, output_hidden_states=True)
    states = outputs.hidden_states
    assert len(states) == 3 + 1
    assert len(seen) == 3 + DEPTHS * with_labels
    for got, expected in zip(states[:-1], seen, strict=False):
        assert torch.equal(got, expected)
    assert torch.equal(ours.lm_head(states[-1]), outputs.logits)
    streams = ours.config.hc_mult
    assert states[0].shape == ((2, 20, streams, 64) if streams > 1 else (2, 20, 64))


@torch.no_grad()
@pytest.mark.parametrize(("chosen", "kept"), [(-1, {3}), (1, {1}), ([0, 2], {0, 2}), ([-2, 3], {2, 3})], ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_some_hidden_states(generation, chosen, kept):
    ours, ids = model(generation), tokens()
    everything = ours(ids, output_hidden_states=True).hidden_states
    some = ours(ids, labels=ids, output_hidden_states=chosen).hidden_states
    assert len(some) == 4
    for index, (got, expected) in enumerate(zip(some, everything, strict=True)):
        assert torch.equal(got, expected) if index in kept else got is None


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_attention_weights(generation):
    """Causal distributions; with a sink less than one. Decoding records the same as reading at once."""
    ours, ids = model(generation, "eager"), tokens()
    outputs = ours(ids, labels=ids, output_attentions=True)
    assert len(outputs.attentions) == 3
    for weights in outputs.attentions:
        past = weights[..., :20]  # before any entries
        assert past.shape == (2, 2, 20, 20)
        assert torch.equal(past, past.tril())
        assert (past.diagonal(dim1=-2, dim2=-1) > 0).any()
        total = weights.sum(dim=-1)
        if generation == "v4":
            assert (total < 1).all()
        else:
            torch.testing.assert_close(total, torch.ones_like(total))
    cache = ours(ids[:, :19]).cache
    decoded = ours(ids[:, 19:], cache=cache, output_attentions=True).attentions
    for weights, single in zip(outputs.attentions, decoded, strict=True):
        # A window's cache forgets tokens that are no longer seen, so compare the weights that are not 0.
        for row in range(2):
            for head in range(2):
                last, newest = weights[row, head, -1], single[row, head, 0]
                torch.testing.assert_close(newest[newest > 0], last[last > 0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_router_logits(generation):
    """One [N, E] per layer with experts. They are what the experts were chosen by, as the counts tell."""
    ours, ids = model(generation), tokens()
    outputs = ours(ids, labels=ids, output_router_logits=True)
    routers = [m for layer in ours.model.layers[:3] for m in layer.modules() if isinstance(m, ExpertRouter)]
    assert len(outputs.router_logits) == len(routers)
    assert bool(routers) == (generation != "classic")
    for index, (router, logits) in enumerate(zip(routers, outputs.router_logits, strict=True)):
        indices = router.choose(router.affinities(logits), ids.flatten())
        counts = F.one_hot(indices, router.num_experts).sum(dim=(0, 1))
        assert torch.equal(counts, outputs.expert_counts[index].long())
        assert isinstance(router, HashRouter) or not torch.equal(logits[0], logits[1])


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_nothing_is_recorded_unasked(generation):
    outputs = model(generation)(tokens())
    assert outputs.hidden_states is outputs.attentions is outputs.router_logits is None


@torch.no_grad()
@pytest.mark.parametrize("keep", [1, 3, 20, [0, 5], [19]], ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_to_keep(generation, keep):
    ours, ids = model(generation), tokens()
    logits = ours(ids).logits
    expected = logits[:, keep] if isinstance(keep, list) else logits[:, -keep:]
    kept = ours(ids, logits_to_keep=torch.tensor(keep) if isinstance(keep, list) else keep).logits
    torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_embeddings_instead_of_ids(generation, training):
    """The same logits and losses, and a gradient at all but the last token; where ids choose experts, with the ids."""
    ours, ids = model(generation).train(training), tokens()
    needs_ids = any(isinstance(module, HashRouter) for module in ours.modules())
    embeds = ours.get_input_embeddings()(ids).detach().requires_grad_()
    by_ids = ours(ids, labels=ids)
    by_embeds = ours(ids if needs_ids else None, inputs_embeds=embeds, labels=ids)
    for name in ("logits", "loss", "mtp_loss"):
        assert torch.equal(by_ids[name], by_embeds[name])
    by_embeds.loss.backward()
    assert (embeds.grad[:, :-1] != 0).any(dim=-1).all()
    wrong = {"inputs_embeds": embeds} if needs_ids else {"input_ids": ids, "inputs_embeds": embeds}
    for options in (wrong, {}):
        with pytest.raises(ValueError, match="input"):
            ours(**options)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_checkpointing_changes_nothing(generation, use_reentrant):
    """Loss, gradients and load of two micro-batches, MTP layers included, to the last bit; nothing counts twice."""
    results = []
    for checkpointing in (False, True):
        trained = model(generation).train()
        if checkpointing:
            trained.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        losses = []
        for length in (20, 14):
            outputs = trained(tokens(2, length), labels=tokens(2, length), output_router_logits=True)
            outputs.loss.backward()
            losses.append(outputs.loss.detach())
            assert len(outputs.router_logits) == sum(
                isinstance(m, ExpertRouter) for layer in trained.model.layers[:3] for m in layer.modules()
            )
        routers = [module for module in trained.modules() if isinstance(module, ExpertRouter)]
        # A graph held by the load would hold the activations of the whole accumulation.
        assert not any(router.expert_load.requires_grad for router in routers)
        for router in routers[: len(routers) - DEPTHS]:
            assert router.expert_load.sum() == 2 * (20 + 14) * router.top_k
        gradients = {name: p.grad for name, p in trained.named_parameters() if p.requires_grad}
        load = trained.update_router_bias()
        results.append((*losses, *gradients.values(), *([] if load is None else [load])))
    for plain, checkpointed in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed)

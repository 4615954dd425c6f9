"""What both indexers share: weights in fp32 whatever runs around them, and how far rounding moves a score."""

import pytest
import torch
from accelerate import cpu_offload

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import compressor, indexing, sparse_attention
from fathom.modeling.compressor import Indexer
from fathom.modeling.sparse_attention import LightningIndexer

MODULES = {"v3.2": sparse_attention, "v4": compressor}


def model(generation: str) -> FathomForCausalLM:
    torch.manual_seed(0)
    config = FathomConfig.preset(
        generation, hidden_size=64, num_attention_heads=2, vocab_size=97, index_topk=4, initializer_range=0.15
    )
    return FathomForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("generation", MODULES)
def test_weights_are_computed_in_fp32_under_autocast(generation, monkeypatch):
    """Exactly those of the hidden states they are given: bf16 would round them to 8 bits."""
    calls = []

    def spy(projection, hidden_states, head_dim):
        weights = indexing.head_weights(projection, hidden_states, head_dim)
        calls.append((projection, hidden_states, head_dim, weights))
        return weights

    monkeypatch.setattr(MODULES[generation], "head_weights", spy)
    ours = model(generation)
    indexers = [module for module in ours.modules() if isinstance(module, LightningIndexer | Indexer)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours(torch.randint(3, 97, (2, 40)), use_cache=False)
    assert 0 < len(calls) <= len(indexers)
    for projection, hidden_states, head_dim, weights in calls:
        heads = projection.out_features
        exact = hidden_states.double() @ projection.weight.double().T / (heads * head_dim) ** 0.5
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "width", "keys"), [(1, 8, 40), (4, 32, 60), (64, 128, 300)])
def test_one_query_and_many_have_the_same_scores(heads, width, keys):
    """Up to the rounding of a sum; more than that comes from the hidden states of prefill and decoding."""
    torch.manual_seed(0)
    query, key = torch.randn(1, heads, 50, width), torch.randn(1, keys, width)
    weights = torch.randn(1, 50, heads) * (heads * width) ** -0.5
    together = indexing.index_scores(query, key, weights)
    one_by_one = [indexing.index_scores(query[:, :, t, None], key, weights[:, t, None]) for t in range(50)]
    torch.testing.assert_close(torch.cat(one_by_one, dim=1), together, atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.usefixtures("long_texts")
@pytest.mark.parametrize("generation", MODULES)
def test_offloaded_weights_are_computed_with(generation):
    """An offloaded module has its weight only while it is called; read from outside, the choice would be silly."""
    ours, ids = model(generation), torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = ours(ids, use_cache=False).logits
    offloaded = cpu_offload(ours, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(offloaded(ids, use_cache=False).logits, expected)

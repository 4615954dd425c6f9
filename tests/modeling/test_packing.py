"""Packed documents have the logits they have alone."""

import pytest
import torch

from fathom import FathomConfig, FathomForCausalLM

ROWS = [[7, 1, 12, 5], [25], [1, 1, 2, 21]]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("generation", ["v4", "v3.2", "v3", "v2", "moe", "classic"])
@pytest.mark.usefixtures("host_reads")
def test_packed_documents_equal_documents_alone(generation, attn_implementation, training):
    """With the defaults of a plain forward: no attention mask, and in evaluation a cache is made."""
    torch.manual_seed(0)
    config = FathomConfig.preset(
        generation,
        hidden_size=64,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=97,
        initializer_range=0.15,
        index_topk=6,
        attn_implementation=attn_implementation,
    )
    assert config.use_cache
    model = FathomForCausalLM(config).train(training)
    tokens = torch.randint(3, 97, (len(ROWS), 25))
    positions = torch.tensor([[position for length in row for position in range(length)] for row in ROWS])
    with torch.no_grad():
        packed = model(tokens, position_ids=positions)
        assert (packed.cache is None) == training
        for row, lengths in enumerate(ROWS):
            for document, logits in zip(tokens[row].split(lengths), packed.logits[row].split(lengths), strict=True):
                alone = model(document[None]).logits[0]
                torch.testing.assert_close(logits, alone, atol=1e-5, rtol=0)


def test_packing_matters_in_this_test():
    """Without restarted positions the second document does see the first: the test above can fail."""
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset("v3", hidden_size=64, vocab_size=97, initializer_range=0.15)).eval()
    tokens = torch.randint(3, 97, (1, 20))
    with torch.no_grad():
        difference = model(tokens).logits[0, 8:] - model(tokens[:, 8:]).logits[0]
    assert difference.abs().max() > 0.1


@pytest.mark.usefixtures("host_reads")
def test_gradients_stay_within_a_document():
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.preset("v3", hidden_size=64, vocab_size=97)).train()
    embeds = torch.randn(1, 20, model.config.hidden_size, requires_grad=True)
    positions = torch.tensor([[*range(8), *range(12)]])
    model(inputs_embeds=embeds, position_ids=positions).logits[:, 8:].square().sum().backward()
    assert torch.equal(embeds.grad[:, :8], torch.zeros_like(embeds.grad[:, :8]))
    assert (embeds.grad[:, 8:] != 0).any(dim=-1).all()

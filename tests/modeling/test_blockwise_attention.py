"""Causal attention in blocks of queries against the definition, and where it is not called."""

import pytest
import torch

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import attention
from fathom.modeling.blockwise_attention import BLOCK, causal_attention, serves

SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 97}


def inputs(tokens: int, dtype: torch.dtype, value_width: int = 24) -> list[torch.Tensor]:
    """Queries, keys, and values that stand beside something else, as those of MLA do."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, tokens, 16, dtype=dtype), torch.randn(2, tokens, 3, 16, dtype=dtype).transpose(1, 2)
    value = torch.randn(2, tokens, 3, value_width + 8, dtype=dtype).transpose(1, 2)[..., 8:]
    return [each.requires_grad_() for each in (query, key, value)]


def definition(query, key, value, scaling) -> torch.Tensor:
    scores = scaling * query @ key.transpose(-1, -2)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_definition(blocks, dtype) -> None:
    ours, exact = inputs(blocks * BLOCK, dtype), inputs(blocks * BLOCK, dtype)
    direction = torch.randn(2, blocks * BLOCK, 3, 24, dtype=torch.float64)
    assert serves(*ours)
    output = causal_attention(*ours, 0.3)
    found = [output, *torch.autograd.grad(output, ours, direction.to(dtype))]
    exact = [each.detach().double().requires_grad_() for each in exact]
    output = definition(*exact, 0.3)
    expected = [output, *torch.autograd.grad(output, exact, direction)]
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]


def test_under_autocast_products_are_in_its_dtype() -> None:
    ours = inputs(BLOCK, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = causal_attention(*ours, 0.3)
    assert output.dtype is torch.bfloat16
    gradients = torch.autograd.grad(output.sum(), ours)
    assert all(each.dtype is torch.float32 for each in gradients)
    torch.testing.assert_close(output.float(), definition(*ours, 0.3), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("generation", ["classic", "v3"])
def test_it_serves_unmasked_rows_in_training_alone(generation, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        attention, "causal_attention", lambda *args: calls.append(args[0].shape) or causal_attention(*args)
    )

    def served(tokens: int = BLOCK, training: bool = True, rows: dict | None = None, **settings) -> bool:
        calls.clear()
        torch.manual_seed(0)
        model = FathomForCausalLM(FathomConfig.preset(generation, **SIZES, **settings)).train(training)
        model(torch.randint(3, 97, (2, tokens)), **(rows or {}))
        return bool(calls)

    assert served()
    padding = torch.ones(2, BLOCK, dtype=torch.long)
    padding[0, :5] = 0
    documents = torch.cat((torch.arange(50), torch.arange(BLOCK - 50))).repeat(2, 1)
    assert not served(training=False)
    assert not served(BLOCK + 1)
    assert not served(rows={"attention_mask": padding})
    assert not served(rows={"position_ids": documents})
    assert not served(attention_dropout=0.1)
    assert not served(attn_implementation="eager")
    assert not served(rows={"is_causal": False})


def test_a_compiled_graph_has_pytorchs_attention(monkeypatch) -> None:
    query, key, value = inputs(BLOCK, torch.float32)
    found = torch.compile(lambda *each: torch.tensor(serves(*each)), backend="eager", fullgraph=True)(query, key, value)
    assert serves(query, key, value)
    assert not found

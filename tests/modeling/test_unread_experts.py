"""Experts whose tokens nobody counts: against the loop over experts, in float64, however the tokens are spread."""

import pytest
import torch
import torch.nn.functional as F
from device import reads
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import FathomConfig
from fathom.modeling import unread_experts
from fathom.modeling.experts import RoutedExperts
from fathom.modeling.unread_experts import in_blocks, mix_unread

EXPERTS = 8


def experts(inner: int = 16, width: int = 24, dtype: torch.dtype = torch.float64, **overrides) -> RoutedExperts:
    torch.manual_seed(0)
    shape = {"moe_intermediate_size": inner, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_group": 1}
    config = FathomConfig.preset("v3", **shape, topk_group=1, experts_implementation="eager", **overrides)
    config.hidden_size = width
    module = RoutedExperts(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def spread(kind: str, tokens: int) -> torch.Tensor:
    """Two experts of each token."""
    generator = torch.Generator().manual_seed(tokens)
    if kind == "all alike":
        return torch.tensor([3, 5]).expand(tokens, 2)
    if kind == "even":
        return torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
    last = EXPERTS if kind == "any" else 5  # some get none
    return torch.stack([torch.randperm(last, generator=generator)[:2] for _ in range(tokens)])


def both(module: RoutedExperts, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> list[list]:
    results = []
    for mix in (module, lambda *tensors: mix_unread(module, *tensors, hidden.dtype)):
        inputs = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
        with reads() as found:
            output = mix(inputs[0], indices, inputs[1])
            gradients = torch.autograd.grad(output.square().sum(), [*inputs, *module.parameters()])
        results.append([output, *gradients])
    assert found == []
    return results


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("widths", [(16, 24), (5, 13)], ids=str)
@pytest.mark.parametrize("kind", ["any", "even", "all alike", "of five"])
@pytest.mark.parametrize("tokens", [1, 3, 8, 60, 257])
def test_output_and_gradients_equal_the_loop(tokens, kind, widths, limit):
    module = experts(*widths, swiglu_limit=limit)
    hidden, weights = torch.randn(tokens, widths[1]).double(), torch.rand(tokens, 2).double()
    expected, got = both(module, hidden, spread(kind, tokens), weights)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("tokens", [1, 8, 60])
def test_groups_in_bf16(tokens):
    module, indices = experts(dtype=torch.bfloat16), spread("of five", tokens)
    hidden, weights = torch.randn(tokens, 24).bfloat16(), torch.rand(tokens, 2).bfloat16()
    assert unread_experts.groups_without_waiting(module, torch.bfloat16)
    expected, got = both(module, hidden, indices, weights)
    for one, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, one, atol=0.02 * one.abs().max().item(), rtol=0.02)


def test_what_is_multiplied_in_groups(monkeypatch):
    """bf16 on devices that take it, under autocast too, and in rows of whole 16 bytes."""
    module, odd = experts(dtype=torch.float32), experts(5, 13, dtype=torch.float32)
    assert not unread_experts.groups_without_waiting(module, torch.float32)
    assert not unread_experts.groups_without_waiting(odd, torch.bfloat16)
    products, group = [], F.grouped_mm
    monkeypatch.setattr(
        F, "grouped_mm", lambda x, w, offs: products.append((x.dtype, w.dtype)) or group(x, w, offs=offs)
    )
    output = mix_unread(module, torch.randn(4, 24), spread("any", 4), torch.rand(4, 2), torch.bfloat16)
    assert products == [(torch.bfloat16, torch.bfloat16)] * 2
    assert output.dtype is torch.float32


def test_tokens_of_other_processes_add_nothing():
    """Expert parallelism marks them by an index beyond the last expert."""
    module, hidden = experts(), torch.randn(9, 24).double()
    indices, weights = spread("any", 9), torch.rand(9, 2).double()
    elsewhere = torch.rand(9, 2) > 0.5
    expected = module(hidden, indices, weights.masked_fill(elsewhere, 0))
    module._is_expert_parallel = True
    got = mix_unread(module, hidden, indices.masked_fill(elsewhere, EXPERTS), weights, torch.float64)
    torch.testing.assert_close(got, expected)


def test_no_tokens():
    module = experts()
    output = mix_unread(
        module, torch.zeros(0, 24).double(), torch.zeros(0, 2).long(), torch.zeros(0, 2).double(), torch.float64
    )
    assert output.shape == (0, 24)
    output.sum().backward()
    assert not module.down_proj.grad.any()


@settings(deadline=None)
@given(st.lists(st.integers(0, EXPERTS), min_size=1, max_size=200))
def test_every_block_is_of_one_expert(chosen):
    """And there is room for every slot, whoever gets how many."""
    layout = in_blocks(torch.tensor(chosen), EXPERTS)
    assert len(set(layout.place.tolist())) == len(chosen)
    assert min(layout.place.tolist()) >= 0
    assert max(layout.place.tolist()) < layout.rows <= 2 * len(chosen) + 2 * EXPERTS + 2
    # A product with matrices of one number, the expert's: every row is multiplied by its own.
    rows = layout.product(torch.ones(layout.rows, 1), torch.arange(float(EXPERTS)).view(-1, 1, 1))
    found = rows.index_select(0, layout.place).flatten().tolist()
    assert [int(each) for each in found] == [min(each, EXPERTS - 1) for each in chosen]

"""RMSNorm in training on a CPU, in parts and with a slope of its own, against the definition."""

import pytest
import torch

from fathom.modeling import normalization
from fathom.modeling.normalization import FathomRMSNorm


def definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_results_and_slopes_are_those_of_the_definition(dtype, strided, monkeypatch) -> None:
    monkeypatch.setattr(normalization, "NUMBERS_AT_ONCE", 7 * 24)
    torch.manual_seed(0)
    norm = FathomRMSNorm(24, eps=1e-2).to(torch.float64 if dtype is torch.float64 else torch.float32)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(3, 100, 48 if strided else 24, dtype=dtype)[..., :24].requires_grad_()
    direction = torch.randn(3, 100, 24, dtype=dtype)
    calls, function = [], normalization._RMSNorm.apply
    monkeypatch.setattr(normalization._RMSNorm, "apply", lambda *args: calls.append(args) or function(*args))
    # Also where a backward pass is run under autocast, sums are not taken in bf16.
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float64):
        output = norm(x)
        found = [output, *torch.autograd.grad(output, (x, norm.weight), direction)]
    exact = [each.detach().double().requires_grad_() for each in (x, norm.weight)]
    output = definition(*exact, norm.eps)
    expected = [output, *torch.autograd.grad(output, exact, direction.double())]
    assert len(calls) == 1
    assert [each.dtype for each in found] == [dtype, dtype, norm.weight.dtype]
    for got, wanted in zip(found, expected, strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        assert error < {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.005}[dtype]

"""Root-mean-square normalisation, computed in fp32 (arXiv 1910.07467), and the slope of it for a slope g of its result:

y = w n,  n = r x,  r = 1 / sqrt(mean(x^2) + eps)          dw = sum_N g n,  dx = r (w g - n mean(w g n))

Shapes: N tokens, d width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .fused import kernels_for
from .products import FEWEST_TOKENS, fits_functions

# Numbers of tokens that are normalised at a time in training on a CPU, so that its cache holds them: 1 MiB in fp32.
NUMBERS_AT_ONCE = 2**18


class _RMSNorm(torch.autograd.Function):
    """The above in parts, x [N, d] and w [d]; kept are x and r."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = max(1, NUMBERS_AT_ONCE // x.shape[1])
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, normed = x.new_empty(len(x), 1, dtype=wide), torch.empty_like(x)
        for x_part, scale_part, output in zip(x.split(rows), scale.split(rows), normed.split(rows), strict=True):
            x_part = x_part.to(wide)
            torch.linalg.vector_norm(x_part, dim=1, keepdim=True, out=scale_part)
            scale_part.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            output.copy_((x_part * scale_part).mul_(weight))
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        rows = max(1, NUMBERS_AT_ONCE // x.shape[1])
        wide_weight = weight.to(scale.dtype)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(wide_weight)
        for x_part, r, g, output in zip(
            x.split(rows), scale.split(rows), grad.split(rows), grad_x.split(rows), strict=True
        ):
            n = x_part * r
            slope = g * n
            grad_weight += slope.sum(dim=0)
            mean = slope.mul_(wide_weight).mean(dim=1, keepdim=True)
            output.copy_((g * wide_weight).addcmul_(n, mean, value=-1).mul_(r))
        return grad_x, grad_weight.to(weight.dtype), None


class FathomRMSNorm(nn.Module):
    """RMSNorm over the last dimension; the result has the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.shape[:-1].numel()
        kernels = kernels_for(self.training, tokens, hidden_states, self.weight, any_text=True)
        normed = kernels and kernels.rms_norm(hidden_states, self.weight, self.eps)
        if normed is not None:
            return normed
        differentiable_twice = torch.is_grad_enabled() and not self.training
        # In graphs the number of tokens may not be asked for: it can depend on data.
        if hidden_states.is_cpu and fits_functions() and tokens >= FEWEST_TOKENS and not differentiable_twice:
            return _RMSNorm.apply(hidden_states.flatten(0, -2), self.weight, self.eps).view_as(hidden_states)
        if hidden_states.dtype == self.weight.dtype:  # PyTorch's own computes in fp32, too
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"

"""Root-mean-square normalisation: `w * x / sqrt(mean(x^2) + eps)`, computed in fp32 (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import nn

from .fused import kernels_for


class FathomRMSNorm(nn.Module):
    """RMSNorm over the last dimension; the result has the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kernels = kernels_for(self.training, hidden_states.shape[:-1].numel(), hidden_states, self.weight)
        if kernels is not None:
            return kernels.rms_norm(hidden_states, self.weight, self.eps)
        if hidden_states.dtype == self.weight.dtype:  # PyTorch's own computes in fp32, too
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"

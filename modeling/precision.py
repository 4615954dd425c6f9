"""Numbers that must stay in fp32 whatever dtype the model is cast to."""

import torch
import torch.nn.functional as F
from torch import nn


def float32_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x W^T` in fp32, also under autocast and whatever dtypes the two have: [..., d], [E, d] -> [..., E]."""
    if x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float())


class Float32Linear(nn.Linear):
    """A linear map without bias that is computed in fp32, also under autocast and with a weight of another dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return float32_linear(x, self.weight)


class KeepsFloat32Buffers(nn.Module):
    """A module whose own fp32 buffers stay fp32 under `.to(bf16)`, `.half()` and the like.

    bf16 has 8 bits: steps of 0.001 on a routing bias of 5 vanish, and the rotary angle of position 1000 is off by
    radians. `from_pretrained(dtype=...)` is no danger to them, `Module.to` is.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self

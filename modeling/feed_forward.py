"""Channel mixing by a dense feed-forward network.

gated:  down(act(gate x) * up x)     SwiGLU with act = silu (arXiv 2002.05202), DeepSeek's form
plain:  down(act(up x))              the classic two-matrix network with act = relu (arXiv 1706.03762, 3.3)

DeepSeek-V4 (`Expert` in its inference code) clamps `gate x` from above and `up x` on both sides, which keeps single
activations from growing until training becomes unstable.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .fused import SILU, is_plain, kernels_for
from .memory import in_parts
from .products import mapped


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, act_fn: Callable, limit: float | None = None
) -> torch.Tensor:
    """`act(gate) * up`; with a limit both are clamped before."""
    gate, up = clamped(gate, up, limit)
    return act_fn(gate) * up


def clamped(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the activation takes, and what it is multiplied by; None: as they are."""
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(min=-limit, max=limit))


class FeedForward(nn.Module):
    """Feed-forward network without biases, [..., d] -> [..., d]."""

    def __init__(self, config, intermediate_size: int, gated: bool = True):
        super().__init__()
        if gated:
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = gated
        self.is_swiglu = gated and isinstance(self.act_fn, SILU)
        self.swiglu_limit = config.swiglu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_swiglu and is_plain(self.gate_proj) and is_plain(self.up_proj) and is_plain(self.down_proj):
            weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
            kernels = kernels_for(self.training, x.shape[:-1].numel(), x, *weights, any_text=True)
            output = kernels and kernels.mix_channels(x, *weights, self.swiglu_limit)
            if output is not None:
                return output
        return in_parts(self._forward, x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gated:
            gate, up = mapped(x, self.gate_proj), mapped(x, self.up_proj)
            inner = gated_activation(gate, up, self.act_fn, self.swiglu_limit)
        else:
            inner = self.act_fn(mapped(x, self.up_proj))
        return mapped(inner, self.down_proj)


class DenseChannelMixer(FeedForward):
    """A feed-forward network as a layer's channel mixer: nothing is routed, so it reports no routing."""

    def __init__(self, config, layer_idx: int = 0):
        super().__init__(config, config.intermediate_size, config.mlp_gated)

    def forward(
        self, x: torch.Tensor, token_mask: torch.Tensor | None = None, input_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None, None]:
        return super().forward(x), None, None

"""Hyper-connections without the constraint (HC, arXiv 2409.19606, section 2), to compare the constrained ones with.

    pre, post, M = base + scale tanh(W vec(X) / rms(vec(X)))

Nothing bounds `base`, so a deep stack may amplify what is in the streams. Reading, writing and the collapse of the
streams are those of `modeling.hyper_connections`.
"""

import torch

from ..modeling.hyper_connections import HyperConnection, StreamMixing, project_streams, sum_streams
from ..modeling.modeling_fathom import FathomForCausalLM


class UnconstrainedConnection(HyperConnection):
    """One sub-layer's connection; `depth` is the number of sub-layers before it."""

    def __init__(self, config, depth: int):
        super().__init__(config)
        n = self.hc_mult
        # The paper's start: reads one stream, a different one in every sub-layer, writes to all, mixes none.
        start = torch.cat((torch.eye(n)[depth % n], torch.ones(n), torch.eye(n).flatten()))
        with torch.no_grad():
            self.base.copy_(start)
            self.fn.zero_()
            self.scale.fill_(0.01)

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, StreamMixing]:
        """Streams [B, T, n, d] -> the sub-layer's input [B, T, d], and the mixing that `write` takes."""
        n = self.hc_mult
        sizes = [n, n, n * n]
        with torch.autocast(streams.device.type, enabled=False):
            dynamic = project_streams(streams, self.fn, self.norm_eps).tanh().split(sizes, dim=-1)
            base = self.base.float().split(sizes)
            pre, post, residual = (b + s * d for b, s, d in zip(base, self.scale.float(), dynamic, strict=True))
        return sum_streams(streams, pre), StreamMixing(post, residual.unflatten(-1, (n, n)))


def release_connections(model: FathomForCausalLM) -> None:
    """Replaces the connections of a new model's main layers by unconstrained ones."""
    for index, layer in enumerate(model.model.layers[: model.config.num_hidden_layers]):
        layer.attn_hc = UnconstrainedConnection(model.config, 2 * index)
        layer.ffn_hc = UnconstrainedConnection(model.config, 2 * index + 1)

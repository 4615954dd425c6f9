"""What goes on inside a model in training and evaluation, as numbers for the log.

Balance (auxiliary-loss-free balancing, arXiv 2408.15664, section 4). With the tokens per expert of a layer

    max_vio          busiest expert over mean, minus 1; 0 is perfect balance
    min_load         idlest expert over mean
    dead_experts     number of experts without any token

Hyper-connections (mHC, arXiv 2512.24880, section 5). Every sub-layer l mixes the n residual streams by a matrix,
`X' = M_l^T X`; what becomes of a stream over the depth is the product of all of them, P = M_L^T ... M_1^T.

    amax_gain_forward    largest sum of a row of |P|: how much streams can be amplified on their way up
    amax_gain_backward   largest sum of a column of |P|: the same for gradients on their way down; 1 is ideal for both
    off_diagonal_mass    what a stream takes from the others in one sub-layer, 0 for the plain residual
    stream_similarity    mean cosine of two streams after the last layer; 1 means that n streams do the work of one
"""

from types import TracebackType

import torch
import torch.nn.functional as F
from torch import nn

from ..modeling.hyper_connections import HyperConnection, StreamCollapse, StreamMixing
from ..modeling.modeling_fathom import FathomModel, FathomPreTrainedModel


def load_ratio(load: torch.Tensor) -> torch.Tensor:
    """Tokens of the busiest expert over the mean: [M, E] -> [M]. 1 is perfect balance; MaxVio is this - 1."""
    return load.max(dim=-1).values / load.mean(dim=-1).clamp(min=1)


def balance_by_layer(load: torch.Tensor, layers: list[int]) -> dict[str, float]:
    """MaxVio, least load and dead experts of every layer.

    Args:
        load: tokens per expert [M, E].
        layers: index of each of the M in `model.layers`.
    """
    max_vio, least = load_ratio(load) - 1, load.min(dim=-1).values / load.mean(dim=-1).clamp(min=1)
    dead = (load == 0).sum(dim=-1)
    figures = {}
    for row, layer in enumerate(layers):
        figures[f"max_vio_layer_{layer}"] = max_vio[row].item()
        figures[f"min_load_layer_{layer}"] = least[row].item()
        figures[f"dead_experts_layer_{layer}"] = dead[row].item()
    return figures


def router_layers(model: FathomPreTrainedModel) -> list[int]:
    """Index in `model.layers` of every router, in the order of the rows of an expert load."""
    names = {module: name for name, module in model.named_modules()}
    return [int(names[router].split("layers.")[1].split(".")[0]) for router in model.routers()]


class StreamProbe:
    """Watches the hyper-connections of a language model during the forward passes of a `with` block.

        with StreamProbe(model) as probe:
            model(input_ids)
        probe.metrics()

    MTP layers are not watched. The figures are those of the last forward pass.
    """

    def __init__(self, model: nn.Module):
        # Looked for, because adapters (PEFT) have a `base_model` of their own.
        base = next(module for module in model.modules() if isinstance(module, FathomModel))
        self.watched = [
            *(part for layer in base.layers[: base.config.num_hidden_layers] for part in (layer.attn_hc, layer.ffn_hc)),
            base.hc_head,
        ]
        self.matrices: list[torch.Tensor] = []  # [B, T, n, n] per sub-layer
        self.streams: torch.Tensor | None = None  # [B, T, n, d] after the last layer

    def __enter__(self) -> "StreamProbe":
        self.hooks = [module.register_forward_hook(self._note) for module in self.watched]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self.hooks:
            hook.remove()

    def _note(self, module: nn.Module, inputs: tuple, output) -> None:
        if module is self.watched[0]:
            self.matrices.clear()
        if isinstance(module, HyperConnection):
            mixing: StreamMixing = output[1]
            self.matrices.append(mixing.residual.detach())
        elif isinstance(module, StreamCollapse):
            self.streams = inputs[0].detach()

    def gains(self) -> list[tuple[float, float]]:
        """Amax gain (forward, backward) from the first sub-layer to each, the largest over tokens."""
        gains, product = [], None
        for mixing in self.matrices:
            matrix = mixing.transpose(-1, -2)  # so that X' = M X
            product = matrix if product is None else matrix @ product
            size = product.abs()
            gains.append((size.sum(dim=-1).max().item(), size.sum(dim=-2).max().item()))
        return gains

    def metrics(self) -> dict[str, float]:
        """The figures above, means over tokens; the gains' largest over tokens. Empty without hyper-connections."""
        if self.streams is None:
            return {}
        forward, backward = self.gains()[-1]
        mixed = torch.stack(self.matrices).abs().transpose(-1, -2)  # [L, B, T, n, n]
        diagonal = mixed.diagonal(dim1=-2, dim2=-1)
        streams = F.normalize(self.streams.float(), dim=-1)
        cosines = streams @ streams.transpose(-1, -2)  # [B, T, n, n]
        n = cosines.shape[-1]
        pairs = cosines.sum(dim=(-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        return {
            "amax_gain_forward": forward,
            "amax_gain_backward": backward,
            "off_diagonal_mass": (mixed.sum(dim=-1) - diagonal).mean().item(),
            "stream_similarity": (pairs / (n * (n - 1))).mean().item(),
        }

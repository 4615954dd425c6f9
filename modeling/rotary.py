"""Positions: rotary embeddings (RoPE, arXiv 2104.09864; YaRN, arXiv 2309.00071) and sinusoids (arXiv 1706.03762).

RoPE turns each pair of dimensions by an angle that grows with the position, so that the product of a query and
a key depends on their distance alone:

    (x1, x2) -> (x1 cos a - x2 sin a,  x2 cos a + x1 sin a),     a = position * inv_freq

DeepSeek's checkpoints pair neighbours (x0, x1), (x2, x3), ... ("interleaved"); Llama-like ones pair halves.

Shapes: B batch, T tokens, H heads, D rotary width.
"""

import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .fused import kernels_for
from .precision import KeepsFloat32Buffers


class FathomRotaryEmbedding(KeepsFloat32Buffers):
    """Cosines and sines of the rotary angles.

    transformers refills `inv_freq` and `original_inv_freq` after `from_pretrained` for classes of this name that
    have `compute_default_rope_parameters`; without it the buffers would stay uninitialised memory.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        init = (
            self.compute_default_rope_parameters if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        )
        self.attention_scaling: float
        inv_freq, self.attention_scaling = init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config, device=None, seq_len=None) -> tuple[torch.Tensor, float]:
        """`theta^(-2i/D)` for i < D/2 -> ([D/2], 1.0)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of `position_ids` [B, T] -> cos, sin, each [B, T, D/2], in the dtype of `x`."""
        kernels = kernels_for(self.training, position_ids.numel(), x)
        found = kernels and kernels.angles(position_ids, self.inv_freq, self.attention_scaling, x.dtype)
        if found is not None:
            return found
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device)  # [B, T, D/2]
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def apply_rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, heads: int = 1
) -> torch.Tensor:
    """Rotates `x` [B, H, T, D] by `cos`, `sin` [B, T, D/2]; the layout of the last dimension is kept.

    Args:
        heads: the dimension of the heads; with 2 `x` is [B, T, H, D].
    """
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)  # [B, 1, T, D/2]
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    return torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)


def rotate_end(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    training: bool,
    backwards: bool = False,
    norm_eps: float | None = None,
) -> torch.Tensor:
    """Rotates the last P dimensions of `x` [B, H, T, D], neighbours as pairs, in fp32; `cos`, `sin` are [B, T, P/2].

    Args:
        training: the module's mode (`fused.kernels_for`).
        backwards: turn back.
        norm_eps: divide `x` by its root mean square over D before, this number under the root.
    """
    width = 2 * cos.shape[-1]
    first = x.shape[-1] - width
    kernels = kernels_for(training, cos.shape[:2].numel(), x.transpose(1, 2), cos, sin)
    if kernels is not None:
        norm = {} if norm_eps is None else {"norm_width": x.shape[-1], "eps": norm_eps}
        turned = kernels.norm_rotate(x.transpose(1, 2), cos, sin, first=first, backwards=backwards, **norm)
        if turned is not None:
            return turned.transpose(1, 2)
    if norm_eps is not None:
        x = F.rms_norm(x.float(), x.shape[-1:], eps=norm_eps).to(x.dtype)
    still, turned = x.split([first, width], dim=-1)
    turned = apply_rotary(turned.float(), cos, -sin if backwards else sin, interleaved=True)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)


def yarn_softmax_scale(config) -> float:
    """Factor on the attention logits that YaRN asks for: `m^2`, m = 0.1 mscale_all_dim ln(factor) + 1.

    1 for every other rotary type. Source: DeepSeek-V3 `inference/model.py`; the same in transformers.
    """
    rope = SimpleNamespace(factor=1.0, mscale_all_dim=0.0, rope_type="default")
    rope.__dict__.update(config.rope_parameters or {})
    if rope.rope_type == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def sinusoidal_positions(position_ids: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """`sin(p / 10000^(2i/d))` and `cos` of the same, interleaved: [B, T] -> [B, T, d] (arXiv 1706.03762, 3.5)."""
    even = torch.arange(0, hidden_size, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None].float() * 10000.0 ** (-even / hidden_size)  # [B, T, ceil(d/2)]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., :hidden_size]


def window_rotary_config(config, compressed: bool):
    """The configuration of one of V4's two rotary embeddings, in the form that transformers' rotary code reads.

    Layers with a compressed past have a larger base, and YaRN; DeepSeek's code does not scale cosines and sines by
    YaRN's attention factor, which transformers would derive if it were not said. Windows are short, and have neither.
    """
    view = copy.copy(config)
    view.head_dim = config.qk_rope_head_dim
    rope = config.rope_parameters
    if compressed:
        view.rope_parameters = {**rope, "rope_theta": config.compress_rope_theta}
        if rope["rope_type"] == "yarn":
            view.rope_parameters["attention_factor"] = 1.0
    else:
        view.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return view

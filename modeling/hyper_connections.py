"""Residual mixing by manifold-constrained hyper-connections (mHC, arXiv 2512.24880; DeepSeek-V4, section 2.2).

The residual stream becomes n streams X in R^{n x d}, at first n copies of the embedding. A sub-layer reads a
weighted sum of them, and its output is added to each of them while they are mixed with one another:

    u = sum_j pre_j X_j,    y = F(norm(u)),    X'_k = post_k y + sum_j M_jk X_j

All weights are computed from the streams of the token themselves, m = (W vec(X)) / rms(vec(X)):

    pre = sigmoid(a_0 m_pre + b_pre) + eps,    post = 2 sigmoid(a_1 m_post + b_post)
    M = Sinkhorn(softmax(a_2 m_res + b_res) + eps)

Sinkhorn's steps make rows and columns of M sum to 1 in turn. A product of such matrices is one again, so that a
deep stack of layers neither amplifies nor loses what was in the streams. DeepSeek's code ends on the columns, where
the paper ends on the rows; this is the code's order. After the last layer the streams are summed with weights like
`pre` (`StreamCollapse`).

Shapes: B batch, T tokens, n streams, d width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .fused import kernels_for
from .memory import in_parts


class StreamMixing(NamedTuple):
    """What a read keeps for the write: weights of the output [B, T, n] and between the streams [B, T, n, n], fp32."""

    post: torch.Tensor
    residual: torch.Tensor


class HyperConnection(nn.Module):
    """One sub-layer's connection to n residual streams."""

    def __init__(self, config):
        super().__init__()
        streams = config.hc_mult
        self.hc_mult = streams
        self.sinkhorn_iters = config.hc_sinkhorn_iters
        self.hc_eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        # Rows: n for `pre`, n for `post`, n^2 for M. `fn`, `base` and `scale` are DeepSeek's names.
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty((2 + streams) * streams))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, StreamMixing]:
        """Streams [B, T, n, d] -> the sub-layer's input [B, T, d], and the mixing that `write` takes."""
        n = self.hc_mult
        kernels = kernels_for(self.training, streams.shape[:2].numel(), streams, self.fn, self.base, self.scale)
        weights = self.fn, self.base, self.scale, self.norm_eps, self.hc_eps, self.sinkhorn_iters
        found = kernels and kernels.read_streams(streams, *weights)
        if found is not None:
            return found[0], StreamMixing(*found[1:])
        # Autocast would compute the weights in bf16; they steer every layer's residual, so they stay in fp32.
        with torch.autocast(streams.device.type, enabled=False):
            logits = project_streams(streams, self.fn, self.norm_eps)  # [B, T, (2 + n) n]
            parts = [n, n, n * n]
            each = zip(self.base.float().split(parts), logits.split(parts, dim=-1), self.scale.float(), strict=True)
            pre, post, residual = (torch.addcmul(base, part, scale) for base, part, scale in each)
            pre = torch.sigmoid(pre) + self.hc_eps
            post = 2 * torch.sigmoid(post)
            residual = sinkhorn(residual.unflatten(-1, (n, n)), self.sinkhorn_iters, self.hc_eps)
        return sum_streams(streams, pre), StreamMixing(post, residual)

    def write(self, streams: torch.Tensor, output: torch.Tensor, mixing: StreamMixing) -> torch.Tensor:
        """Streams [B, T, n, d] and the sub-layer's output [B, T, d] -> streams [B, T, n, d]."""
        kernels = kernels_for(self.training, streams.shape[:2].numel(), streams, output)
        written = kernels and kernels.write_streams(streams, output, *mixing)
        if written is not None:
            return written
        return in_parts(_written, streams, output, *mixing, dim=1)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Starts as the plain residual connection, whose network a model of equal streams then is.

        All streams are the embedding at first, and stay equal as long as `post` is the same for all: hence 1, by
        zeros in its rows of `fn`. The columns of M sum to 1, so equal streams stay as they are; M begins close to the
        identity. What `pre` sums them to differs from 1 by some 1 %, which the norm after it takes away.

        The papers only say that the scales start small; 0.01 is that of arXiv 2512.24880, table 5. transformers
        starts with scale 1 and base 0, where M mixes all streams evenly and they can hardly become different.
        """
        n = self.hc_mult
        fn = torch.empty_like(self.fn).normal_(mean=0.0, std=std)
        fn[n : 2 * n] = 0.0
        init.copy_(self.fn, fn)
        init.constant_(self.scale, 0.01)
        mean = torch.full((n,), -math.log(n - 1))  # sigmoid of it is 1/n
        identity = 4.0 * torch.eye(n).flatten()  # a row's softmax is 0.95 on the diagonal for n = 4
        init.copy_(self.base, torch.cat((mean, torch.zeros(n), identity)))


class StreamCollapse(nn.Module):
    """The n streams after the last layer as one: [B, T, n, d] -> [B, T, d]."""

    def __init__(self, config):
        super().__init__()
        streams = config.hc_mult
        self.hc_mult = streams
        self.hc_eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(streams))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, streams: torch.Tensor) -> torch.Tensor:
        weights = self.hc_fn, self.hc_base, self.hc_scale
        kernels = kernels_for(self.training, streams.shape[:2].numel(), streams, *weights)
        collapsed = kernels and kernels.collapse_streams(streams, weights, self.norm_eps, self.hc_eps)
        if collapsed is not None:
            return collapsed
        with torch.autocast(streams.device.type, enabled=False):
            logits = project_streams(streams, self.hc_fn, self.norm_eps)  # [B, T, n]
            shares = torch.sigmoid(logits * self.hc_scale.float() + self.hc_base.float()) + self.hc_eps
        return sum_streams(streams, shares)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Starts as the mean of the streams."""
        init.normal_(self.hc_fn, mean=0.0, std=std)
        init.constant_(self.hc_scale, 0.01)
        init.constant_(self.hc_base, -math.log(self.hc_mult - 1))


def split_streams(hidden_states: torch.Tensor, streams: int) -> torch.Tensor:
    """[B, T, d] -> `streams` copies [B, T, n, d]; unchanged for one stream."""
    if streams == 1:
        return hidden_states
    copies = hidden_states.unsqueeze(2).expand(-1, -1, streams, -1)
    # A backward pass would keep the copies.
    return copies if torch.is_grad_enabled() else copies.contiguous()


def project_streams(streams: torch.Tensor, fn: torch.Tensor, eps: float) -> torch.Tensor:
    """`fn vec(X) / rms(vec(X))` in fp32: streams [B, T, n, d] and fn [m, n d] -> [B, T, m]."""

    def project(streams: torch.Tensor) -> torch.Tensor:
        flat = streams.flatten(2).float()
        return F.linear(F.rms_norm(flat, flat.shape[-1:], eps=eps), fn.float())

    return in_parts(project, streams, dim=1)


def sum_streams(streams: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_j weights_j X_j`: streams [B, T, n, d] and fp32 weights [B, T, n] -> [B, T, d], in the streams' dtype."""
    return in_parts(_weighted_sum, streams, weights, dim=1)


def _weighted_sum(streams: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights.unsqueeze(-1) * streams).sum(dim=2).to(streams.dtype)


def _written(streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    post, residual = post.to(streams.dtype), residual.to(streams.dtype)
    return torch.addcmul(residual.mT @ streams, post.unsqueeze(-1), output.unsqueeze(-2))


def sinkhorn(logits: torch.Tensor, iterations: int, eps: float) -> torch.Tensor:
    """Sinkhorn-Knopp: [..., n, n] logits -> non-negative matrices whose rows and columns nearly sum to 1.

    The softmax is the first step on the rows; every iteration ends on the columns, whose sums are exact up to eps.

    A step divides every row by its sum plus eps, or every column. All of them together leave `M_ij = K_ij / (r_i c_j)`
    of the matrix K that they begin with, so that only the divisors r and c need to be followed. A step on the rows
    multiplies r_i by `sum_j K_ij / (r_i c_j) + eps`, that is, `r <- K (1 / c) + eps r`; one on the columns likewise.
    """
    matrix = logits.softmax(dim=-1) + eps
    by_row = matrix.reshape(-1, *matrix.shape[-2:])  # as one batch
    by_column = by_row.mT
    rows = torch.ones_like(by_row[..., :1])
    columns = torch.baddbmm(rows, by_column, rows, beta=eps)
    for _ in range(iterations - 1):
        rows = torch.baddbmm(rows, by_row, columns.reciprocal(), beta=eps)
        columns = torch.baddbmm(columns, by_column, rows.reciprocal(), beta=eps)
    return (by_row / (rows * columns.mT)).view_as(matrix)

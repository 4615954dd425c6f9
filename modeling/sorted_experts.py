"""Routed experts with the tokens of an expert side by side, and a training step of them with a backward of its own.

For an expert's tokens X, their weights g (one per row), [A | U] = X W_1^T, H = silu(A) * U and Y = (g H) W_2^T:

    dH = g (dY W_2)     dg = rowsum(dY W_2 * H)     dU = dH * silu(A)     dA = dH * U silu'(A)
    dX = [dA | dU] W_1  dW_1 = [dA | dU]^T X        dW_2 = dY^T (g H)

One expert is done before the next begins, so that its rows stay in the processor's cache, and no rows of all experts
are copied together. Kept are [A | U] alone.

Shapes: N tokens, K chosen experts per token, E experts, R rows of all experts, I inner width, d width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .feed_forward import clamped
from .products import matrix_product, transposed_product

# An expert's rows are filled up to a multiple of the larger number, or of the smaller one where experts have few:
# oneDNN prepares a product anew for every number of rows, which in bf16 takes as long as one of a thousand rows and
# leaves 0.7 MB of code and buffers behind.
ROWS = (16, 64)


class Slots(NamedTuple):
    """The N K choices in the order of their experts, each expert's filled up with token 0."""

    rows: list[int]  # of every expert, with those that fill up; their sum is R
    token: torch.Tensor  # [R]
    order: torch.Tensor  # [N K], the choices by expert
    place: torch.Tensor | None  # [N K], where they stand among the R; None: as they are

    def arrange(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights [N, K] -> [R], 0 in rows that fill up."""
        weights = weights.flatten().index_select(0, self.order)
        return weights if self.place is None else weights.new_zeros(len(self.token)).index_copy(0, self.place, weights)


def sort_slots(indices: torch.Tensor, num_experts: int, fill: bool) -> Slots:
    """Chosen experts [N, K], sorted; with `fill` every expert's number of rows is a multiple of one of `ROWS`."""
    slots, order = indices.flatten().sort(stable=True)
    token = order // indices.shape[1]
    counts = slots.bincount(minlength=num_experts)
    if not fill:
        return Slots(counts.tolist(), token, order, None)
    missing = -counts % ROWS[len(slots) > 256 * num_experts]
    place = torch.arange(len(slots), device=slots.device) + (missing.cumsum(0) - missing).index_select(0, slots)
    rows = (counts + missing).tolist()
    return Slots(rows, token.new_zeros(sum(rows)).index_copy(0, place, token), order, place)


class SortedExperts(torch.autograd.Function):
    """SwiGLU experts: tokens [N, d], weights [N, K], W_1 [E, 2 I, d], W_2 [E, d, I] -> [N, d] in the tokens' dtype.

    Then the chosen experts [N, K], the limit of `gated_activation`, the dtype of the products, and whether a gradient
    may be asked for.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: torch.Tensor,
        weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        indices: torch.Tensor,
        limit: float | None,
        dtype: torch.dtype,
        learns: bool,
    ) -> torch.Tensor:
        product, by_onednn = matrix_product(dtype, hidden_states, gate_up_proj, down_proj)
        slots = sort_slots(indices, len(gate_up_proj), fill=by_onednn)
        shares = slots.arrange(weights).to(dtype).unsqueeze(1).split(slots.rows)
        x, w_1, w_2 = (each.to(dtype) for each in (hidden_states, gate_up_proj, down_proj))
        output = torch.zeros_like(hidden_states)
        kept: list[torch.Tensor | None] = []
        for expert, token in enumerate(slots.token.split(slots.rows)):
            if not len(token):  # oneDNN knows no matrices without rows
                kept.append(None)
                continue
            gate_up = product(x.index_select(0, token), w_1[expert])  # [rows, 2 I]
            if learns:
                kept.append(gate_up)
            gate, up = gate_up.chunk(2, dim=-1)
            gate, up = clamped(gate, up, limit)
            inner = F.silu(gate).mul_(up).mul_(shares[expert])
            output.index_add_(0, token, product(inner, w_2[expert]).to(output.dtype))
        ctx.save_for_backward(hidden_states, weights, gate_up_proj, down_proj, *kept)
        ctx.slots, ctx.product, ctx.limit, ctx.dtype = slots, product, limit, dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):  # type: ignore[override]
        hidden_states, weights, gate_up_proj, down_proj, *kept = ctx.saved_tensors
        hidden_learns, _, gate_up_learns, down_learns, *_ = ctx.needs_input_grad
        slots, product, limit, dtype = ctx.slots, ctx.product, ctx.limit, ctx.dtype
        shares = slots.arrange(weights).to(dtype).unsqueeze(1).split(slots.rows)
        x, w_1, w_2, slope = (each.to(dtype) for each in (hidden_states, gate_up_proj, down_proj, grad_output))
        grad_hidden = torch.zeros_like(hidden_states) if hidden_learns else None
        grad_gate_up = torch.zeros_like(gate_up_proj) if gate_up_learns else None
        grad_down = torch.zeros_like(down_proj) if down_learns else None
        grad_shares = []
        for expert, token in enumerate(slots.token.split(slots.rows)):
            if not len(token):
                continue
            gate, up = kept[expert].chunk(2, dim=-1)
            gate, up = clamped(gate, up, limit)
            rows = slope.index_select(0, token)
            activated = F.silu(gate)
            inner = activated * up
            grad_weighed = product(rows, w_2[expert].t())  # [rows, I]
            grad_shares.append((grad_weighed * inner).sum(dim=-1, dtype=weights.dtype))
            if grad_down is not None:
                grad_down[expert] = transposed_product(product, rows, inner.mul_(shares[expert]))
            grad_inner = grad_weighed.mul_(shares[expert])
            grad_gate = torch.ops.aten.silu_backward(grad_inner * up, gate)
            grad_gate_up_rows = torch.cat((grad_gate, grad_inner.mul_(activated)), dim=-1)  # [rows, 2 I]
            if limit is not None:
                gate, up = kept[expert].chunk(2, dim=-1)
                grad_gate_up_rows *= torch.cat((gate <= limit, up.abs() <= limit), dim=-1)
            if grad_hidden is not None:
                grad_rows = product(grad_gate_up_rows, w_1[expert].t())
                grad_hidden.index_add_(0, token, grad_rows.to(grad_hidden.dtype))
            if grad_gate_up is not None:
                grad_gate_up[expert] = transposed_product(product, grad_gate_up_rows, x.index_select(0, token))
        of_rows = torch.cat(grad_shares)
        of_choices = of_rows if slots.place is None else of_rows.index_select(0, slots.place)
        grad_weights = torch.empty_like(of_choices).index_copy_(0, slots.order, of_choices).view_as(weights)
        return grad_hidden, grad_weights, grad_gate_up, grad_down, None, None, None, None

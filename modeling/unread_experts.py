"""Routed experts on an accelerator, which is not asked how many tokens an expert has.

The slots (a token and one of its experts) are sorted by expert. In bf16 PyTorch has products of groups whose ends are a
tensor. In other dtypes it waits for the ends, and multiplies group by group. There rows are put into blocks of R, each
with the rows of one expert, and all blocks are one batched product:

    rows of an expert   a a a a a | b | c c c        R = 2:   a a | a a | a . | b . | c c | c .

R is about a block per expert. So there are never more than S / R + E blocks for S slots, whoever gets them: at most
twice the rows and twice the weights. A decoding step has R = 1: every slot reads the weights of its expert.

Shapes: N tokens, K chosen experts per token, S = N K slots, E experts, I inner width, d width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Layout(NamedTuple):
    """Where slots stand in the rows of a product, R' rows in all."""

    place: torch.Tensor  # [S], the row of every slot
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # rows [R', i] and weights [E, o, i] -> [R', o]
    rows: int


def mix_unread(
    experts,
    hidden_states: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`RoutedExperts.forward`, by products in `dtype`: tokens [N, d] -> [N, d] in the tokens' dtype.

    Args:
        experts: the module. indices, weights: [N, K]; an expert that there is not (of another process, in expert
            parallelism) contributes nothing.
    """
    top_k = indices.shape[1]
    chosen = indices.flatten()
    grouped = groups_without_waiting(experts, dtype) and not experts._is_expert_parallel
    layout = (in_groups if grouped else in_blocks)(chosen, experts.num_experts)
    token = torch.arange(len(chosen), device=chosen.device) // top_k  # [S]
    # Rows that no slot has are of the first token, and weigh nothing.
    token_of_row = token.new_zeros(layout.rows).scatter(0, layout.place, token)
    shares = weights.flatten().to(dtype)
    if experts._is_expert_parallel:
        shares = shares.masked_fill(chosen >= experts.num_experts, 0)
    shares = shares.new_zeros(layout.rows).scatter(0, layout.place, shares)

    rows = hidden_states.to(dtype).index_select(0, token_of_row)
    # Weighing the inner activations instead of the outputs is the same and touches fewer numbers.
    inner = experts._apply_gate(layout.product(rows, experts.gate_up_proj)) * shares.unsqueeze(1)
    outputs = layout.product(inner, experts.down_proj).index_select(0, layout.place).unflatten(0, indices.shape)
    return outputs.sum(dim=1, dtype=torch.promote_types(dtype, torch.float32)).to(hidden_states.dtype)


def groups_without_waiting(experts, dtype: torch.dtype) -> bool:
    """Whether PyTorch's grouped product takes the ends of groups as they are, unread, for such weights."""
    weight = experts.gate_up_proj
    # Its rows have to fill whole 16 bytes.
    if dtype is not torch.bfloat16 or weight.shape[-1] % 8 or experts.down_proj.shape[-1] % 8:
        return False
    if weight.device.type == "cuda":
        return torch.cuda.get_device_capability(weight.device) >= (8, 0)
    return weight.device.type in ("cpu", "meta")


def in_groups(chosen: torch.Tensor, num_experts: int) -> Layout:
    """The slots of experts [S] by expert, one group behind the other."""
    order = chosen.argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    ends = _counts(chosen, num_experts).cumsum(0).to(torch.int32)

    def product(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(rows, weight.to(rows.dtype).transpose(-2, -1), offs=ends)

    return Layout(place, product, len(chosen))


def in_blocks(chosen: torch.Tensor, num_experts: int) -> Layout:
    """The slots of experts [S] in blocks of one expert each."""
    slots = len(chosen)
    rows = 1 << max(slots // num_experts, 1).bit_length() - 1
    # Those of other processes are one more expert's.
    chosen, kinds = chosen.clamp(max=num_experts), num_experts + 1
    counts = _counts(chosen, kinds)
    blocks = (counts + rows - 1) // rows
    ends = blocks.cumsum(0)
    number = slots if rows == 1 else slots // rows + kinds

    sorted_experts, order = chosen.sort(stable=True)
    among_its_own = torch.arange(slots, device=chosen.device) - (counts.cumsum(0) - counts)[sorted_experts]
    place = (ends - blocks)[sorted_experts] * rows + among_its_own
    place = torch.empty_like(place).scatter(0, order, place)
    of_block = torch.searchsorted(ends, torch.arange(number, device=ends.device), right=True)
    of_block = of_block.clamp(max=num_experts - 1)

    def product(each: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.index_select(0, of_block).to(each.dtype)
        return torch.bmm(each.unflatten(0, (number, rows)), weight.transpose(-2, -1)).flatten(0, 1)

    return Layout(place, product, number * rows)


def _counts(chosen: torch.Tensor, kinds: int) -> torch.Tensor:
    return chosen.new_zeros(kinds).scatter_add_(0, chosen, torch.ones_like(chosen))

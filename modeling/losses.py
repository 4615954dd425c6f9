"""The terms of a language model's loss, and a cross-entropy that never holds the logits of all tokens.

    loss = sum_n logsumexp(W h_n) - (W h_n)[y_n],     d loss / d (W h_n) = softmax(W h_n) - onehot(y_n)

With a vocabulary of V a token's logits are V numbers in fp32, and automatic differentiation keeps two or three copies
of them: for 129,280 words and 4096 tokens more than 4 GB. Here a chunk of tokens at a time runs forward and at once
backward, while its logits are there; kept are the gradients of h and W, which are needed anyway. No product is computed
twice. (The idea is that of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989, section 3.2.)

A batch may have no target: prompts without an answer, answers cut off, padding. Its sums are 0 then, and so are its
loss and all gradients; they are not divided by the number of targets (`divisor`), as 0 / 0 in one step would be every
weight of the next. Gradients are zeros and not missing, since other ranks wait for them.

Shapes: N tokens, d width, V vocabulary; L indexers, F figures of each, B batch, T tokens per row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .host import host_can_read
from .indexing import REPORT
from .products import matrix_product

IGNORED = -100  # target of a position that predicts nothing, as in PyTorch

# Logits held at a time: 64 MiB in fp32; on a CPU what its cache holds, 8 MiB, but never those of fewer tokens than make
# a good matrix product.
LOGITS_AT_ONCE = 2**24
LOGITS_IN_CACHE, FEWEST_TOKENS = 2**21, 128


def tokens_at_once(vocab_size: int, device: torch.device) -> int:
    """How many tokens' logits are held at a time."""
    if device.type == "cpu":
        return max(FEWEST_TOKENS, LOGITS_IN_CACHE // vocab_size)
    return max(1, LOGITS_AT_ONCE // vocab_size)


def divisor(targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | int:
    """What sums over targets are divided by; at least 1, for the sum of no targets.

    Args:
        targets: of any shape, -100 where there is none.
        num_items: number of targets of the whole optimizer step. None: that of `targets`, for their mean.
    """
    if num_items is None:
        num_items = (targets != IGNORED).sum()
    if isinstance(num_items, torch.Tensor):
        num_items = num_items.to(targets.device)
        return num_items + (num_items == 0)
    return num_items or 1


class LossTerms(NamedTuple):
    """The terms of a language model's loss, unweighted but for balance, and the MTP layers' expert counts."""

    next_token: torch.Tensor | None = None
    mtp_loss: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    indexer_figures: dict[str, torch.Tensor] | None = None
    draft_counts: torch.Tensor | None = None
    share: torch.Tensor | None = None  # see `share_of_batch`

    def weighed(self, config) -> torch.Tensor | None:
        """The loss of training: the sum of all terms that there are, with their weights."""
        loss = self.next_token
        if loss is None:
            return None
        if self.mtp_loss is not None:
            loss = loss + config.mtp_loss_weight * self.mtp_loss
        if self.indexer_figures is not None:
            loss = loss + config.indexer_loss_coef * self.indexer_figures["loss"]
        if self.balance_loss is not None:
            loss = loss + self.balance_loss * self.share
        return loss


def share_of_batch(targets: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """This micro-batch's share of the optimizer step's targets, the weight of a per-batch mean in the step's loss.

    1 where the step has no other; 0 without targets.
    """
    return (targets != IGNORED).sum() / divisor(targets, num_items)


def indexer_figures(
    reports: list[tuple[torch.Tensor | None, torch.Tensor]], num_items: torch.Tensor | int | None
) -> dict[str, torch.Tensor] | None:
    """The figures of `indexing.REPORT`, means over indexers and over queries that have a target.

    Args:
        reports: [L, F, B, T] of some layers, and the targets [B, T] of their queries.
        num_items: what sums over queries are divided by (`divisor`). None: the number of the first targets.
    """
    found = [(report, targets != IGNORED) for report, targets in reports if report is not None]
    if not found:
        return None
    first_targets = next(targets for report, targets in reports if report is not None)
    layers = sum(len(report) for report, _ in found)
    sums = torch.stack([(report * seen).sum(dim=(0, 2, 3)) for report, seen in found]).sum(dim=0)  # [F]
    return dict(zip(REPORT, sums / (layers * divisor(first_targets, num_items)), strict=False))


class _LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden_states @ weight.T`, in chunks of tokens."""

    @staticmethod
    def forward(ctx, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype):
        hidden_learns, weight_learns, *_ = ctx.needs_input_grad
        sums = torch.promote_types(dtype, torch.float32)
        loss = torch.zeros((), dtype=sums, device=hidden_states.device)
        grad_hidden = torch.empty_like(hidden_states) if hidden_learns else None
        # Transposed: PyTorch may copy a product's first matrix, and the slope is the larger one.
        grad_weight = (
            torch.zeros_like(weight.t(), dtype=sums, memory_format=torch.contiguous_format) if weight_learns else None
        )
        product, _ = matrix_product(dtype, hidden_states, weight)
        cast_weight = weight.to(dtype)
        rows = tokens_at_once(len(weight), weight.device)
        for start in range(0, len(hidden_states), rows):
            chunk = slice(start, start + rows)
            hidden, target = hidden_states[chunk].to(dtype), targets[chunk].unsqueeze(1)
            seen, target = target != IGNORED, target.clamp(min=0)
            logits = product(hidden, cast_weight).to(sums)  # [rows, V]
            of_target = logits.gather(1, target) - logits.amax(dim=-1, keepdim=True)
            # In place: new memory for as many numbers takes longer than the arithmetic.
            slope = torch.softmax(logits, dim=-1, out=logits)
            # The largest of `exp(logits - largest) / total` is `1 / total`.
            loss -= ((of_target + slope.amax(dim=-1, keepdim=True).log()) * seen).sum()
            if not (hidden_learns or weight_learns):
                continue
            slope = slope.mul_(seen).scatter_add_(1, target, -seen.to(sums)).to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = product(slope, cast_weight.t())
            if grad_weight is not None:
                grad_weight += product(hidden.t(), slope.t())
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.t().to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):  # type: ignore[override]
        gradients = [None if each is None else each * grad_output.to(each.dtype) for each in ctx.saved_tensors]
        return *gradients, None, None


def head_cross_entropy(
    head: nn.Module, hidden_states: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy of `head(hidden_states)` with targets, without the logits of all tokens.

    Args:
        head: linear, without bias. One that is wrapped or hooked (LoRA, tensor parallelism) is called as a whole.
        hidden_states: [..., d].
        targets: [...], what each position is to predict; -100 is ignored.
        num_items: what the sum is divided by (`divisor`). None: the number of targets, so that the result is their
            mean.

    Returns:
        Scalar in fp32 (float64 for such inputs); 0 where there are no targets.
    """
    hidden_states, targets = hidden_states.flatten(0, -2), targets.flatten()
    targets = targets.to(hidden_states.device)
    num_items = divisor(targets, num_items)
    if host_can_read(targets):
        seen = targets != IGNORED
        hidden_states, targets = hidden_states[seen], targets[seen]
    if not _is_plain(head):
        logits = head(hidden_states)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / num_items
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    return _LinearCrossEntropy.apply(hidden_states, head.weight, targets, dtype) / num_items


def _is_plain(head: nn.Module) -> bool:
    """Whether calling the head is nothing but a product with its weight."""
    hooked = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return type(head) is nn.Linear and head.bias is None and type(head.weight) is nn.Parameter and not hooked

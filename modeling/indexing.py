"""What the indexers of sparse attention share: scores of keys for queries, and a choice that ties do not disturb.

An indexer is a very small attention whose scores only choose (DeepSeek-V3.2, arXiv 2512.02556, section 2.1):

    I_ts = sum_j w_tj relu(q_tj k_s),     w_t = W h_t / sqrt(J D)

Where no head has a positive product the score is exactly 0, so ties at the border of a choice are common. Of equal
scores the last keys win, however many there are and whatever is hidden among them: a text read at once and token by
token chooses the same. (Scores that differ by no more than rounding can still change places between the two.)

A choice has no gradient, so the language-modelling loss does not reach an indexer. It learns to foretell the attention
that it selects for, by a loss of its own (section 2.1.1):

    L = sum_t KL(p_t || softmax(I_t)),      p_t: attention weights of query t, summed over the heads, normalised

over all visible keys as long as attention is dense (`index_dense`, the warm-up), over the selected ones from then on.
Neither p nor what the indexer reads has a gradient, so that nothing else of the model feels this loss.

Shapes: B batch, T queries, S keys, H attention heads, J indexer heads, D a head's width.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from .host import host_can_read
from .precision import Float32Linear

# Products of queries and keys held at a time, over all heads: 64 MiB.
PRODUCTS_AT_ONCE = 2**24
# The same where a processor's cache is to hold them: 8 MiB.
PRODUCTS_IN_CACHE = 2**21


class TrainableIndexer(nn.Module):
    """Base of the indexers, by which their parameters are found."""

    def has_report(self) -> bool:
        """Whether its loss is of use: not in training if it is frozen, as beside adapters of other modules."""
        return not self.training or any(parameter.requires_grad for parameter in self.parameters())


# How well an indexer foretells the attention of its layer, one tensor [F, B, T] with these figures of every query. In
# training `loss` alone, KL(p || softmax(I)) in nats. The others are of queries that see more keys than are selected
# (`chooses`, 1 or 0), and 0 elsewhere; the K keys of largest p are the true choice:
#
#   recall, recent_recall   share of it that the indexer selects, and that the K most recent keys have
#   mass, recent_mass       share of p on the indexer's keys, and on the K most recent ones
#   random                  both shares for K keys at random, K / S
REPORT = ("loss", "chooses", "recall", "mass", "recent_recall", "recent_mass", "random")


def head_weights(projection: Float32Linear, hidden_states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Weights of the J indexer heads, in fp32 also under autocast: hidden states [B, T, d] -> [B, T, J]."""
    return projection(hidden_states) * (projection.out_features * head_dim) ** -0.5


def index_scores(query: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Scores of all keys for all queries, in fp32: rounding would choose other keys.

    Args:
        query: [B, J, T, D]. keys: [B, S, D].
        weights: [B, T, J], see `head_weights`.

    Returns:
        [B, T, S]. Keys that a query may not see are scored as well.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, keys_transposed, weights = query.float(), keys.float().transpose(-1, -2), weights.float()
        if query.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _index_scores_by_blocks(query, keys_transposed, weights)
        rows = max(1, PRODUCTS_AT_ONCE // max(1, query.shape[0] * query.shape[1] * keys.shape[-2]))
        scores = []
        for some_queries, some_weights in zip(query.split(rows, dim=2), weights.split(rows, dim=1), strict=True):
            # Heads and queries side by side: for each head the keys would be copied.
            products = (some_queries.flatten(1, 2) @ keys_transposed).unflatten(1, some_queries.shape[1:3])
            scores.append(torch.einsum("bjts,btj->bts", products.relu(), some_weights))
    return torch.cat(scores, dim=1)


def _index_scores_by_blocks(query: torch.Tensor, keys_transposed: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same in blocks of queries and keys whose products stay in a processor's cache, where they are summed up.

    Args:
        query: [B, J, T, D]. keys_transposed: [B, D, S]. weights: [B, T, J]. All in fp32.
    """
    batch, heads, tokens, _ = query.shape
    keys = keys_transposed.shape[-1]
    rows = min(tokens, max(1, PRODUCTS_IN_CACHE // (batch * heads * min(keys, 512))))
    columns = min(keys, max(512, PRODUCTS_IN_CACHE // (batch * heads * rows)))
    scores = query.new_empty(batch, tokens, keys)
    room = query.new_empty(batch * heads * rows * columns)  # new memory would have to be fetched for every block
    for start in range(0, tokens, rows):
        some_queries = query[:, :, start : start + rows].transpose(1, 2)  # [B, t, J, D]
        some_weights = weights[:, start : start + rows].unsqueeze(2)  # [B, t, 1, J]
        for first in range(0, keys, columns):
            block = keys_transposed[..., first : first + columns]  # [B, D, s]
            shape = (*some_queries.shape[:3], block.shape[-1])
            products = room[: math.prod(shape)].view(shape)  # [B, t, J, s]
            torch.bmm(some_queries.flatten(1, 2), block, out=products.flatten(1, 2))
            weighted = some_weights @ products.relu_()
            scores[:, start : start + rows, first : first + columns] = weighted.squeeze(2)
    return scores


def best_keys(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `best_of` chooses, as indices.

    Args:
        scores: [B, T, S] with S > `top_k`; -inf for hidden keys.

    Returns:
        Indices [B, T, K] in any order, and which of them are hidden keys, bool [B, T, K]: of queries that see fewer.
    """
    if not host_can_read(scores):
        indices = best_of(scores, top_k).byte().topk(top_k, dim=-1, sorted=False).indices
        return indices, scores.gather(-1, indices) == float("-inf")
    values, indices = scores.topk(top_k + 1, dim=-1)
    border, beyond = values[..., -2], values[..., -1]
    indices, hidden = indices[..., :-1], values[..., :-1] == float("-inf")
    # `topk` takes any of equal scores; which hidden ones it takes is the same.
    tied = (border == beyond) & ~hidden[..., -1]
    if tied.any():
        indices[tied] = best_of(scores[tied], top_k).nonzero()[:, -1].view(-1, top_k)
    return indices, hidden


def rows_at(rows: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, n] at indices [B, T, K] -> [B, T, K, n]."""
    batch, keys, width = rows.shape
    first = torch.arange(batch, device=indices.device)[:, None, None] * keys
    return rows.reshape(-1, width).index_select(0, (indices + first).flatten()).view(*indices.shape, width)


def best_of(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """True at the `top_k` largest of the last dimension, exactly; of equal ones the last are taken."""
    if scores.shape[-1] <= top_k:
        return torch.ones_like(scores, dtype=torch.bool)
    border = scores.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = scores > border, scores == border
    room = top_k - above.sum(dim=-1, keepdim=True)
    tied_from_here = tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return above | (tied & (tied_from_here <= room))


def indexer_report(
    scores: torch.Tensor,
    visible: torch.Tensor,
    selected: torch.Tensor,
    attention: Callable[[torch.Tensor], torch.Tensor],
    dense: bool,
    measure: bool,
    top_k: int,
) -> torch.Tensor:
    """Compares an indexer's scores with the attention of its layer.

    Args:
        scores: [B, T, S], with gradient.
        visible: bool [B, T, S], all keys that a query may see. selected: those of them that the indexer chooses.
        attention: attention weights summed over the heads, [B, T, S], for a mask of keys to attend to.
        dense: whether the layer attends to all visible keys, and not only to the selected ones.
        measure: also measure the choice.
        top_k: how many keys are selected, where so many are visible.

    Returns:
        The figures of `REPORT` [F, B, T], or without `measure` the loss alone [1, B, T].
    """
    attended = visible if dense else selected
    weights = normalised(attention(attended), attended)
    loss = kl_divergence(weights, scores, attended)
    if not measure:
        return loss.unsqueeze(0)
    if not dense:
        weights = normalised(attention(visible), visible)
    chosen, seen = selected.sum(dim=-1), visible.sum(dim=-1)
    chooses = seen > chosen
    rank_from_newest = visible.flip(-1).cumsum(-1).flip(-1)
    recent = visible & (rank_from_newest <= chosen.unsqueeze(-1))
    true_choice = best_of(weights.masked_fill(~visible, -1.0), top_k) & visible

    def where_chosen(share: torch.Tensor) -> torch.Tensor:
        return share.where(chooses, 0.0)

    def recall(keys: torch.Tensor) -> torch.Tensor:
        return where_chosen((keys & true_choice).sum(dim=-1) / true_choice.sum(dim=-1).clamp(min=1))

    def mass(keys: torch.Tensor) -> torch.Tensor:
        return where_chosen((weights * keys).sum(dim=-1))

    random = where_chosen(chosen / seen.clamp(min=1))
    figures = (chooses.float(), recall(selected), mass(selected), recall(recent), mass(recent), random)
    return torch.stack((loss, *figures))


def kl_divergence(weights: torch.Tensor, scores: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """KL(weights || softmax of scores over `keys`), all [B, T, S] -> [B, T]; 0 for a query without keys."""
    log_softmax = scores.masked_fill(~keys, torch.finfo(scores.dtype).min).log_softmax(dim=-1)
    terms = torch.xlogy(weights, weights) - weights * log_softmax
    return terms.where(keys, 0.0).sum(dim=-1)


def normalised(weights: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Weights [B, T, S] as a distribution over `keys`; zeros where there are none."""
    weights = weights * keys
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def head_summed_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention weights summed over the heads, in fp32, some queries at a time.

    Args:
        query: [B, H, T, D]. keys: [B, H, S, D], or [B, 1, S, D] where the heads share them.
        visible: bool [B, T, S].
        sinks: [H], logits that take weight from the keys.

    Returns:
        [B, T, S].
    """
    batch, heads, _, _ = query.shape
    keys_transposed = keys.float().transpose(-1, -2)
    rows = max(1, PRODUCTS_AT_ONCE // max(1, batch * heads * keys.shape[2]))
    sums = []
    with torch.autocast(query.device.type, enabled=False):
        for some_queries, seen in zip(query.split(rows, dim=2), visible.split(rows, dim=1), strict=True):
            logits = some_queries.float() @ keys_transposed * scaling  # [B, H, t, S]
            logits = logits.masked_fill(~seen.unsqueeze(1), torch.finfo(logits.dtype).min)
            if sinks is not None:
                sink = sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
                logits = torch.cat((logits, sink), dim=-1)
            sums.append((logits.softmax(dim=-1)[..., : keys.shape[2]] * seen.unsqueeze(1)).sum(dim=1))
    return torch.cat(sums, dim=1)

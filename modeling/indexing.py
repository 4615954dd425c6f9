"""What the indexers of sparse attention share: scores of keys for queries, and a choice that ties do not disturb.

An indexer is a very small attention whose scores only choose (DeepSeek-V3.2, arXiv 2512.02556, section 2.1):

    I_ts = sum_j w_tj relu(q_tj k_s),     w_t = W h_t / sqrt(J D)

Where no head has a positive product the score is exactly 0, so ties at the border of a choice are common. Of equal
scores the last keys win, however many there are and whatever is hidden among them: a text read at once and token by
token chooses the same. (Scores that differ by no more than rounding can still change places between the two.)

A choice has no gradient, so the language-modelling loss does not reach an indexer (the paper trains it by a KL loss of
its own). Its parameters are frozen: distributed training waits for the gradient of every other kind.

Shapes: B batch, T queries, S keys, J indexer heads, D their width.
"""

import torch
from torch import nn

from .precision import Float32Linear

# Products of queries and keys held at a time, over all indexer heads: 64 MiB.
PRODUCTS_AT_ONCE = 2**24


class FrozenIndexer(nn.Module):
    """Base of the indexers, by which loading knows whose parameters to freeze again."""


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
        keys_transposed = keys.float().transpose(-1, -2).unsqueeze(1)  # [B, 1, D, S]
        rows = max(1, PRODUCTS_AT_ONCE // max(1, query.shape[0] * query.shape[1] * keys.shape[-2]))
        scores = [
            torch.einsum("bjts,btj->bts", (some_queries.float() @ keys_transposed).relu(), some_weights.float())
            for some_queries, some_weights in zip(query.split(rows, dim=2), weights.split(rows, dim=1), strict=True)
        ]
    return torch.cat(scores, dim=1)


def best_of(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """True at the `top_k` largest of the last dimension, exactly; of equal ones the last are taken."""
    if scores.shape[-1] <= top_k:
        return torch.ones_like(scores, dtype=torch.bool)
    border = scores.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = scores > border, scores == border
    room = top_k - above.sum(dim=-1, keepdim=True)
    tied_from_here = tied.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
    return above | (tied & (tied_from_here <= room))

"""Which keys and entries some queries of a long text can see, for attention that reads a part of it at a time.

On a CPU places are looked at (`reach`). Where the host cannot read them (`host`), columns are counted: without padding
between tokens a query sees none but the `window` columns up to its own, and a row has one entry per block of tokens
before it. Padding is moved to the beginning of every row for that (`padding_before_tokens`).

Shapes: B batch, T query tokens, S key tokens, N entries, H heads, D head width, P rotary width, Q query latent width,
d width.
"""

from typing import NamedTuple

import torch

from .compressed_cache import NOWHERE, take_rows


class Queries(NamedTuple):
    """Tokens that attend, with what their entries are chosen by."""

    hidden_states: torch.Tensor  # [B, T, d]
    q_latent: torch.Tensor  # [B, T, Q]
    query: torch.Tensor  # [B, H, T, D]
    places: torch.Tensor  # [B, T]
    cos: torch.Tensor  # [B, T, P / 2]
    sin: torch.Tensor  # [B, T, P / 2]

    def ordered(self, order: torch.Tensor) -> "Queries":
        """The same in another order of columns [B, T]."""
        query = take_rows(self.query.transpose(1, 2), order).transpose(1, 2)
        others = {name: take_rows(each, order) for name, each in self._asdict().items() if name != "query"}
        return Queries(query=query, **others)


def reach(places: torch.Tensor, key_places: torch.Tensor, window: int | None) -> slice:
    """The range of keys, in `key_places` [B, S], outside of which no query at `places` [B, T] sees any.

    Without a window queries see everything before them.
    """
    newest = places.amax(dim=1, keepdim=True)
    near = (key_places <= newest) & (key_places != NOWHERE)  # [B, S]
    if window is not None:
        oldest = places.where(places != NOWHERE, newest).amin(dim=1, keepdim=True)
        near &= key_places > oldest - window
    indices = near.any(dim=0).nonzero().flatten().tolist()
    return slice(indices[0], indices[-1] + 1) if indices else slice(0)


def counted_reach(part: slice, queries: int, keys: int, window: int) -> slice:
    """As `reach`, for a part of T queries whose keys are the last of S columns, padding being first in every row."""
    past = keys - queries
    return slice(max(past + part.start - window + 1, 0), past + min(part.stop, queries))


def counted_entries(part: slice, queries: int, entries: int, block: int) -> int:
    """How many of N columns of entries a part of T queries may see, N being at least what all tokens complete.

    A row's tokens behind the part are as many as there are queries; each `block` of them have one entry.
    """
    behind = queries - min(part.stop, queries)
    return max(entries - behind // block, 0)


def padding_before_tokens(places: torch.Tensor) -> torch.Tensor:
    """The order [B, T] of columns in which every row begins with its padding; tokens stay in their order."""
    return (places != NOWHERE).byte().sort(dim=1, stable=True).indices


def put_back(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Undoes `take_rows(rows, order)`: rows [B, T, ...] go to the columns [B, T] that they came from."""
    index = order.view(*order.shape, *[1] * (rows.dim() - 2)).expand_as(rows)
    return torch.empty_like(rows).scatter(1, index, rows)


def part_of_selection(chosen: torch.Tensor, part: slice, count: int) -> tuple[torch.Tensor, None]:
    """What is selected already, bool [B, T, N], as `SlidingWindowAttention.select` returns it."""
    return chosen[:, part, :count], None


def only_chosen(entries: torch.Tensor, chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [B, N, D] that a single query reads, at most `most` of them as `chosen` [B, 1, N] says; in any order.

    Returns:
        Entries [B, M, D], M = `most` if there are so many, and which of them were chosen [B, 1, M].
    """
    chosen, order = chosen.squeeze(1).byte().topk(min(most, chosen.shape[-1]), sorted=False)
    return take_rows(entries, order), chosen.bool().unsqueeze(1)

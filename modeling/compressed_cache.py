"""What a window-and-compression layer (`compressed_attention`) remembers of the tokens before.

Three things, for every sequence of the batch:

    tokens    the newest rows of what the layer computed per token: keys of the window, inputs of the compressors
    entries   the compressed past, one entry per block of tokens
    places    where both stand, so that windows, blocks and documents are told apart without any mask

A *place* is one integer per token, `document * 2^32 + position`. Positions count from 0 in every document, so that two
places differ by less than the window exactly if the tokens are that close in the same document. Padding has a place
far below all others, which no query ever reaches. An entry stands where its last token stands.

Rows of a batch may be padded on the left, hence complete their blocks at different times: every row has its own
number of entries. Rows with fewer entries than others have empty places behind them.

Where the host cannot read places (`host`), there are as many columns of entries as tokens could have completed, and
padding is looked for only after `padded` has been set: an attention mask may hide tokens.

Shapes: B batch, T new tokens, S kept tokens, N entries, D any width.
"""

from collections.abc import Callable

import torch

from .cache_layers import FathomCacheLayer, StaticCacheLayer, append_rows, with_room
from .host import host_can_read

DOCUMENT = 2**32
NOWHERE = -(2**62)  # the place of padding, and of tokens and entries that a row has not yet


class CompressedCacheLayer(FathomCacheLayer):
    """Cache of one layer, growing.

    Args:
        window: number of newest tokens whose keys are needed by the next one, itself not counted.
        tail: number of newest tokens whose compressor inputs are needed to complete the next entry; 0 without entries.
        block: tokens per entry.
    """

    def __init__(self, window: int, tail: int, block: int):
        # Not the base's, which sets keys and values: here they are a view.
        self.window = window
        self.tail = tail
        self.block = block
        self.is_sliding = tail == 0
        self.record_past = False
        self.is_initialized = False
        self.length: int | torch.Tensor = 0
        self.tokens: dict[str, torch.Tensor] = {}  # [B, S, ...] of the newest S tokens; S differs, see `needed`
        self.entries: dict[str, torch.Tensor] = {}  # [B, N, ...]
        self.buffers: dict[str, torch.Tensor] = {}  # [B, C, ...] that entries are the beginning of, with room for more
        self.padded = False  # whether there may be padding among the tokens

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, 1, S, D], the window's keys, one head for all queries; None before the first token. Not the entries."""
        return self.tokens["window"].unsqueeze(1) if self.tokens else None

    # A key is its own value.
    values = keys  # type: ignore[assignment]

    def stores(self) -> tuple[dict[str, torch.Tensor], ...]:
        return self.tokens, self.entries

    def reset(self) -> None:
        self.is_initialized = False
        self.length = 0
        self.tokens, self.entries, self.buffers = {}, {}, {}
        self.padded = False

    def allocated_nbytes(self) -> int:
        empty = (buffer.nbytes - self.entries[name].nbytes for name, buffer in self.buffers.items())
        return super().allocated_nbytes() + sum(empty)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._change(change)
        self.buffers = {}

    def _move(self, device: torch.device | str) -> None:
        super()._move(device)
        self.buffers = {}

    def needed(self, name: str) -> int:
        """How many of the newest tokens of a stream the next token may need."""
        # At least one place tells whether the next token continues the document.
        return {"window": self.window, "places": max(self.window, self.tail, 1)}.get(name, self.tail)

    @property
    def last_places(self) -> torch.Tensor | None:
        """Place of every row's newest real token [B]; None before the first token."""
        return self.tokens["places"].amax(dim=1) if self.tokens else None

    def append_tokens(self, **streams: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds T tokens: `places` [B, T], `window` [B, T, D], and inputs of compressors [B, T, D] by any names.

        Returns:
            What their queries and compressors may need: every stream with the past that it needs, [B, S + T, D].
        """
        joined = {name: torch.cat((self.tokens[name], new), 1) if self.tokens else new for name, new in streams.items()}
        self.is_initialized = True
        self.device = streams["places"].device
        new_tokens = streams["places"].shape[1]
        self.length += new_tokens
        self.tokens = joined
        if not self.padded and host_can_read(streams["places"]):
            self.padded = int(streams["places"].min()) == NOWHERE
        if not self.record_past:
            self._forget()
        return {name: newest(rows, self.needed(name) + new_tokens) for name, rows in joined.items()}

    def expect_padding(self) -> None:
        """Says that there may be padding among the next tokens, where the host cannot look."""
        self.padded = True

    @property
    def may_hold_padding(self) -> bool:
        return self.padded

    def gains_entries(self, places: torch.Tensor) -> bool:
        """Whether any new token, at `places` [B, T], may complete a block; also at first, when there is no entry yet.

        Where the host cannot read places: always.
        """
        if not self.entries or not host_can_read(places):
            return True
        last = self.block - 1
        if places.shape[1] == 1:  # a step of decoding: read once, and not by five operations
            return any(place % DOCUMENT % self.block == last for place in places.flatten().tolist())
        return bool((places % DOCUMENT % self.block == last).any())

    def append_entries(self, **entries: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds entries [B, M, D] that stand at `places` [B, M], and returns all of them [B, N, D].

        Entries that stand NOWHERE are left out, row by row; rows that have fewer than others are filled at the end.
        """
        if not host_can_read(entries["places"]):
            return self._append_unread(entries)
        there = entries["places"] != NOWHERE  # [B, M]
        if self.entries and (there == there[:1]).all() and (self.entries["places"] != NOWHERE).all():
            # No row gains what others do not: nothing is to be moved, and the past is not copied.
            added = there[0].nonzero().flatten()
            if len(added):
                self.entries = {name: self._extended(name, rows[:, added]) for name, rows in entries.items()}
            return self.entries
        if self.entries:
            entries = {name: torch.cat((self.entries[name], new), 1) for name, new in entries.items()}
        self.buffers = {}
        # A stable sort moves the gaps of every row to its end and keeps the order of the entries.
        present, order = (entries["places"] != NOWHERE).to(torch.uint8).sort(dim=1, descending=True, stable=True)
        order = order[:, : int(present.sum(dim=1).max())]
        self.entries = {name: take_rows(rows, order) for name, rows in entries.items()}
        return self.entries

    def most_entries(self) -> int:
        """How many entries a row may have of the tokens so far: every one is made of a whole block."""
        return int(self.length) // self.block

    def _append_unread(self, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The same, with a number of columns that does not depend on places."""
        most, present = self.most_entries(), entries["places"] != NOWHERE  # [B, M]
        before = self.entries or {name: nothing(name, new, 0) for name, new in entries.items()}
        there_are = (before["places"] != NOWHERE).sum(dim=1, keepdim=True)
        # Behind the last column is one for what stands NOWHERE.
        row = torch.where(present, there_are + present.cumsum(dim=1) - 1, most)
        for name, new in entries.items():
            self.buffers[name] = self._written(name, before[name][:, :most], new, row, most + 1)
        self.entries = {name: buffer[:, :most] for name, buffer in self.buffers.items()}
        return self.entries

    def _written(
        self, name: str, rows: torch.Tensor, new: torch.Tensor, row: torch.Tensor, columns: int
    ) -> torch.Tensor:
        """Rows [B, N, ...] of a name, at least as many as `columns`, with `new` ones at `row` [B, M]."""
        count, index = rows.shape[1], along(row, new)
        if name == "places" or rows.requires_grad or new.requires_grad:
            longer = torch.cat((rows, nothing(name, rows, columns - count)), dim=1)
            return longer.scatter(1, index, new)
        buffer = with_room(self.buffers.get(name, rows), count, columns)
        # Columns with nothing in them are read under a mask, which does not silence a NaN.
        buffer[:, count:columns] = 0
        return buffer.scatter_(1, index, new)

    def _extended(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The entries of a name with new ones [B, M, ...] behind them, in their buffer or a larger one."""
        entries = self.entries[name]
        if name == "places":
            return torch.cat((entries, rows), dim=1)
        buffer = self.buffers.get(name, entries)
        if buffer.data_ptr() != entries.data_ptr():  # the entries have been replaced
            buffer = entries
        self.buffers[name] = append_rows(buffer, entries.shape[1], rows)
        return self.buffers[name][:, : entries.shape[1] + rows.shape[1]]

    def _forget(self) -> None:
        if all(rows.shape[1] <= self.needed(name) for name, rows in self.tokens.items()):
            return
        # To drop it before tokens, padding behind real ones has to be found.
        if self.padded and self._padding_may_follow_tokens():
            self.tokens = padding_first(self.tokens)
        self.tokens = {name: newest_alone(rows, self.needed(name)) for name, rows in self.tokens.items()}

    def _padding_may_follow_tokens(self) -> bool:
        places = self.tokens["places"]
        return not host_can_read(places) or bool(((places[:, :-1] != NOWHERE) & (places[:, 1:] == NOWHERE)).any())

    def activate_past_recording(self) -> None:
        """Keeps all tokens from now until the next `crop`, so that it can go back beyond the window."""
        self.record_past = True

    def keep(self, tokens: int) -> None:
        removed = int(self.length) - tokens
        for name, rows in self.tokens.items():
            if max(self._held(rows) - removed, 0) < min(self.needed(name), tokens):
                raise RuntimeError(
                    f"crop({-removed}) needs tokens that are no longer kept (window {self.window + 1}); "
                    f"call activate_past_recording() before the tokens that may be removed"
                )
        self._drop_newest(removed)

    def hide(self, hidden: torch.Tensor) -> None:
        """As in `FathomCacheLayer`; also gone are entries that hidden tokens completed."""
        self.padded = True
        places = self.tokens["places"]
        older = hidden.new_zeros(len(places), places.shape[1] - hidden.shape[1])
        self.tokens["places"] = places.masked_fill(torch.cat((older, hidden), dim=1), NOWHERE)
        self._remove_premature_entries()

    def batch_append(self, other: FathomCacheLayer) -> None:
        # The newest tokens stand at the end of every row, entries at its beginning. What a row lacks stands NOWHERE.
        for mine, theirs in zip(self.stores(), other.stores(), strict=True):
            for name, rows in mine.items():
                both = rows, theirs[name]
                most = max(part.shape[1] for part in both)
                filled = ((nothing(name, part, most - part.shape[1]), part) for part in both)
                ordered = (pair if mine is self.tokens else pair[::-1] for pair in filled)
                mine[name] = torch.cat([torch.cat(pair, dim=1) for pair in ordered])
        self.buffers = {}
        self.length = max(int(self.length), int(other.get_seq_length()))
        self.padded = self.padded or other.padded  # type: ignore[attr-defined]

    def drop_oldest(self, columns: int) -> None:
        self.length -= columns
        self.tokens = {name: newest(rows, int(self.length)).clone() for name, rows in self.tokens.items()}
        if self.entries:
            self._drop_gaps()

    def _drop_gaps(self) -> None:
        """Leaves out places of entries that are empty in every row; unread, those that must be."""
        self.append_entries(**{name: rows[:, :0] for name, rows in self.entries.items()})

    def _held(self, rows: torch.Tensor) -> int:
        """Number of tokens in the rows of a stream."""
        return min(rows.shape[1], int(self.length))

    def _drop_newest(self, removed: int) -> None:
        self.length -= removed
        self.tokens = {name: rows[:, : rows.shape[1] - removed] for name, rows in self.tokens.items()}
        self._remove_premature_entries()
        self._forget()

    def _remove_premature_entries(self) -> None:
        if not self.entries:
            return
        premature = self._premature_entries()
        if not host_can_read(premature) or premature.any():
            self.entries["places"] = self.entries["places"].masked_fill(premature, NOWHERE)
            self._drop_gaps()

    def _premature_entries(self) -> torch.Tensor:
        """[B, N], True for entries that were completed by tokens which are no longer there."""
        return self.entries["places"] > self.tokens["places"].amax(dim=1, keepdim=True)

    def nbytes(self) -> int:
        """Bytes of keys, compressor inputs and entries. Places are bookkeeping: `allocated_nbytes` counts them."""
        held = [rows[:, : self._held(rows)] for name, rows in self.tokens.items() if name != "places"]
        if self.entries:
            most = int((self.entries["places"] != NOWHERE).sum(dim=1).max())
            held += [rows[:, :most] for name, rows in self.entries.items() if name != "places"]
        return sum(rows.nbytes for rows in held)

    def get_seq_length(self) -> int:
        return self.length  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing were forgotten: no mask is made from it, transformers only asks."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("the layer starts with its first tokens, see append_tokens")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("what a token leaves behind is more than keys and values, see append_tokens")


class StaticCompressedCacheLayer(StaticCacheLayer, CompressedCacheLayer):
    """The same in tensors of fixed shapes, written in place. The tokens of one forward are of one document per row.

    Tokens are moved along by as many as come in; those that a row has not yet stand NOWHERE, at its beginning. Entries
    are written behind the ones there are, and those to come stand NOWHERE.

    Args:
        window, tail: as above.
        block: tokens per entry.
        max_cache_len: number of tokens that there is room for.
    """

    def __init__(self, window: int, tail: int, block: int, max_cache_len: int):
        CompressedCacheLayer.__init__(self, window, tail, block)
        StaticCacheLayer.__init__(self, max_cache_len)

    def reset(self) -> None:
        super().reset()
        for store in self.stores():
            if store:
                store["places"].fill_(NOWHERE)

    def append_tokens(self, **streams: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.tokens and len(self.tokens["places"]) != len(streams["places"]) and not int(self.length):
            self.tokens, self.entries = {}, {}  # another number of rows, after `reset`
        if not self.tokens:
            self.start(streams["places"].device)
            for name, new in streams.items():
                self.tokens[name] = self.fixed(nothing(name, new, self.room(name)))
        new_tokens = streams["places"].shape[1]
        self.length.add_(new_tokens)
        joined = {name: torch.cat((self.tokens[name], new), 1) for name, new in streams.items()}
        kept = joined if self.record_past else self._without_padding(joined, new_tokens)
        for name, rows in kept.items():
            self.tokens[name].copy_(newest(rows, self.tokens[name].shape[1]))
        return {name: newest(rows, self.needed(name) + new_tokens) for name, rows in joined.items()}

    def _without_padding(self, joined: dict[str, torch.Tensor], new_tokens: int) -> dict[str, torch.Tensor]:
        """Once tokens are dropped, drops padding first: it may stand behind real tokens."""
        full = self.length > min(rows.shape[1] for rows in self.tokens.values())
        if new_tokens > 1:
            return padding_first(joined, full)
        # A single one is left out itself, or pushes the oldest out: nothing to sort in every step of decoding.
        padding = full & (joined["places"][:, -1] == NOWHERE)
        return {
            name: torch.where(padding.view(-1, *[1] * (rows.dim() - 1)), rows[:, :-1], rows[:, 1:])
            for name, rows in joined.items()
        }

    def room(self, name: str) -> int:
        """Number of rows of a stream."""
        return self.max_cache_len if self.record_past else min(self.needed(name), self.max_cache_len)

    def expect_padding(self) -> None:
        pass

    @property
    def may_hold_padding(self) -> bool:
        return True  # unknown, as what is asked in a compiled graph may not change

    def gains_entries(self, places: torch.Tensor) -> bool:
        return True  # so that entries of fixed shape are there from the first forward on

    def most_entries(self) -> int:
        return self.max_cache_len // self.block

    def append_entries(self, **entries: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.entries:
            for name, new in entries.items():
                # One row more than there can be takes what stands NOWHERE.
                self.entries[name] = self.fixed(nothing(name, new, self.most_entries() + 1))
        present = entries["places"] != NOWHERE  # [B, M]
        there_are = (self.entries["places"] != NOWHERE).sum(dim=1, keepdim=True)
        row = torch.where(present, there_are + present.cumsum(dim=1) - 1, self.most_entries())
        for name, new in entries.items():
            self.entries[name].scatter_(1, along(row, new), new)
        return {name: rows[:, :-1] for name, rows in self.entries.items()}

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        for name, rows in self.tokens.items():
            if more := self.room(name) - rows.shape[1]:
                self.tokens[name] = self.fixed(torch.cat((nothing(name, rows, more), rows), dim=1))

    def hide(self, hidden: torch.Tensor) -> None:
        newest(self.tokens["places"], hidden.shape[1]).masked_fill_(hidden, NOWHERE)
        self._remove_premature_entries()

    def _drop_newest(self, removed: int) -> None:
        self.length.sub_(removed)
        for name, rows in self.tokens.items():
            kept = rows[:, : rows.shape[1] - removed]
            rows.copy_(torch.cat((nothing(name, rows, rows.shape[1] - kept.shape[1]), kept), dim=1))
        self._remove_premature_entries()

    def _remove_premature_entries(self) -> None:
        if self.entries:
            self.entries["places"].masked_fill_(self._premature_entries(), NOWHERE)


def nothing(name: str, like: torch.Tensor, count: int) -> torch.Tensor:
    """Rows [B, count, ...] that no query and no block reaches: zeros that stand NOWHERE."""
    return like.new_full((like.shape[0], count, *like.shape[2:]), NOWHERE if name == "places" else 0)


def along(order: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Indices [B, M] as `gather` and `scatter` want them for rows [B, N, ...]: [B, M, ...]."""
    return order.view(*order.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:])


def take_rows(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, ...] in another order [B, M] -> [B, M, ...]."""
    return rows.gather(1, along(order.to(rows.device), rows))


def newest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens of [B, S, ...]; all, if there are fewer."""
    return rows if count >= rows.shape[1] else rows[:, rows.shape[1] - count :]


def newest_alone(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The same as `newest`, to be kept: as a copy where a part of the tensor would hold more than twice its size."""
    kept = newest(rows, count)
    return kept.clone() if rows.shape[1] > 2 * count else kept


def padding_first(streams: dict[str, torch.Tensor], where: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Moves padding to the beginning of every row, so that what is dropped there first is no token.

    Args:
        streams: rows [B, S, ...] that end with the same token; `places` has the most. A shorter stream holds whatever
            its user needs, so that rows which it lacks are not asked for.
        where: bool, whether to move anything; None: yes.
    """
    stays = streams["places"] != NOWHERE
    if where is not None:
        stays = stays | ~where
    order = stays.to(torch.uint8).sort(dim=1, stable=True).indices
    most = order.shape[1]
    return {
        name: take_rows(rows, (order[:, most - rows.shape[1] :] - (most - rows.shape[1])).clamp(min=0))
        for name, rows in streams.items()
    }


def token_places(
    position_ids: torch.Tensor, token_mask: torch.Tensor | None, last_places: torch.Tensor | None = None
) -> torch.Tensor:
    """Places of new tokens: a token whose position does not follow the one before begins a new document.

    Args:
        position_ids: [B, T].
        token_mask: [B, T], True for real tokens; padding between them is skipped. None: all are real.
        last_places: [B], the newest place in the cache, or NOWHERE.

    Returns:
        int64 [B, T], non-decreasing along a row but for padding, which is NOWHERE.
    """
    positions = position_ids.long()
    real = torch.ones_like(positions, dtype=torch.bool) if token_mask is None else token_mask
    # Of another number of rows are those of a static cache after `reset`.
    if last_places is None or len(last_places) != len(positions):
        last_places = positions.new_full(positions.shape[:1], NOWHERE)
    started = last_places != NOWHERE
    previous = torch.where(started, last_places % DOCUMENT, -2).unsqueeze(1)
    if positions.shape[1] > 1:
        # Index of the newest real token before each one, -1 for none in this chunk.
        index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
        newest_real = torch.where(real, index, -1).cummax(dim=1).values
        before = torch.cat((torch.full_like(newest_real[:, :1], -1), newest_real[:, :-1]), dim=1)
        previous = torch.where(before >= 0, positions.gather(1, before.clamp(min=0)), previous)
    begins = real & (positions != previous + 1)
    first = torch.where(started, last_places // DOCUMENT, -1).unsqueeze(1)
    documents = first + begins.cumsum(dim=1)
    return torch.where(real, documents * DOCUMENT + positions, NOWHERE)

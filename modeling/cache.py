"""What a window-and-compression layer (`compressed_attention`) remembers of the tokens before.

Three things, for every sequence of the batch:

    tokens    the newest rows of what the layer computed per token: keys of the window, inputs of the compressors
    entries   the compressed past, one entry per block of tokens
    places    where both stand, so that windows, blocks and documents are told apart without any mask

A *place* is one integer per token, `document * 2^32 + position`. Positions count from 0 in every document, so that two
places differ by less than the window exactly if the tokens are that close in the same document. Padding has a place
far below all others, which no query ever reaches. An entry stands where its last token stands.

Rows of a batch may be padded on the left, hence complete their blocks at different times: every row has its own
number of entries.

Shapes: B batch, T new tokens, S kept tokens, N entries, D any width.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

DOCUMENT = 2**32
NOWHERE = -(2**62)  # the place of padding, and of entries that a row has not yet


class CompressedCacheLayer(CacheLayerMixin):
    """Cache of one layer.

    Args:
        window: number of newest tokens whose keys are needed by the next one, itself not counted.
        tail: number of newest tokens whose compressor inputs are needed to complete the next entry.
    """

    is_sliding = True
    is_croppable = True
    supports_early_init = False

    def __init__(self, window: int, tail: int):
        super().__init__()
        self.window = window
        self.tail = tail
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.seen_tokens = 0
        self.tokens: dict[str, torch.Tensor] = {}  # [B, S, ...] of the newest S tokens; S differs, see `needed`
        self.entries: dict[str, torch.Tensor] = {}  # [B, N, ...]

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
            What their queries and compressors may need: every stream with the past that is kept of it, [B, S + T, D].
        """
        joined = {name: torch.cat((self.tokens[name], new), 1) if self.tokens else new for name, new in streams.items()}
        self.is_initialized = True
        self.seen_tokens += streams["places"].shape[1]
        self.tokens = joined
        if not self.record_past:
            self._forget()
        return joined

    def append_entries(self, **entries: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds entries [B, M, D] that stand at `places` [B, M], and returns all of them [B, N, D].

        Entries that stand NOWHERE are left out, row by row; rows that have fewer than others are filled at the end.
        """
        if self.entries and not (entries["places"] != NOWHERE).any():
            return self.entries
        return self._pack(entries)

    def _pack(self, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Puts entries behind the ones there are, without gaps."""
        if self.entries:
            entries = {name: torch.cat((self.entries[name], new), 1) for name, new in entries.items()}
        # A stable sort moves the gaps of every row to its end and keeps the order of the entries.
        present, order = (entries["places"] != NOWHERE).to(torch.uint8).sort(dim=1, descending=True, stable=True)
        order = order[:, : int(present.sum(dim=1).max())]
        self.entries = {name: take_rows(rows, order) for name, rows in entries.items()}
        return self.entries

    def _forget(self) -> None:
        self.tokens = {name: newest(rows, self.needed(name)) for name, rows in self.tokens.items()}

    def activate_past_recording(self) -> None:
        """Keeps all tokens from now until the next `crop`, so that it can go back beyond the window."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest `-tokens_to_remove` tokens, exactly: the next token finds what it would have found then.

        Raises:
            ValueError: a positive number.
            RuntimeError: tokens that would be needed again are gone; `activate_past_recording` keeps them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        left = self.seen_tokens + tokens_to_remove
        if left <= 0:
            self.reset()
            return
        for name, rows in self.tokens.items():
            if rows.shape[1] + tokens_to_remove < min(self.needed(name), left):
                raise RuntimeError(
                    f"crop({tokens_to_remove}) needs tokens that are no longer kept (window {self.window + 1}); "
                    f"call activate_past_recording() before the tokens that may be removed"
                )
        self.seen_tokens = left
        self.tokens = {name: rows[:, : rows.shape[1] + tokens_to_remove] for name, rows in self.tokens.items()}
        if self.entries:
            gone = self.entries["places"] > self.tokens["places"].amax(dim=1, keepdim=True)
            self.entries["places"] = self.entries["places"].masked_fill(gone, NOWHERE)
            self._pack({name: rows[:, :0] for name, rows in self.entries.items()})
        self._forget()

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor; the batch is the first dimension of all."""
        self.tokens = {name: change(rows) for name, rows in self.tokens.items()}
        self.entries = {name: change(rows) for name, rows in self.entries.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda rows: rows[indices])

    def nbytes(self) -> int:
        """Bytes held now, places included."""
        return sum(rows.numel() * rows.element_size() for rows in [*self.tokens.values(), *self.entries.values()])

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if nothing were forgotten: no mask is made from it, transformers only asks."""
        return self.seen_tokens + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("the layer starts with its first tokens, see append_tokens")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("what a token leaves behind is more than keys and values, see append_tokens")


def take_rows(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows [B, N, ...] in another order [B, M] -> [B, M, ...]."""
    return rows.gather(1, order.view(*order.shape, *[1] * (rows.dim() - 2)).expand(-1, -1, *rows.shape[2:]))


def newest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` tokens of [B, S, ...]; all, if there are fewer."""
    return rows[:, max(rows.shape[1] - count, 0) :]


def adopt_cache(cache: Cache, config) -> None:
    """Replaces the layers of a new `cache` by what the config's token mixers need.

    transformers makes caches by its own table of layer types. Ours are put in here rather than into that table,
    where they would take the place of those of its own DeepSeek-V4.

    Raises:
        ValueError: a static cache, or one that was filled by another model.
    """
    for index in range(config.num_hidden_layers):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, CompressedCacheLayer):
            continue
        if isinstance(layer, StaticLayer):
            raise ValueError("swa, csa and hca layers have no static cache yet; leave cache_implementation unset")
        if layer is not None and layer.is_initialized:
            raise ValueError(f"layer {index} of the cache was filled by another kind of model; start with a new cache")
        own = cache_layer(config, index)
        own.record_past = getattr(layer, "record_past", False)
        cache.layers[index : index + 1] = [own]


def cache_layer(config, layer_idx: int) -> CompressedCacheLayer:
    """An empty cache of `model.layers.{layer_idx}`."""
    tail = {
        "swa": 0,
        # The unfinished block, and before it the one whose tokens the next entry also reads.
        "csa": 2 * config.compress_rate_csa - 1,
        "hca": config.compress_rate_hca - 1,
    }
    return CompressedCacheLayer(config.sliding_window - 1, tail[config.token_mixer(layer_idx)])


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
    if last_places is None:
        last_places = positions.new_full(positions.shape[:1], NOWHERE)
    # Index of the newest real token before each one, -1 for none in this chunk.
    index = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
    newest_real = torch.where(real, index, -1).cummax(dim=1).values
    before = torch.cat((torch.full_like(newest_real[:, :1], -1), newest_real[:, :-1]), dim=1)
    started = last_places != NOWHERE
    previous = torch.where(
        before >= 0,
        positions.gather(1, before.clamp(min=0)),
        torch.where(started, last_places % DOCUMENT, -2).unsqueeze(1),
    )
    begins = real & (positions != previous + 1)
    first = torch.where(started, last_places // DOCUMENT, -1).unsqueeze(1)
    documents = first + begins.cumsum(dim=1)
    return torch.where(real, documents * DOCUMENT + positions, NOWHERE)

"""What every layer of a cache can do, and the layers of mixers that read keys and values (`mha`, `mla`, `dsa`).

A layer's tensors stand in dictionaries (`stores`), the batch first in every one of them: reordering beams, repeating
and selecting rows and moving to another device are written once for all kinds. A kind adds how tokens come in and how
the newest of them go again. It comes in two forms:

    growing  tensors that are full are made larger by half: a token costs no copy of the past
    static   tensors are made once and written in place, and the length is a tensor: `torch.compile` sees one shape

Windows and compressed entries: see `compressed_cache`.

Shapes: B batch, H heads, T new tokens, S tokens in the cache, C tokens there is room for, D any width.
"""

import copy
from collections.abc import Callable

import torch
from transformers.cache_utils import CacheLayerMixin


class FathomCacheLayer(CacheLayerMixin):
    """What all kinds have in common."""

    is_croppable = True
    is_sliding = False  # whether its size has a limit: transformers can leave such layers out of offloading
    supports_early_init = False  # shapes are those of the first tokens, and differ by kind
    device: torch.device

    def stores(self) -> tuple[dict[str, torch.Tensor], ...]:
        """Where all tensors of the layer stand."""
        raise NotImplementedError

    def nbytes(self) -> int:
        """Bytes held for tokens: keys, values, latents, entries, and what unfinished blocks need."""
        raise NotImplementedError

    def allocated_nbytes(self) -> int:
        """Bytes of all tensors: what `nbytes` counts, room that is still empty, and places (`compressed_cache`)."""
        return sum(rows.nbytes for store in self.stores() for rows in store.values())

    def activate_past_recording(self) -> None:
        """Says that tokens may be removed again; only layers that forget have to act on it."""

    def keep(self, tokens: int) -> None:
        """Forgets all but the first `tokens`, at least one and at most all, exactly."""
        raise NotImplementedError

    def hide(self, hidden: torch.Tensor) -> None:
        """Turns those of the newest T tokens into padding that `hidden` says, bool [B, T].

        Nothing has to be done where an attention mask decides what is seen; the next one must say the same.
        """

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest `-tokens_to_remove` tokens, exactly: the next token finds what it would have found then.

        Raises:
            ValueError: a positive number.
            RuntimeError: tokens that would be needed again are gone; `activate_past_recording` keeps them.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number")
        left = int(self.get_seq_length()) + tokens_to_remove
        if left > 0:
            self.keep(left)
        else:
            self.reset()

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every tensor by one with other rows of the batch."""
        for store in self.stores():
            for name, rows in store.items():
                store[name] = change(rows)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda rows: rows[indices.to(rows.device)])

    def copied(self) -> "FathomCacheLayer":
        """A layer with the same tensors, which changes of rows in one of the two do not reach."""
        other = copy.copy(self)
        for name, store in vars(self).items():
            if isinstance(store, dict):
                setattr(other, name, dict(store))
        return other

    def batch_append(self, other: "FathomCacheLayer") -> None:
        """Puts the rows of another filled layer of this kind below these; all of them end in the same column.

        Shorter rows begin with padding, which an attention mask has to hide.
        """
        raise NotImplementedError

    def drop_oldest(self, columns: int) -> None:
        """Forgets so many columns at the beginning, which are padding in every row that is left."""
        raise NotImplementedError

    def _move(self, device: torch.device | str) -> None:
        """Places stay: they are small, and the next forward reads them before it comes to the layer."""
        for store in self.stores():
            for name, rows in store.items():
                if name != "places":
                    store[name] = rows.to(device, non_blocking=True)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)


class KeyValueCacheLayer(FathomCacheLayer):
    """Keys and values of all tokens, in buffers that grow by half."""

    def __init__(self) -> None:
        # Not the base's, which sets keys and values: here they are views of what the buffers hold.
        self.reset()

    def reset(self) -> None:
        self.is_initialized = False
        self.length = 0
        self.buffers: dict[str, torch.Tensor] = {}  # [B, H, C, D]

    def stores(self) -> tuple[dict[str, torch.Tensor], ...]:
        return (self.buffers,)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, H, S, D], or None before the first token."""
        return self.buffers["keys"][..., : self.length, :] if self.buffers else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, H, S, D'], or None before the first token."""
        return self.buffers["values"][..., : self.length, :] if self.buffers else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device = key_states.device
        self.buffers.update(keys=key_states[..., :0, :], values=value_states[..., :0, :])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys [B, H, T, D] and values [B, H, T, D'], and returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for name, new in (("keys", key_states), ("values", value_states)):
            self.buffers[name] = append_rows(self.buffers[name], self.length, new)
        self.length += key_states.shape[-2]
        return self.keys, self.values  # type: ignore[return-value]

    def take(self, tokens: int) -> int:
        """Counts so many tokens more, whose keys and values the caller writes into `buffers`; there is room for them.

        Returns:
            The column of the first.
        """
        start, self.length = self.length, self.length + tokens
        for name, rows in self.buffers.items():
            self.buffers[name] = with_room(rows, start, self.length)
        return start

    def keep(self, tokens: int) -> None:
        self.length = tokens

    def batch_append(self, other: FathomCacheLayer) -> None:
        longest = max(self.length, other.length)  # type: ignore[attr-defined]
        for name, rows in self.buffers.items():
            both = rows[..., : self.length, :], other.buffers[name][..., : other.length, :]  # type: ignore[attr-defined]
            # Room for the tokens to come; the next one would copy everything again.
            joined = rows.new_empty(sum(map(len, both)), rows.shape[1], longest + longest // 2, rows.shape[-1])
            start = 0
            for part in both:
                target = joined[start : start + len(part)]
                # Weights of 0 do not silence a NaN in memory that nothing was written to.
                target[:, :, : longest - part.shape[2]] = 0
                target[:, :, longest - part.shape[2] : longest] = part
                start += len(part)
            self.buffers[name] = joined
        self.length = longest

    def drop_oldest(self, columns: int) -> None:
        # Copies, or the memory would stay in use.
        self.buffers = {name: rows[..., columns : self.length, :].clone() for name, rows in self.buffers.items()}
        self.length -= columns

    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes if self.buffers else 0  # type: ignore[union-attr]

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0


def append_rows(buffer: torch.Tensor, length: int, rows: torch.Tensor) -> torch.Tensor:
    """Puts `rows` [B, H, T, D] behind the first `length` of `buffer` [B, H, C, D].

    Returns:
        The same buffer, or a larger one where it has no room or must not be written: what a gradient may still need,
        and tensors of inference mode outside of it.
    """
    end = length + rows.shape[-2]
    if length == 0:
        return rows
    if rows.shape[-1] == 0:  # what mixers leave empty
        return rows.new_empty(*rows.shape[:-2], end, 0)
    if rows.requires_grad or buffer.requires_grad:
        return torch.cat((buffer[..., :length, :], rows), dim=-2)
    buffer = with_room(buffer, length, end)
    buffer[..., length:end, :] = rows
    return buffer


def with_room(buffer: torch.Tensor, length: int, end: int) -> torch.Tensor:
    """A buffer [B, H, C, D], larger by half if it must be, whose columns up to `end` may be written to.

    Tensors of inference mode may not, outside of it.
    """
    if end <= buffer.shape[-2] and (not buffer.is_inference() or torch.is_inference_mode_enabled()):
        return buffer
    larger = buffer.new_empty(*buffer.shape[:-2], end + end // 2, buffer.shape[-1])
    larger[..., :length, :] = buffer[..., :length, :]
    return larger


class StaticCacheLayer(FathomCacheLayer):
    """What the static forms have in common."""

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        self.max_cache_len = max_cache_len
        self.is_initialized = False
        # Were it a number, a compiled step would be compiled again for every token.
        self.length = torch.zeros((), dtype=torch.int64)

    def start(self, device: torch.device) -> None:
        self.device = device
        if self.length.device != device:
            self.length = torch.zeros_like(self.length, device=device)
        self.length = self.fixed(self.length)
        self.is_initialized = True

    def fixed(self, rows: torch.Tensor) -> torch.Tensor:
        """Tells CUDA graphs that the tensor stays where it is."""
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(rows)
        return rows

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for store in self.stores():
            for name, rows in store.items():
                changed = change(rows)
                store[name] = rows.copy_(changed) if changed.shape == rows.shape else self.fixed(changed)

    def reset(self) -> None:
        self.length.zero_()
        for store in self.stores():
            for rows in store.values():
                rows.zero_()

    def get_seq_length(self) -> torch.Tensor | int:  # type: ignore[override]
        return self.length if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0


class StaticKeyValueCacheLayer(StaticCacheLayer):
    """Keys and values with room for `max_cache_len` tokens; which of them are written is for the mask to say."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.buffers: dict[str, torch.Tensor] = {}  # [B, H, C, D]

    def stores(self) -> tuple[dict[str, torch.Tensor], ...]:
        return (self.buffers,)

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, H, C, D], meaningless after the newest token; None before the first."""
        return self.buffers.get("keys")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """[B, H, C, D'], meaningless after the newest token; None before the first."""
        return self.buffers.get("values")

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.start(key_states.device)
        for name, new in (("keys", key_states), ("values", value_states)):
            self.buffers[name] = self.fixed(new.new_zeros(*new.shape[:2], self.max_cache_len, new.shape[-1]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds keys [B, H, T, D] and values [B, H, T, D'], and returns both buffers."""
        # After `reset` another number of rows may come.
        others = self.is_initialized and len(self.buffers["keys"]) != len(key_states) and not int(self.length)
        if not self.is_initialized or others:
            self.lazy_initialization(key_states, value_states)
        positions = torch.arange(key_states.shape[-2], device=self.device) + self.length
        self.length.add_(key_states.shape[-2])
        for name, new in (("keys", key_states), ("values", value_states)):
            self.buffers[name].index_copy_(2, positions, new)
        return self.buffers["keys"], self.buffers["values"]

    def take(self, tokens: int) -> int | None:
        """As in the growing form; None where there is no room."""
        start = int(self.length)
        if start + tokens > self.max_cache_len:
            return None
        self.length.add_(tokens)
        return start

    def keep(self, tokens: int) -> None:
        self.length.fill_(tokens)

    def nbytes(self) -> int:
        return sum(rows[:, :, : int(self.length)].nbytes for rows in self.buffers.values())

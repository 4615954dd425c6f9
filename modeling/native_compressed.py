"""Decoder layers with a compressed past, by two native calls (`kernels/layers.h`).

What such a layer remembers is kept by `compressed_cache` in PyTorch: most steps append a token there and complete no
entry. Before it the first call makes queries, keys and contributions; behind it the second chooses entries, attends and
goes through the channel mixer.
"""

import ctypes

import torch
from torch import nn
from transformers.cache_utils import Cache

from .cache import FathomCache
from .compressed_cache import CompressedCacheLayer
from .fused import kernels_for
from .native_arguments import PLAIN, fits
from .native_layer import NativeLayer, native_layer
from .native_step import output_of, step_of
from .native_structures import Between, Memory


def decode_compressed(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    places: torch.Tensor,
    cache: Cache | None,
    token_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    rotations: dict | None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`FathomDecoderLayer.forward` of a step: streams [B, T, d] or [B, T, n, d], and the experts' tokens [E].

    Returns:
        None where modules have to be called one by one, and nothing has been done.
    """
    if not isinstance(cache, FathomCache) or cache.offloading:
        return None
    batch, tokens = hidden_states.shape[:2]
    places = places.contiguous()
    kernels = kernels_for(layer.training, batch * tokens, hidden_states)
    if kernels is None:
        return None
    native, mixer = native_layer(layer), layer.self_attn
    if native.decodes != "compressed" or native.dtype is not hidden_states.dtype or not native.is_free():
        return None
    cache = cache.layer(mixer.layer_idx)
    if places.shape != hidden_states.shape[:2] or not fits(places, torch.int64, batch, tokens):
        return None
    if not isinstance(cache, CompressedCacheLayer) or not _continues(native, cache, batch):
        return None
    rotation = mixer.rotation(hidden_states, places, rotations)
    step = step_of(native, hidden_states, rotation, None, token_mask, input_ids)
    if step is None:
        return None

    sizes, new = native.layer.compressed, hidden_states.new_empty
    streams_count = native.layer.token_connection.n
    x, latent = new(batch, tokens, native.layer.width), new(batch, tokens, sizes.q_rank)
    queries = new(batch, tokens, sizes.heads, sizes.head)
    mixing = torch.empty(batch, tokens, streams_count, streams_count + 1)  # `post`, and behind all of it `residual`
    post = mixing.data_ptr()
    residual = post + batch * tokens * streams_count * mixing.element_size()
    between = Between(x.data_ptr(), post, residual, queries.data_ptr(), latent.data_ptr())
    between.owners = x, mixing, queries, latent
    streams = {"places": places, "window": new(batch, tokens, sizes.head)}
    widths = {"compressor": sizes.contribution, "indexer": sizes.index_contribution}
    streams |= {name: new(batch, tokens, 2 * width) for name, width in widths.items() if width}
    made = [streams[name].data_ptr() if name in streams else None for name in ("window", *widths)]
    pointers = native.address, ctypes.addressof(step)
    begin = kernels.functions.begin_compressed
    if not begin(*pointers, hidden_states.data_ptr(), ctypes.addressof(between), *made):
        return None

    # From here on the cache has the tokens: what does not fit cannot be left to the modules any more.
    streams = cache.append_tokens(**streams)
    entries = mixer.entries(streams, places, cache) if mixer.compressor is not None else {}
    memory = _memory(native, streams, entries)
    output, counts = output_of(native, hidden_states)
    done = kernels.functions.end_compressed(
        *pointers,
        ctypes.addressof(memory),
        places.data_ptr(),
        hidden_states.data_ptr(),
        ctypes.addressof(between),
        output.data_ptr(),
        None if counts is None else counts.data_ptr(),
    )
    if not done:
        raise RuntimeError("token ids or their experts were changed while a layer read them")
    return output, counts


def _continues(native: NativeLayer, cache: CompressedCacheLayer, batch: int) -> bool:
    """Whether a layer of the cache has tokens of this layer, and as many rows as the batch."""
    sizes, number = native.layer.compressed, native.dtype
    places, key = (torch.int64, ()), (number, (sizes.head,))
    tokens, entries = {"places": places, "window": key}, {"places": places, "compressor": key}
    if sizes.contribution:
        tokens["compressor"] = number, (2 * sizes.contribution,)
    if sizes.index_contribution:
        tokens["indexer"] = number, (2 * sizes.index_contribution,)
        entries["indexer"] = number, (native.layer.indexer.width,)
    return all(
        store.keys() == kinds.keys() and all(_is_store(store[name], batch, *kind) for name, kind in kinds.items())
        for store, kinds in ((cache.tokens, tokens), (cache.entries, entries if cache.entries else {}))
    )


def _is_store(rows: torch.Tensor, batch: int, dtype: torch.dtype, width: tuple[int, ...]) -> bool:
    """Whether rows are [B, S, ...] of that dtype and width, in memory."""
    shape = rows.shape
    return shape[0] == batch and shape[2:] == width and rows.dtype is dtype and rows.is_cpu and type(rows) in PLAIN


def _memory(native: NativeLayer, streams: dict[str, torch.Tensor], entries: dict[str, torch.Tensor]) -> Memory:
    """Window and entries as native functions read them.

    Raises:
        RuntimeError: the cache's tensors are not of one length.
    """
    keys = _side_by_side(streams["window"])
    batch, count = keys.shape[:2]
    places = _side_by_side(streams["places"][:, -count:])
    read = {name: _side_by_side(rows) for name, rows in entries.items()}
    entry_count = read["places"].shape[1] if read else 0
    lengths = [(places, count), *((rows, entry_count) for rows in read.values())]
    if any(rows.shape[:2] != (batch, length) for rows, length in lengths):
        raise RuntimeError(
            f"a layer of the cache has {[*map(_shape, (keys, places, *read.values()))]} tokens and entries"
        )
    memory = Memory(keys.data_ptr(), keys.stride(0), count, places.data_ptr(), places.stride(0))
    if read:
        own, entry_places = read["compressor"], read["places"]
        memory.entries, memory.entries_stride, memory.count = own.data_ptr(), own.stride(0), entry_count
        memory.entry_places, memory.entry_places_stride = entry_places.data_ptr(), entry_places.stride(0)
    if "indexer" in read:
        memory.index_entries, memory.index_stride = read["indexer"].data_ptr(), read["indexer"].stride(0)
    memory.owners = keys, places, read
    return memory


def _shape(rows: torch.Tensor) -> tuple[int, ...]:
    return tuple(rows.shape)


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, ...] whose numbers follow one another."""
    return rows if rows[:1].is_contiguous() else rows.contiguous()

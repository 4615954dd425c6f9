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
from .native_layer import Between, Memory, native_layer, output_of, step_of


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
    batch, tokens = places.shape
    kernels = kernels_for(layer.training, batch * tokens, hidden_states)
    if kernels is None:
        return None
    native, mixer = native_layer(layer), layer.self_attn
    if native.decodes != "compressed" or native.dtype is not hidden_states.dtype or not native.is_free():
        return None
    cache = cache.layer(mixer.layer_idx)
    if not isinstance(cache, CompressedCacheLayer) or not cache.tokens:
        return None

    places = places.contiguous()
    rotation = mixer.rotation(hidden_states, places, rotations)
    step, _kept = step_of(hidden_states, rotation, None, token_mask, input_ids)
    sizes, new = native.layer.compressed, hidden_states.new_empty
    streams_count = native.layer.token_connection.n
    x, latent = new(batch, tokens, native.layer.width), new(batch, tokens, sizes.q_rank)
    queries = new(batch, tokens, sizes.heads, sizes.head)
    mixing = torch.empty(batch, tokens, streams_count, streams_count + 1)  # `post`, and behind all of it `residual`
    post = mixing.data_ptr()
    residual = post + batch * tokens * streams_count * mixing.element_size()
    between = Between(x.data_ptr(), post, residual, queries.data_ptr(), latent.data_ptr())
    streams = {"places": places, "window": new(batch, tokens, sizes.head)}
    widths = {"compressor": sizes.contribution, "indexer": sizes.index_contribution}
    streams |= {name: new(batch, tokens, 2 * width) for name, width in widths.items() if width}
    made = [streams[name].data_ptr() if name in streams else None for name in ("window", *widths)]
    pointers = native.address, ctypes.byref(step)
    kernels.functions.begin_compressed(*pointers, hidden_states.data_ptr(), ctypes.byref(between), *made)

    streams = cache.append_tokens(**streams)
    entries = mixer.entries(streams, places, cache) if mixer.compressor is not None else {}
    memory, _also_kept = _memory(streams, entries)
    output, counts = output_of(native, hidden_states)
    kernels.functions.end_compressed(
        *pointers,
        ctypes.byref(memory),
        places.data_ptr(),
        hidden_states.data_ptr(),
        ctypes.byref(between),
        output.data_ptr(),
        None if counts is None else counts.data_ptr(),
    )
    return output, counts


def _memory(streams: dict[str, torch.Tensor], entries: dict[str, torch.Tensor]) -> tuple[Memory, tuple]:
    """Window and entries as native functions read them, and what has to be kept for so long."""
    keys = _side_by_side(streams["window"])
    places = _side_by_side(streams["places"][:, -keys.shape[1] :])
    memory = Memory(keys.data_ptr(), keys.stride(0), keys.shape[1], places.data_ptr(), places.stride(0))
    read = {name: _side_by_side(rows) for name, rows in entries.items()}
    if read:
        own, entry_places = read["compressor"], read["places"]
        memory.entries, memory.entries_stride, memory.count = own.data_ptr(), own.stride(0), own.shape[1]
        memory.entry_places, memory.entry_places_stride = entry_places.data_ptr(), entry_places.stride(0)
    if "indexer" in read:
        memory.index_entries, memory.index_stride = read["indexer"].data_ptr(), read["indexer"].stride(0)
    return memory, (keys, places, read)


def _side_by_side(rows: torch.Tensor) -> torch.Tensor:
    """Rows [B, S, ...] whose numbers follow one another."""
    return rows if rows[:1].is_contiguous() else rows.contiguous()

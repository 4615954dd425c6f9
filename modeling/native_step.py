"""Decoder layers, each by one native call, of a decoding step and of a text.

In a step of a few tokens the calls of a layer's modules, some twenty, take longer than what they compute, and of a text
each of them carries all tokens to memory and back. Where `native_layer` knows a layer, `kernels/layers.h` runs its
functions in the same order without coming back to Python: all of it with MLA (which chooses keys in steps alone) and
one residual stream, else the channel mixer and what stands around it. (A compressed past: see `native_compressed`.)

What comes with a step (hidden states, angles, masks, token ids, the cache) is compared with the layer's sizes before
the call. Where it does not fit, modules are called, and say what is wrong.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache as TransformersCache

from .attention import MultiHeadLatentAttention, is_read_by_heads
from .cache import FathomCache
from .cache_layers import FathomCacheLayer, KeyValueCacheLayer, StaticKeyValueCacheLayer
from .fused import kernels_for, one_for_all_heads
from .native_arguments import PLAIN, angles_fit, as_token_ids, fits, readable, seen
from .native_functions import Kernels
from .native_layer import NativeLayer, native_layer
from .native_structures import Cache, Step


def decode_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    cache: TransformersCache | None,
    token_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """`FathomDecoderLayer.forward` of a step or a text: the residual stream [B, T, d] and the experts' tokens [E].

    Returns:
        None where modules have to be called one by one, and nothing has been done.
    """
    known = whole_layer(layer, hidden_states, position_embeddings, cache)
    if known is None:
        return None
    kernels, native, remembered = known
    batch, tokens = hidden_states.shape[:2]
    keys = int(remembered.get_seq_length()) + tokens
    name = native.function(layer.self_attn, batch, tokens, keys, masked=attention_mask is not None)
    visible = one_for_all_heads(attention_mask)
    # Of a static cache a mask has all columns, of which the first so many are looked at.
    columns = max(keys, remembered.get_max_length())
    if name is None or (attention_mask is not None and visible is None):
        return None
    if not readable(visible, batch, tokens, columns):
        return None
    step = step_of(native, hidden_states, position_embeddings, visible, token_mask, input_ids)
    if step is None:
        return None
    output, counts = output_of(native, hidden_states)
    pointers = hidden_states.data_ptr(), output.data_ptr(), None if counts is None else counts.data_ptr()
    function = getattr(kernels.functions, name)
    written = write_to_cache(
        native, remembered, hidden_states, lambda at: function(native.address, ctypes.addressof(step), at, *pointers)
    )
    return (output, counts) if written else None


def remember_but_last(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    cache: TransformersCache | None = None,
    **_,
) -> bool:
    """`FathomDecoderLayer.remember_but_last`; False where modules have to be called, and nothing has been done."""
    known = whole_layer(layer, hidden_states, position_embeddings, cache)
    if known is None:
        return False
    kernels, native, remembered = known
    step = step_of(native, hidden_states, position_embeddings, None, None, None, routes=False)
    if step is None or not native.serves(hidden_states.shape[:2].numel()):
        return False
    remember, x = kernels.functions.remember_text, hidden_states.data_ptr()
    if not write_to_cache(
        native, remembered, hidden_states, lambda at: remember(native.address, ctypes.addressof(step), at, x)
    ):
        return False
    remembered.crop(-1)
    return True


def whole_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    cache: TransformersCache | None,
) -> tuple[Kernels, NativeLayer, FathomCacheLayer] | None:
    """What reads a layer as a whole, and where it remembers; None where modules have to be called."""
    if position_embeddings is None or not isinstance(cache, FathomCache) or cache.offloading:
        return None
    mixer, tokens = layer.self_attn, hidden_states.shape[:2]
    if not isinstance(mixer, MultiHeadLatentAttention) or is_read_by_heads(tokens[1]):
        return None
    kernels = kernels_for(layer.training, tokens.numel(), hidden_states, *position_embeddings, any_text=True)
    if kernels is None:
        return None
    native = native_layer(layer)
    if native.decodes != "layer" or native.dtype is not hidden_states.dtype or not native.is_free():
        return None
    return kernels, native, cache.layer(mixer.layer_idx)


def decode_channels(
    layer: nn.Module, hidden_states: torch.Tensor, token_mask: torch.Tensor | None, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The second half of a layer, of one residual stream [B, T, d] or several [B, T, n, d]; returns as above."""
    tokens = hidden_states.shape[0] * hidden_states.shape[1]
    kernels = kernels_for(layer.training, tokens, hidden_states, any_text=True)
    if kernels is None:
        return None
    native = native_layer(layer)
    if native.decodes is None or native.dtype is not hidden_states.dtype or not native.is_free():
        return None
    if not native.serves(tokens):
        return None
    step = step_of(native, hidden_states, None, None, token_mask, input_ids)
    if step is None:
        return None
    output, counts = output_of(native, hidden_states)
    pointers = hidden_states.data_ptr(), output.data_ptr(), None if counts is None else counts.data_ptr()
    done = kernels.functions.decode_channels(native.address, ctypes.addressof(step), *pointers)
    return (output, counts) if done else None


def output_of(native: NativeLayer, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Room for what a layer returns: its output, and the tokens of its experts."""
    counts = torch.zeros(native.experts, dtype=torch.int64) if native.experts else None
    return torch.empty_like(hidden_states), counts


def step_of(
    native: NativeLayer,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    visible: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    routes: bool = True,
) -> Step | None:
    """What all layers share of a step; None where any of it is not what native functions read.

    Args:
        visible: `readable`.
        routes: whether tokens are sent to experts.
    """
    batch, tokens = hidden_states.shape[:2]
    streams, width = native.layer.connection.n, native.layer.width
    if hidden_states.shape[2:] != ((width,) if streams == 1 else (streams, width)):
        return None
    angles = (None, None, 0)
    if position_embeddings is not None:
        cos, sin = position_embeddings
        if not angles_fit(cos, sin, batch, tokens, native.rotary):
            return None
        angles = (cos.data_ptr(), sin.data_ptr(), cos.shape[0] * cos.shape[1])
    if token_mask is not None:
        token_mask = token_mask.contiguous()
        if not fits(token_mask, torch.bool, batch, tokens):
            return None
    ids = None
    if routes and native.layer.channels.table:
        ids = as_token_ids(input_ids, batch, tokens)
        if ids is None:
            return None
    pointers = (None if each is None else each.data_ptr() for each in (token_mask, ids))
    step = Step(batch, tokens, *angles, *seen(visible), *pointers, torch.get_num_threads())
    step.owners = position_embeddings, visible, token_mask, ids  # as long as there are pointers to them
    return step


def write_to_cache(
    native: NativeLayer,
    remembered: FathomCacheLayer,
    hidden_states: torch.Tensor,
    write: Callable[[int], bool],
) -> bool:
    """Calls what writes the keys of hidden states [B, T, d] into a layer of the cache.

    Args:
        write: takes the address of a `Cache`, and says whether it has done anything.

    Returns:
        False where nothing could be written; the cache is then as it was.
    """
    place = room(native, remembered, hidden_states)
    if place is None:
        return False
    written = False
    try:
        written = write(ctypes.addressof(place))
    finally:
        if not written:
            remembered.crop(-hidden_states.shape[1])
    return written


def room(native: NativeLayer, remembered: FathomCacheLayer, hidden_states: torch.Tensor) -> Cache | None:
    """Where a layer of the cache takes the keys of hidden states [B, T, d]; None if it cannot be written to."""
    if not isinstance(remembered, KeyValueCacheLayer | StaticKeyValueCacheLayer):
        return None
    batch, tokens = hidden_states.shape[:2]
    mla, indexer = native.layer.attention, native.layer.indexer
    widths = mla.rank + mla.rotary, indexer.width if indexer.heads else 0
    if not remembered.is_initialized:
        remembered.lazy_initialization(*(hidden_states.new_empty(batch, 1, 0, width) for width in widths))
    names = "keys", "values"
    start = int(remembered.get_seq_length())
    if start < 0 or remembered.buffers.keys() != set(names):
        return None
    for name, width in zip(names, widths, strict=True):
        each = remembered.buffers[name]
        if each.dim() != 4 or each.dtype is not hidden_states.dtype or not each.is_cpu or type(each) not in PLAIN:
            return None
        if (*each.shape[:2], each.shape[3]) != (batch, 1, width) or each.shape[2] < start:
            return None
        # Rows of their own, so that one sequence's keys are not written over another's. MLA leaves the values empty.
        own = each.stride()[2:] == (width, 1) and (batch == 1 or each.stride(0) >= each.shape[2] * width)
        side_by_side = own or not each.numel()
        if not side_by_side or (isinstance(remembered, StaticKeyValueCacheLayer) and each.shape[2] < start + tokens):
            return None
    if remembered.take(tokens) is None:
        return None
    keys, values = remembered.buffers["keys"], remembered.buffers["values"]
    place = Cache(keys.data_ptr(), keys.stride(0), values.data_ptr(), values.stride(0), start)
    place.owners = keys, values
    return place

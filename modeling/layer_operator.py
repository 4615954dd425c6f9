"""A decoder layer as one operator of a compiled step.

What Inductor makes of a step's small products on a CPU is slower than the native functions, which a graph cannot look
into. So while a graph is made, a layer that `native_layer` could decode becomes one operator that is given the tensors
of its static cache, and runs the layer as ever: by native functions, or module by module where they do not fit.
"""

from weakref import WeakValueDictionary

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import MultiHeadLatentAttention
from .cache import FathomStaticCache
from .cache_layers import StaticKeyValueCacheLayer
from .fused import FEW_TOKENS, new_operator
from .native import is_ready

# By number, which is all that a graph can say of one.
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def know(layer: nn.Module) -> None:
    """Lets compiled graphs find a layer."""
    _layers[id(layer)] = layer


def decode_in_graph(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    token_mask: torch.Tensor | None,
    input_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The same as `decode_layer` while a graph is made."""
    tokens = hidden_states.shape[:2].numel()
    if layer.training or torch.is_grad_enabled() or tokens > FEW_TOKENS or not hidden_states.is_cpu:
        return None
    if position_embeddings is None or attention_mask is None or not isinstance(cache, FathomStaticCache):
        return None
    mixer = layer.self_attn
    cache = cache.layers[mixer.layer_idx] if isinstance(mixer, MultiHeadLatentAttention) else None
    if not isinstance(cache, StaticKeyValueCacheLayer) or not cache.is_initialized or not is_ready(hidden_states.dtype):
        return None
    experts = getattr(layer.mlp, "num_experts", 0)
    shared = *position_embeddings, attention_mask, token_mask, input_ids
    buffers = cache.buffers["keys"], cache.buffers["values"], cache.length
    output, counts = DECODE_LAYER(hidden_states, *shared, *buffers, id(layer), experts)
    return output, counts if experts else None


DECODE_LAYER = new_operator(
    __name__,
    "decode_layer",
    "(Tensor hidden_states, Tensor cos, Tensor sin, Tensor attention_mask, Tensor? token_mask, Tensor? input_ids, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!) length, int layer, int experts) -> (Tensor, Tensor)",
)


@torch.library.impl(DECODE_LAYER.name(), "CPU")
def _decode_layer(hidden_states, cos, sin, attention_mask, token_mask, input_ids, keys, values, length, layer, experts):
    """A layer's forward with a static cache, whose tensors are written to. Returns an empty count without experts."""
    found = _layers[layer](
        hidden_states,
        position_embeddings=(cos, sin),
        attention_mask=attention_mask,
        cache=OneLayerCache(keys, values, length),
        token_mask=token_mask,
        input_ids=input_ids,
    )
    counts = found.expert_counts
    return found.hidden_states, hidden_states.new_empty(0, dtype=torch.int64) if counts is None else counts


@torch.library.register_fake(DECODE_LAYER.name())
def _(hidden_states, cos, sin, attention_mask, token_mask, input_ids, keys, values, length, layer, experts):
    return torch.empty_like(hidden_states), hidden_states.new_empty(experts, dtype=torch.int64)


class OneLayerCache(FathomStaticCache):
    """The tensors of a static cache's layer as the cache of whichever layer asks."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: torch.Tensor):
        layer = StaticKeyValueCacheLayer(keys.shape[2])
        layer.buffers.update(keys=keys, values=values)
        layer.length, layer.device, layer.is_initialized = length, keys.device, True
        self.layers, self.offloading = [layer], False

    def layer(self, layer_idx: int):
        return self.layers[0]

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        return self.layers[0].update(key_states, value_states)

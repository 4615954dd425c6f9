"""Decoder layers, each by one native call, of a decoding step and of a text.

In a step of a few tokens the calls of a layer's modules, some twenty, take longer than what they compute, and of a text
each of them carries all tokens to memory and back. Where every module of a layer is as it was built,
`kernels/layers.h` runs the layer's functions in the same order without coming back to Python: all of it with MLA (which
chooses keys in steps alone) and one residual stream, else the channel mixer and what stands around it. Whatever else a
layer may have (hooks, adapters, other activations) is called module by module.

The structures below are those of `kernels/layers.h`.
"""

import ctypes
import math
from contextlib import suppress
from itertools import chain
from operator import is_
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import MultiHeadLatentAttention, is_read_by_heads
from .cache import FathomCache
from .cache_layers import FathomCacheLayer, KeyValueCacheLayer, StaticKeyValueCacheLayer
from .compressed_attention import (
    CompressedSparseAttention,
    GroupedLinear,
    HeavilyCompressedAttention,
    SlidingWindowAttention,
)
from .experts import HashMixtureOfExperts, HashRouter, MixtureOfExperts, RoutedExperts, TopKRouter
from .feed_forward import DenseChannelMixer, FeedForward
from .fused import PLAIN, SILU, Kernels, is_short_text, kernels_for, one_for_all_heads, readable, seen
from .hyper_connections import HyperConnection
from .int8 import Int8Experts, Int8GroupedLinear, Int8Linear
from .last_token import listens
from .normalization import FathomRMSNorm
from .precision import Float32Linear
from .residual import ResidualConnection
from .sparse_attention import DeepseekSparseAttention, LightningIndexer

_pointer, _size, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Matrix(ctypes.Structure):
    _fields_ = _fields(_pointer, "numbers scales")


class _Connection(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "n"),
        *_fields(_pointer, "fn base scale"),
        *_fields(_real, "norm_eps eps"),
        *_fields(_size, "iterations"),
    ]


class _LatentAttention(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm q_norm kv_norm kv_b"),
        *_fields(_Matrix, "q_a q_b kv_a out"),
        *_fields(_real, "norm_eps q_eps kv_eps scale"),
        *_fields(_size, "heads q_rank rank nope rotary value_width interleaved"),
    ]


class _Indexer(ctypes.Structure):
    _fields_ = [
        *_fields(_Matrix, "wq wk"),
        *_fields(_pointer, "norm norm_bias weights"),
        *_fields(_real, "eps"),
        *_fields(_size, "heads width top_k"),
    ]


class _ChannelMixer(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm"),
        *_fields(_real, "norm_eps"),
        *_fields(_pointer, "router bias table"),
        *_fields(_size, "experts top_k groups best_groups group_top scoring normalises"),
        *_fields(_real, "weight_scale"),
        *_fields(_Matrix, "gate_up down"),
        *_fields(_size, "inner"),
        *_fields(_Matrix, "shared_gate shared_up shared_down"),
        *_fields(_size, "shared_inner"),
        *_fields(_real, "limit"),
    ]


class _CompressedAttention(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm q_norm kv_norm sinks"),
        *_fields(_Matrix, "q_a q_b kv o_a o_b"),
        *_fields(_real, "norm_eps q_eps kv_eps head_eps scale"),
        *_fields(_size, "heads q_rank head rotary window groups out_rank"),
        *_fields(_Matrix, "values gates"),
        *_fields(_size, "contribution"),
        *_fields(_Matrix, "index_values index_gates"),
        *_fields(_size, "index_contribution"),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "width"),
        ("attention", _LatentAttention),
        ("compressed", _CompressedAttention),
        ("indexer", _Indexer),
        ("token_connection", _Connection),
        ("channels", _ChannelMixer),
        ("connection", _Connection),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "latents"),
        *_fields(_size, "latents_stride"),
        *_fields(_pointer, "index_keys"),
        *_fields(_size, "index_stride length"),
    ]


class Memory(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "window"),
        *_fields(_size, "window_stride window_count"),
        *_fields(_pointer, "window_places"),
        *_fields(_size, "window_places_stride"),
        *_fields(_pointer, "entries index_entries"),
        *_fields(_size, "entries_stride index_stride count"),
        *_fields(_pointer, "entry_places"),
        *_fields(_size, "entry_places_stride"),
    ]


class Between(ctypes.Structure):
    _fields_ = _fields(_pointer, "x post residual queries latent")


class _Step(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "batch tokens"),
        *_fields(_pointer, "cos sin"),
        *_fields(_size, "positions"),
        *_fields(_pointer, "seen"),
        *_fields(_size, "seen_batch seen_query"),
        *_fields(_pointer, "real ids"),
        *_fields(_size, "threads first"),
    ]


class _Unfit(Exception):
    """A module that is not as it was built."""


class NativeLayer:
    """Where the numbers of a decoder layer stand, and whether they still do.

    What is no tensor (a scale, a number of keys to choose) is read once: who changes one calls `forget`.

    Attributes:
        decodes: what native functions can do: "layer" (MLA and one residual stream), "compressed" (in two parts, see
            `native_compressed`), "channels" (the channel mixer and its connection) or None.
        experts: number of routed experts.
        in_int8: whether any weight is.
    """

    def __init__(self, layer: nn.Module):
        self.tensors: list[torch.Tensor] = []
        self.layer = _Layer()
        self.decodes: str | None = None
        self.dtype: torch.dtype | None = None
        self.settings: dict = {}
        # What stands in a module's place may have none of its attributes.
        with suppress(_Unfit, AttributeError):
            self.describe(layer)
        self.experts = self.layer.channels.experts
        self.in_int8 = any(each.dtype is torch.int8 for each in self.tensors)
        self.address = ctypes.addressof(self.layer)
        self.pointers = [each.data_ptr() for each in self.tensors]
        # Where submodules, parameters and buffers are looked up, and who listens to a call.
        self.stores = [store for each in layer.modules() for store in (each._modules, each._parameters, each._buffers)]
        self.lengths = [*map(len, self.stores)]
        self.filled = [store for store in self.stores if store]
        self.held = [*chain.from_iterable(map(dict.values, self.filled))]
        inner = [each for each in layer.modules() if each is not layer]
        self.hooks = [hooks for each in inner for hooks in (each._forward_hooks, each._forward_pre_hooks)]

    def describe(self, layer: nn.Module) -> None:
        """Fills the structure as far as the layer's modules allow, and says how far that is in `decodes`."""
        self.dtype = layer.post_attention_layernorm.weight.dtype
        self.settings = vars(layer.self_attn.config)
        self.layer.width = layer.post_attention_layernorm.weight.shape[0]
        self.layer.channels = self.channel_mixer(layer.post_attention_layernorm, layer.mlp)
        self.layer.connection = self.connection(layer.ffn_hc)
        self.decodes = "channels"
        self.layer.token_connection = self.connection(layer.attn_hc)
        if isinstance(layer.self_attn, SlidingWindowAttention):
            self.layer.compressed = self.compressed_attention(layer.input_layernorm, layer.self_attn)
            self.layer.indexer = self.entry_indexer(layer.self_attn)
            self.decodes = "compressed"
        elif type(layer.attn_hc) is ResidualConnection and type(layer.ffn_hc) is ResidualConnection:
            self.layer.attention = self.latent_attention(layer.input_layernorm, layer.self_attn)
            self.layer.indexer = self.indexer(layer.self_attn)
            self.decodes = "layer"

    def fits(self) -> bool:
        """Whether the layer still has the same modules and tensors, in the same places."""
        # No loop of Python's: this is asked for every layer of every step.
        if [*map(len, self.stores)] != self.lengths:
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.held)):
            return False
        return [*map(torch.Tensor.data_ptr, self.tensors)] == self.pointers

    def function(self, mixer: MultiHeadLatentAttention, batch: int, tokens: int, keys: int, masked: bool) -> str | None:
        """What is called for T new tokens of B sequences, after which there are S keys; None: modules.

        A step attends to latents (`absorbed_attention`), a text to keys and values that are made of them.
        """
        if is_short_text(batch * tokens) and (masked or tokens == 1):
            return "decode_layer"
        # Without a mask new tokens are causal, and all there are.
        if tokens != keys and (not masked or mixer.absorbing_pays(tokens, keys)):
            return None
        chooses = self.layer.indexer.heads and keys > self.layer.indexer.top_k
        return "read_layer" if self.serves(batch * tokens) and not chooses else None

    def serves(self, tokens: int) -> bool:
        """Whether its functions are made for so many tokens: of a long text there are no products in int8."""
        return not self.in_int8 or is_short_text(tokens)

    def room(self, remembered: FathomCacheLayer, hidden_states: torch.Tensor) -> _Cache | None:
        """Where a layer of the cache takes the keys of hidden states [B, T, d]; None if it cannot be written to."""
        if not isinstance(remembered, KeyValueCacheLayer | StaticKeyValueCacheLayer):
            return None
        batch, tokens = hidden_states.shape[:2]
        if not remembered.is_initialized:
            mla, indexer = self.layer.attention, self.layer.indexer
            widths = mla.rank + mla.rotary, indexer.width if indexer.heads else 0
            remembered.lazy_initialization(*(hidden_states.new_empty(batch, 1, 0, width) for width in widths))
        for each in remembered.buffers.values():
            side_by_side = each.stride()[2:] == (each.shape[3], 1) or not each.numel()  # MLA leaves the values empty
            if each.dtype is not hidden_states.dtype or not each.is_cpu or not side_by_side:
                return None
        length = remembered.take(tokens)
        if length is None:
            return None
        keys, values = remembered.buffers["keys"], remembered.buffers["values"]
        return _Cache(keys.data_ptr(), keys.stride(0), values.data_ptr(), values.stride(0), length)

    def is_free(self) -> bool:
        """Whether nobody listens to the layer's modules, and the config asks for no other implementations."""
        settings = self.settings
        if settings.get("_attn_implementation_internal") != "sdpa" or (
            self.experts and settings.get("_experts_implementation_internal") != "sorted_mm"
        ):
            return False
        return not any(self.hooks) or not any(map(listens, self.hooks))

    def pointer(self, tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """A tensor's address, noted down; `dtype` is the layer's unless given."""
        if tensor is None:
            return None
        expected = self.dtype if dtype is None else dtype
        if type(tensor) not in PLAIN or tensor.dtype is not expected or not (tensor.is_cpu and tensor.is_contiguous()):
            raise _Unfit
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def weight(self, module: nn.Module, kind: type[nn.Module] = nn.Linear) -> int | None:
        """Of a module that multiplies by its weight and does no more."""
        if type(module) is not kind or getattr(module, "bias", None) is not None or "forward" in vars(module):
            raise _Unfit
        return self.pointer(module.weight)  # type: ignore[arg-type]

    def matrix(self, module: nn.Module) -> _Matrix:
        """Of a linear map, in int8 or not."""
        if type(module) in (Int8Linear, Int8GroupedLinear):
            return self.int8(module, "weight", module.scale)
        return _Matrix(self.weight(module, GroupedLinear if type(module) is GroupedLinear else nn.Linear), None)

    def int8(self, module: nn.Module, name: str, scale: torch.Tensor) -> _Matrix:
        if getattr(module, "bias", None) is not None:
            raise _Unfit
        return _Matrix(self.pointer(getattr(module, name), torch.int8), self.pointer(scale, torch.float32))

    def norm(self, module: nn.Module) -> tuple[int | None, float]:
        return self.weight(module, FathomRMSNorm), module.eps  # type: ignore[return-value]

    def connection(self, module: nn.Module) -> _Connection:
        if type(module) is ResidualConnection:
            return _Connection(n=1)
        if type(module) is not HyperConnection:
            raise _Unfit
        weights = [self.pointer(each) for each in (module.fn, module.base, module.scale)]
        return _Connection(module.hc_mult, *weights, module.norm_eps, module.hc_eps, module.sinkhorn_iters)

    def latent_attention(self, norm: nn.Module, module: nn.Module) -> _LatentAttention:
        if type(module) not in (MultiHeadLatentAttention, DeepseekSparseAttention):
            raise _Unfit
        found = _LatentAttention(
            heads=module.num_heads,
            rank=module.kv_lora_rank,
            nope=module.qk_nope_head_dim,
            rotary=module.qk_rope_head_dim,
            value_width=module.v_head_dim,
            interleaved=module.rope_interleave,
            scale=module.scaling,
            kv_a=self.matrix(module.kv_a_proj_with_mqa),
            kv_b=self.weight(module.kv_b_proj),
            out=self.matrix(module.o_proj),
        )
        found.norm, found.norm_eps = self.norm(norm)
        found.kv_norm, found.kv_eps = self.norm(module.kv_a_layernorm)
        if module.compresses_queries:
            found.q_a, found.q_b = self.matrix(module.q_a_proj), self.matrix(module.q_b_proj)
            found.q_norm, found.q_eps = self.norm(module.q_a_layernorm)
            found.q_rank = module.q_a_proj.out_features
        else:
            found.q_b = self.matrix(module.q_proj)
        return found

    def indexer(self, attention: nn.Module) -> _Indexer:
        if type(attention) is MultiHeadLatentAttention:
            return _Indexer()
        module, norm = attention.indexer, attention.indexer.k_norm
        if type(module) is not LightningIndexer or type(norm) is not nn.LayerNorm:
            raise _Unfit
        return _Indexer(
            wq=self.matrix(module.wq_b),
            wk=self.matrix(module.wk),
            norm=self.pointer(norm.weight),
            norm_bias=self.pointer(norm.bias),
            weights=self.weight(module.weights_proj, Float32Linear),
            eps=norm.eps,
            heads=module.n_heads,
            width=module.head_dim,
            # A dense model's indexer keeps its keys, and chooses nothing.
            top_k=2**62 if attention.index_dense else attention.index_topk,
        )

    def compressed_attention(self, norm: nn.Module, module: nn.Module) -> _CompressedAttention:
        kinds = SlidingWindowAttention, HeavilyCompressedAttention, CompressedSparseAttention
        if type(module) not in kinds:
            raise _Unfit
        found = _CompressedAttention(
            heads=module.num_heads,
            head=module.head_dim,
            rotary=2 * module.rotary_emb.inv_freq.shape[0],
            window=module.window,
            groups=module.o_groups,
            head_eps=module.norm_eps,
            scale=module.scaling,
            q_rank=module.q_a_proj.out_features,
            q_a=self.matrix(module.q_a_proj),
            q_b=self.matrix(module.q_b_proj),
            kv=self.matrix(module.kv_proj),
            sinks=self.pointer(module.sinks),
            o_a=self.matrix(module.o_a_proj),
            o_b=self.matrix(module.o_b_proj),
            out_rank=module.o_a_proj.weight.shape[0] // module.o_groups,
        )
        found.norm, found.norm_eps = self.norm(norm)
        found.q_norm, found.q_eps = self.norm(module.q_a_norm)
        found.kv_norm, found.kv_eps = self.norm(module.kv_norm)
        compressors = module.compressors()
        if (compressor := compressors.get("compressor")) is not None:
            found.values, found.gates = self.matrix(compressor.kv_proj), self.matrix(compressor.gate_proj)
            found.contribution = compressor.kv_proj.out_features
        if (indexer := compressors.get("indexer")) is not None:
            found.index_values, found.index_gates = self.matrix(indexer.kv_proj), self.matrix(indexer.gate_proj)
            found.index_contribution = indexer.kv_proj.out_features
        return found

    def entry_indexer(self, attention: nn.Module) -> _Indexer:
        indexer = attention.compressors().get("indexer")
        if indexer is None:
            return _Indexer()
        return _Indexer(
            wq=self.matrix(indexer.q_b_proj),
            weights=self.weight(indexer.scorer.weights_proj, Float32Linear),
            heads=indexer.num_heads,
            width=indexer.width,
            top_k=2**62 if attention.index_dense else attention.index_topk,
        )

    def channel_mixer(self, norm: nn.Module, module: nn.Module) -> _ChannelMixer:
        found = _ChannelMixer(limit=math.inf)
        found.norm, found.norm_eps = self.norm(norm)
        if type(module) is DenseChannelMixer:
            self.everyone(found, module)
            return found
        if type(module) not in (MixtureOfExperts, HashMixtureOfExperts):
            raise _Unfit
        router, experts = module.gate, module.experts
        if type(router) not in (TopKRouter, HashRouter) or type(experts) not in (RoutedExperts, Int8Experts):
            raise _Unfit
        if not isinstance(experts.act_fn, SILU) or experts._is_expert_parallel:
            raise _Unfit
        choice, bias, table, _ = router.fused_choice(None)
        names = "top_k groups best_groups group_top scoring normalises weight_scale"
        for name, number in zip(names.split(), choice, strict=True):
            setattr(found, name, number)
        found.router, found.experts = self.pointer(router.weight), router.num_experts
        found.bias, found.table = self.pointer(bias, torch.float32), self.pointer(table, torch.int64)
        if isinstance(experts, Int8Experts):
            found.gate_up = self.int8(experts, "gate_up_proj", experts.gate_up_proj_scale)
            found.down = self.int8(experts, "down_proj", experts.down_proj_scale)
        else:
            found.gate_up = _Matrix(self.pointer(experts.gate_up_proj), None)
            found.down = _Matrix(self.pointer(experts.down_proj), None)
        found.inner = experts.down_proj.shape[2]
        found.limit = math.inf if experts.swiglu_limit is None else experts.swiglu_limit
        if module.shared_experts is not None:
            self.everyone(found, module.shared_experts)
        return found

    def everyone(self, mixer: _ChannelMixer, module: nn.Module) -> None:
        """The network that all tokens go through."""
        if type(module) not in (FeedForward, DenseChannelMixer) or not module.is_swiglu:
            raise _Unfit
        mixer.shared_gate, mixer.shared_up = self.matrix(module.gate_proj), self.matrix(module.up_proj)
        mixer.shared_down, mixer.shared_inner = self.matrix(module.down_proj), module.down_proj.in_features
        mixer.limit = math.inf if module.swiglu_limit is None else module.swiglu_limit


_natives: WeakKeyDictionary[nn.Module, NativeLayer] = WeakKeyDictionary()


def native_layer(layer: nn.Module) -> NativeLayer:
    """What native functions know of a layer; looked at anew where anything of it has changed."""
    native = _natives.get(layer)
    if native is None or not native.fits():
        native = _natives[layer] = NativeLayer(layer)
    return native


def forget(model: nn.Module) -> None:
    """Lets go of weights that are about to be replaced; else they stay until the next step."""
    for module in model.modules():
        _natives.pop(module, None)


def decode_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
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
    if name is None or (attention_mask is not None and visible is None) or not readable(visible, batch, tokens, keys):
        return None
    cache = native.room(remembered, hidden_states)
    if cache is None:
        return None
    step, _kept = step_of(hidden_states, position_embeddings, visible, token_mask, input_ids)
    output, counts = output_of(native, hidden_states)
    pointers = hidden_states.data_ptr(), output.data_ptr(), None if counts is None else counts.data_ptr()
    getattr(kernels.functions, name)(native.address, ctypes.byref(step), ctypes.byref(cache), *pointers)
    return output, counts


def remember_but_last(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    cache: Cache | None = None,
    **_,
) -> bool:
    """`FathomDecoderLayer.remember_but_last`; False where modules have to be called, and nothing has been done."""
    known = whole_layer(layer, hidden_states, position_embeddings, cache)
    if known is None:
        return False
    kernels, native, remembered = known
    cache = native.room(remembered, hidden_states) if native.serves(hidden_states.shape[:2].numel()) else None
    if cache is None:
        return False
    step, _kept = step_of(hidden_states, position_embeddings, None, None, None)
    pointers = ctypes.byref(step), ctypes.byref(cache), hidden_states.data_ptr()
    kernels.functions.remember_text(native.address, *pointers)
    remembered.crop(-1)
    return True


def whole_layer(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    cache: Cache | None,
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
    step, _kept = step_of(hidden_states, None, None, token_mask, input_ids)
    output, counts = output_of(native, hidden_states)
    pointers = hidden_states.data_ptr(), output.data_ptr(), None if counts is None else counts.data_ptr()
    kernels.functions.decode_channels(native.address, ctypes.byref(step), *pointers)
    return output, counts


def output_of(native: NativeLayer, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Room for what a layer returns: its output, and the tokens of its experts."""
    counts = torch.zeros(native.experts, dtype=torch.int64) if native.experts else None
    return torch.empty_like(hidden_states), counts


def step_of(hidden_states, position_embeddings, visible, token_mask, input_ids) -> tuple[_Step, tuple]:
    """What all layers share, and what has to be kept for so long."""
    real, ids = (None if each is None else each.contiguous() for each in (token_mask, input_ids))
    angles = (None, None, 0)
    if position_embeddings is not None:
        cos, sin = position_embeddings
        angles = (cos.data_ptr(), sin.data_ptr(), cos.shape[0] * cos.shape[1])
    pointers = (None if each is None else each.data_ptr() for each in (real, ids))
    step = _Step(*hidden_states.shape[:2], *angles, *seen(visible), *pointers, torch.get_num_threads())
    return step, (real, ids, visible)

"""What native functions know of a decoder layer: where its weights stand, and whether they are as it was built.

A pointer says nothing about how much stands behind it. So every weight is compared with the shape that the layer's
sizes ask for, when a layer is looked at, and before every call with what it was then; `native_step` makes the calls. A
layer that has anything else (hooks, adapters, other activations, weights of other shapes) is called module by module.
"""

import ctypes
import math
from contextlib import suppress
from itertools import chain
from operator import attrgetter, is_
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .attention import MultiHeadLatentAttention
from .compressed_attention import (
    CompressedSparseAttention,
    GroupedLinear,
    HeavilyCompressedAttention,
    SlidingWindowAttention,
)
from .experts import HashMixtureOfExperts, HashRouter, MixtureOfExperts, RoutedExperts, TopKRouter
from .feed_forward import DenseChannelMixer, FeedForward
from .fused import SILU, is_short_text
from .hyper_connections import HyperConnection
from .int8 import Int8Experts, Int8GroupedLinear, Int8Linear
from .last_token import listens
from .native_arguments import MOST_ITERATIONS, choice_fits, fits, is_real, limit_fits
from .native_structures import (
    ChannelMixer,
    CompressedAttention,
    Connection,
    Indexer,
    LatentAttention,
    Layer,
    Matrix,
)
from .normalization import FathomRMSNorm
from .precision import Float32Linear
from .residual import ResidualConnection
from .sparse_attention import DeepseekSparseAttention, LightningIndexer

# What stands for "all of them" where a number of keys is asked for, and more than a size may be.
EVERYTHING = 2**62
_dtype = attrgetter("dtype")


class _Unfit(Exception):
    """A module that is not as it was built."""


def size(number: int) -> int:
    """A size of a module, if it can be one: a structure would keep the last 64 bits of any number."""
    if not 1 <= number < EVERYTHING:
        raise _Unfit
    return number


def limit(number: float | None) -> float:
    """What activations are clamped to; infinity: to nothing."""
    if number is not None and not limit_fits(number):
        raise _Unfit
    return math.inf if number is None else number


def real(number: float) -> float:
    """A number that fp32 has, as PyTorch asks for too."""
    if not is_real(number):
        raise _Unfit
    return number


class NativeLayer:
    """Where the numbers of a decoder layer stand, and whether they still do.

    What is no tensor (a scale, a number of keys to choose) is read once: who changes one calls `forget`.

    Attributes:
        decodes: what native functions can do: "layer" (MLA and one residual stream), "compressed" (in two parts, see
            `native_compressed`), "channels" (the channel mixer and its connection) or None.
        experts: number of routed experts.
        rotary: width of what is rotated.
        in_int8: whether any weight is.
    """

    def __init__(self, layer: nn.Module):
        self.tensors: list[torch.Tensor] = []
        self.layer = Layer()
        self.decodes: str | None = None
        self.dtype: torch.dtype | None = None
        self.settings: dict = {}
        # What stands in a module's place may have none of its attributes.
        with suppress(_Unfit, AttributeError, TypeError):
            self.describe(layer)
        self.experts = self.layer.channels.experts
        self.rotary = self.layer.attention.rotary or self.layer.compressed.rotary
        self.in_int8 = any(each.dtype is torch.int8 for each in self.tensors)
        self.address = ctypes.addressof(self.layer)
        self.looked_at = self.looks()
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
        self.layer.width = size(layer.post_attention_layernorm.weight.shape[0])
        self.layer.channels = self.channel_mixer(layer.post_attention_layernorm, layer.mlp)
        self.layer.connection = self.connection(layer.ffn_hc)
        self.decodes = "channels"
        self.layer.token_connection = self.connection(layer.attn_hc)
        if isinstance(layer.self_attn, SlidingWindowAttention):
            if self.layer.token_connection.n != self.layer.connection.n:
                raise _Unfit
            self.layer.compressed = self.compressed_attention(layer.input_layernorm, layer.self_attn)
            self.layer.indexer = self.entry_indexer(layer.self_attn)
            self.decodes = "compressed"
        elif type(layer.attn_hc) is ResidualConnection and type(layer.ffn_hc) is ResidualConnection:
            self.layer.attention = self.latent_attention(layer.input_layernorm, layer.self_attn)
            self.layer.indexer = self.indexer(layer.self_attn)
            self.decodes = "layer"

    def fits(self) -> bool:
        """Whether the layer still has the same modules and tensors, in the same places and of the same shapes."""
        # No loop of Python's: this is asked for every layer of every step.
        if [*map(len, self.stores)] != self.lengths:
            return False
        if not all(map(is_, chain.from_iterable(map(dict.values, self.filled)), self.held)):
            return False
        return self.looks() == self.looked_at

    def looks(self) -> list:
        """Of all tensors the address, the dtype, and what makes a contiguous tensor's shape."""
        of_all = torch.Tensor.data_ptr, torch.Tensor.numel, torch.Tensor.stride, _dtype
        return [[*map(look, self.tensors)] for look in of_all]

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

    def is_free(self) -> bool:
        """Whether nobody listens to the layer's modules, and the config asks for no other implementations."""
        settings = self.settings
        if settings.get("_attn_implementation_internal") != "sdpa" or (
            self.experts and settings.get("_experts_implementation_internal") != "sorted_mm"
        ):
            return False
        return not any(self.hooks) or not any(map(listens, self.hooks))

    def pointer(self, tensor: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> int:
        """A tensor's address, noted down; it must have this shape, and the layer's dtype unless another is given."""
        if not fits(tensor, self.dtype if dtype is None else dtype, *shape) or not tensor.numel():  # type: ignore[arg-type]
            raise _Unfit
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def weight(self, module: nn.Module, *shape: int, kind: type[nn.Module] = nn.Linear) -> int:
        """Of a module that multiplies by its weight and does no more."""
        if type(module) is not kind or getattr(module, "bias", None) is not None or "forward" in vars(module):
            raise _Unfit
        return self.pointer(module.weight, *shape)  # type: ignore[arg-type]

    def matrix(self, module: nn.Module, *shape: int) -> Matrix:
        """Of a linear map, in int8 or not."""
        if type(module) in (Int8Linear, Int8GroupedLinear):
            return self.int8(module, "weight", module.scale, *shape)
        kind = GroupedLinear if type(module) is GroupedLinear else nn.Linear
        return Matrix(self.weight(module, *shape, kind=kind), None)

    def int8(self, module: nn.Module, name: str, scale: torch.Tensor, *shape: int) -> Matrix:
        if getattr(module, "bias", None) is not None:
            raise _Unfit
        numbers = self.pointer(getattr(module, name), *shape, dtype=torch.int8)
        return Matrix(numbers, self.pointer(scale, *shape[:-1], dtype=torch.float32))

    def norm(self, module: nn.Module, width: int) -> tuple[int, float]:
        return self.weight(module, width, kind=FathomRMSNorm), real(module.eps)  # type: ignore[return-value]

    def connection(self, module: nn.Module) -> Connection:
        if type(module) is ResidualConnection:
            return Connection(n=1)
        if type(module) is not HyperConnection or not 1 <= module.sinkhorn_iters <= MOST_ITERATIONS:
            raise _Unfit
        n = size(module.hc_mult)
        fn, base = self.pointer(module.fn, (2 + n) * n, n * self.layer.width), self.pointer(module.base, (2 + n) * n)
        scale = self.pointer(module.scale, 3)
        return Connection(n, fn, base, scale, real(module.norm_eps), real(module.hc_eps), module.sinkhorn_iters)

    def latent_attention(self, norm: nn.Module, module: nn.Module) -> LatentAttention:
        if type(module) not in (MultiHeadLatentAttention, DeepseekSparseAttention):
            raise _Unfit
        width, heads, rank = self.layer.width, size(module.num_heads), size(module.kv_lora_rank)
        nope, rotary = size(module.qk_nope_head_dim), size(module.qk_rope_head_dim)
        value_width = size(module.v_head_dim)
        found = LatentAttention(
            heads=heads,
            rank=rank,
            nope=nope,
            rotary=rotary,
            value_width=value_width,
            interleaved=bool(module.rope_interleave),
            scale=real(module.scaling),
            kv_a=self.matrix(module.kv_a_proj_with_mqa, rank + rotary, width),
            kv_b=self.weight(module.kv_b_proj, heads * (nope + value_width), rank),
            out=self.matrix(module.o_proj, width, heads * value_width),
        )
        found.norm, found.norm_eps = self.norm(norm, width)
        found.kv_norm, found.kv_eps = self.norm(module.kv_a_layernorm, rank)
        if rotary % 2:
            raise _Unfit
        query_width = heads * (nope + rotary)
        if module.compresses_queries:
            found.q_rank = size(module.q_a_proj.out_features)
            found.q_a = self.matrix(module.q_a_proj, found.q_rank, width)
            found.q_b = self.matrix(module.q_b_proj, query_width, found.q_rank)
            found.q_norm, found.q_eps = self.norm(module.q_a_layernorm, found.q_rank)
        else:
            found.q_b = self.matrix(module.q_proj, query_width, width)
        return found

    def indexer(self, attention: nn.Module) -> Indexer:
        if type(attention) is MultiHeadLatentAttention:
            return Indexer()
        module, norm = attention.indexer, attention.indexer.k_norm
        if type(module) is not LightningIndexer or type(norm) is not nn.LayerNorm:
            raise _Unfit
        width, heads = size(module.head_dim), size(module.n_heads)
        mla = self.layer.attention
        if mla.rotary > width or norm.normalized_shape != (width,):
            raise _Unfit
        return Indexer(
            wq=self.matrix(module.wq_b, heads * width, mla.q_rank or self.layer.width),
            wk=self.matrix(module.wk, width, self.layer.width),
            norm=self.pointer(norm.weight, width),
            norm_bias=self.pointer(norm.bias, width),
            weights=self.weight(module.weights_proj, heads, self.layer.width, kind=Float32Linear),
            eps=real(norm.eps),
            heads=heads,
            width=width,
            # A dense model's indexer keeps its keys, and chooses nothing.
            top_k=EVERYTHING if attention.index_dense else size(attention.index_topk),
        )

    def compressed_attention(self, norm: nn.Module, module: nn.Module) -> CompressedAttention:
        kinds = SlidingWindowAttention, HeavilyCompressedAttention, CompressedSparseAttention
        if type(module) not in kinds:
            raise _Unfit
        width, heads, head = self.layer.width, size(module.num_heads), size(module.head_dim)
        groups, q_rank = size(module.o_groups), size(module.q_a_proj.out_features)
        rotary, out_rank = 2 * module.rotary_emb.inv_freq.shape[0], module.o_a_proj.weight.shape[0] // groups
        if rotary > head or heads * head % groups or module.o_a_proj.groups != groups:
            raise _Unfit
        found = CompressedAttention(
            heads=heads,
            head=head,
            rotary=rotary,
            window=size(module.window),
            groups=groups,
            head_eps=real(module.norm_eps),
            scale=real(module.scaling),
            q_rank=q_rank,
            q_a=self.matrix(module.q_a_proj, q_rank, width),
            q_b=self.matrix(module.q_b_proj, heads * head, q_rank),
            kv=self.matrix(module.kv_proj, head, width),
            sinks=self.pointer(module.sinks, heads),
            o_a=self.matrix(module.o_a_proj, groups * out_rank, heads * head // groups),
            o_b=self.matrix(module.o_b_proj, width, groups * out_rank),
            out_rank=out_rank,
        )
        found.norm, found.norm_eps = self.norm(norm, width)
        found.q_norm, found.q_eps = self.norm(module.q_a_norm, q_rank)
        found.kv_norm, found.kv_eps = self.norm(module.kv_norm, head)
        compressors = module.compressors()
        if (compressor := compressors.get("compressor")) is not None:
            found.values, found.gates, found.contribution = self.contribution(compressor)
        if (indexer := compressors.get("indexer")) is not None:
            found.index_values, found.index_gates, found.index_contribution = self.contribution(indexer)
        return found

    def contribution(self, compressor: nn.Module) -> tuple[Matrix, Matrix, int]:
        """What a token's values and gates are made by, and how many numbers each has."""
        shape = size(compressor.kv_proj.out_features), self.layer.width
        return self.matrix(compressor.kv_proj, *shape), self.matrix(compressor.gate_proj, *shape), shape[0]

    def entry_indexer(self, attention: nn.Module) -> Indexer:
        indexer = attention.compressors().get("indexer")
        if indexer is None:
            return Indexer()
        heads, width, mixer = size(indexer.num_heads), size(indexer.width), self.layer.compressed
        if mixer.rotary > width:
            raise _Unfit
        return Indexer(
            wq=self.matrix(indexer.q_b_proj, heads * width, mixer.q_rank),
            weights=self.weight(indexer.scorer.weights_proj, heads, self.layer.width, kind=Float32Linear),
            heads=heads,
            width=width,
            top_k=EVERYTHING if attention.index_dense else size(attention.index_topk),
        )

    def channel_mixer(self, norm: nn.Module, module: nn.Module) -> ChannelMixer:
        found, width = ChannelMixer(limit=math.inf), self.layer.width
        found.norm, found.norm_eps = self.norm(norm, width)
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
        found.experts, inner = size(router.num_experts), size(experts.down_proj.shape[2])
        if experts.num_experts != found.experts or module.num_experts != found.experts:
            raise _Unfit
        if not choice_fits(choice, found.experts, table is not None) or not is_real(choice[-1]):
            raise _Unfit
        names = "top_k groups best_groups group_top scoring normalises weight_scale"
        for name, number in zip(names.split(), choice, strict=True):
            setattr(found, name, number)
        found.router = self.pointer(router.weight, found.experts, width)
        if bias is not None:
            found.bias = self.pointer(bias, found.experts, dtype=torch.float32)
        if table is not None:
            found.vocabulary = len(table)
            found.table = self.pointer(table, found.vocabulary, found.top_k, dtype=torch.int64)
        shapes = (found.experts, 2 * inner, width), (found.experts, width, inner)
        if isinstance(experts, Int8Experts):
            found.gate_up = self.int8(experts, "gate_up_proj", experts.gate_up_proj_scale, *shapes[0])
            found.down = self.int8(experts, "down_proj", experts.down_proj_scale, *shapes[1])
        else:
            found.gate_up = Matrix(self.pointer(experts.gate_up_proj, *shapes[0]), None)
            found.down = Matrix(self.pointer(experts.down_proj, *shapes[1]), None)
        found.inner = inner
        found.limit = limit(experts.swiglu_limit)
        if module.shared_experts is not None:
            self.everyone(found, module.shared_experts)
        return found

    def everyone(self, mixer: ChannelMixer, module: nn.Module) -> None:
        """The network that all tokens go through."""
        if type(module) not in (FeedForward, DenseChannelMixer) or not module.is_swiglu:
            raise _Unfit
        inner, width = size(module.down_proj.in_features), self.layer.width
        mixer.shared_gate = self.matrix(module.gate_proj, inner, width)
        mixer.shared_up = self.matrix(module.up_proj, inner, width)
        mixer.shared_down, mixer.shared_inner = self.matrix(module.down_proj, width, inner), inner
        mixer.limit = limit(module.swiglu_limit)


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

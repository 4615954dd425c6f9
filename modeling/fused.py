"""Decoding steps and texts by the functions of `kernels/`.

Where a few tokens are read, PyTorch spends more time on dispatching its many small operations than on computing; where
many are, every operation writes what the next one reads again. Modules ask `kernels_for` whether the native functions
can do their work; where it says None they go on with their own definition, which these functions are equal to:

    project, project_groups   nn.Linear; GroupedLinear
    norm_rotate               FathomRMSNorm, apply_rotary
    angles                    FathomRotaryEmbedding.forward
    attend_latents            MultiHeadLatentAttention.absorbed_attention
    attend_shared             eager_with_sinks
    attend_text               eager_attention, of any number of tokens
    choose_keys               index_scores, then best_of
    route                     ExpertRouter.forward
    mix_channels              RoutedExperts.forward, FeedForward.forward
    read_streams              HyperConnection.forward, StreamCollapse.forward; write_streams: HyperConnection.write
    project_int8, mix_int8    Int8Linear and Int8GroupedLinear; Int8Experts

Products are summed in fp32 and rounded where they are multiplied again or a function ends, while PyTorch rounds bf16
after every operation.

Shapes: B batch, T tokens per sequence, N = B T tokens, H heads, D head width, P rotary width, R latent width, S keys,
K chosen, E experts, n residual streams, d width.
"""

import ctypes
import math
import re
from functools import cache
from itertools import count

import torch
from torch import nn
from transformers.activations import SiLUActivation

from .native import is_ready, library

# Tokens of a decoding step: drafts, and rows of a batch.
FEW_TOKENS = 16
# Tokens of a short text. Beyond, functions that are made for few tokens are slower than PyTorch's, and others put
# weights into columns first (`kernels/columns.h`).
SHORT_TEXT = 128
# Numbers of a weight from which on a compiled graph leaves its product with a few tokens to the native function.
LARGE = 2**19
PLAIN = (torch.Tensor, nn.Parameter)
SCORING_NUMBERS = {"sigmoid": 0, "softmax": 1, "sqrtsoftplus": 2}
SILU = (nn.SiLU, SiLUActivation)

_kernels: dict[torch.dtype, "Kernels"] = {}


def kernels_for(
    training: bool,
    tokens: int,
    x: torch.Tensor,
    *weights: torch.Tensor,
    most: float | None = None,
    any_text: bool = False,
) -> "Kernels | None":
    """The native functions, if they can take `x` and weights: few tokens on a CPU, of one dtype, and no gradients.

    None also under autocast, in graphs that are being made, for weights that are no plain tensors (quantised, sharded,
    offloaded), and as long as `native` has nothing to call.

    Args:
        training: the module's mode. Gradient checkpointing runs layers without gradients first, to run them again with;
            both must be the same.
        most: the largest number of tokens; None: `SHORT_TEXT`.
        any_text: whether the functions serve texts of any length where `multiplies_texts` says so.
    """
    # In a graph the number of tokens may not be asked for.
    if torch.compiler.is_compiling():
        return None
    if tokens > (SHORT_TEXT if most is None else most) and not (any_text and multiplies_texts(x.dtype)):
        return None
    kernels = kernels_of(training, x)
    if kernels is None:
        return None
    for each in (x, *weights):
        if type(each) not in PLAIN or each.dtype is not x.dtype or not each.is_cpu or not each.is_contiguous():
            return None
    return kernels


def is_short_text(tokens: int) -> bool:
    return tokens <= SHORT_TEXT


@cache
def multiplies_texts(dtype: torch.dtype) -> bool:
    """Whether native products of many tokens are as fast on this processor as those of the libraries PyTorch calls.

    They are written for vectors of 512 bits, and those in bf16 for the instruction that multiplies pairs. Where there
    are tiles (AMX), oneDNN uses them.
    """
    about: dict = getattr(torch.cpu, "get_capabilities", dict)()
    if dtype is torch.float32:
        return about.get("avx512_f", False)
    return about.get("avx512_bf16", False) and not about.get("amx_bf16", False)


def kernels_of(training: bool, x: torch.Tensor) -> "Kernels | None":
    """The same for tensors in the dtype of `x`, however many tokens; what they are is for the caller to check."""
    if training or torch.compiler.is_compiling() or torch.is_grad_enabled() or not x.is_cpu:
        return None
    kernels = _kernels.get(x.dtype)
    if kernels is None:
        functions = library(x.dtype)
        if functions is None:
            return None
        kernels = _kernels[x.dtype] = Kernels(functions)
    return None if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing() else kernels


def is_plain(linear: nn.Module, kind: type[nn.Linear] = nn.Linear) -> bool:
    """Whether a module multiplies by its weight and nothing else happens when it is called.

    An adapter in its place (PEFT) has a `weight` as well: that of the module it adapts.
    """
    return type(linear) is kind and linear.bias is None and not (linear._forward_hooks or linear._forward_pre_hooks)


def project(x: torch.Tensor, *maps: nn.Module) -> list[torch.Tensor]:
    """`[each(x) for each in maps]`: up to four linear maps of the same tokens [B, T, d]."""
    if torch.compiler.is_compiling():
        return [_project_in_graph(x, each) for each in maps]
    if x.dim() == 3 and all(map(is_plain, maps)):
        weights = [each.weight for each in maps]
        kernels = kernels_for(maps[0].training, x.shape[0] * x.shape[1], x, *weights, any_text=True)
        if kernels is not None:
            return kernels.project(x, *weights)
    return [each(x) for each in maps]


def new_operator(module: str, name: str, schema: str) -> torch._ops.OpOverload:
    """A new operator for compiled graphs, named after its module, of which a model from the Hub has one of its own."""
    # The same module twice: transformers executes a model's code again after it has changed.
    names = (re.sub(r"\W", "_", module) + "_" * again for again in count())
    library_name = next(each for each in names if not hasattr(getattr(torch.ops, each), name))
    torch.library.define(f"{library_name}::{name}", schema)
    return getattr(getattr(torch.ops, library_name), name).default


PROJECT = new_operator(__name__, "project", "(Tensor x, Tensor weight) -> Tensor")


@torch.library.impl(PROJECT.name(), "CPU")
def _project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    kernels = kernels_for(False, x.shape[:-1].numel(), x, weight)
    return nn.functional.linear(x, weight) if kernels is None else kernels.project(x, weight)[0]


@torch.library.register_fake(PROJECT.name())
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _project_in_graph(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """As one operator, where a matrix is so large that it takes longer than the call."""
    few = x.is_cpu and x.dim() == 3 and x.shape[0] * x.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()
    if few and is_plain(linear) and linear.weight.numel() >= LARGE and is_ready(x.dtype):
        return PROJECT(x, linear.weight)
    return linear(x)


def readable(mask: torch.Tensor | None, batch: int, tokens: int, keys: int) -> bool:
    """Whether the native functions can read a mask as [B or 1, T, S]: boolean, of that size, keys side by side.

    There may be more keys than are looked at, as in a static cache.
    """
    if mask is None:
        return True
    fits = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] == tokens and mask.shape[2] >= keys
    return fits and mask.dtype is torch.bool and type(mask) is torch.Tensor and mask.stride(-1) == 1


def one_for_all_heads(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask [B or 1, 1, T, S] without the dimension of the heads; None where there is none, or one for each."""
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        return None
    return attention_mask[:, 0]


def seen(mask: torch.Tensor | None) -> tuple[int | None, int, int]:
    """A mask as the native functions read it; nothing where every query sees every key."""
    return (None, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))


class Kernels:
    """The native functions for one dtype. All tensors are contiguous and of that dtype, where nothing else is said."""

    def __init__(self, functions: ctypes.CDLL):
        self.functions = functions

    def project(self, x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        """`x W^T` for up to four weights [n, d]: [..., d] -> [..., n] each."""
        width = x.shape[-1]
        outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
        maps: list[int | None] = []
        for weight, output in zip(weights, outputs, strict=True):
            maps += [weight.data_ptr(), output.data_ptr(), weight.shape[0]]
        maps += [None, None, 0] * (4 - len(weights))
        self.functions.project(x.data_ptr(), x.numel() // width, width, *maps, torch.get_num_threads())
        return outputs

    def project_groups(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """[B, T, G, in] and weight [G out, in] -> [B, T, G, out]."""
        batch, tokens, groups, width = x.shape
        output = x.new_empty(batch, tokens, groups, weight.shape[0] // groups)
        sizes = (batch * tokens, groups, width, weight.data_ptr(), output.shape[-1])
        self.functions.project_groups(x.data_ptr(), *sizes, output.data_ptr(), torch.get_num_threads())
        return output

    def norm_rotate(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        first: int = 0,
        interleaved: bool = True,
        backwards: bool = False,
        norm_width: int = 0,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """Norms the first `norm_width` numbers of heads [B, T, H, D], then rotates P of them from `first` on.

        Args:
            cos, sin: [B or 1, T, P / 2].
            norm: [norm_width], the norm's weight, or None without one.
        """
        width, heads = x.shape[-1], x.shape[-2]
        output = torch.empty_like(x)
        self.functions.norm_rotate(
            x.data_ptr(),
            output.data_ptr(),
            x.numel() // (width * heads),
            heads,
            width,
            None if norm is None else norm.data_ptr(),
            norm_width,
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            cos.shape[0] * cos.shape[1],
            2 * cos.shape[-1],
            first,
            interleaved,
            -1.0 if backwards else 1.0,
            torch.get_num_threads(),
        )
        return output

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of [..., d]."""
        output = torch.empty_like(x)
        width = x.shape[-1]
        self.functions.norm_rotate(
            *(x.data_ptr(), output.data_ptr(), x.numel() // width, 1, width, weight.data_ptr(), width, eps),
            *(None, None, 1, 0, 0, 0, 1.0, torch.get_num_threads()),
        )
        return output

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, T, P / 2] of positions int64 [B, T] times frequencies fp32 [P / 2], times `scale`."""
        positions, pairs = positions.contiguous(), frequencies.shape[0]
        cos = torch.empty(*positions.shape, pairs, dtype=dtype)
        sin = torch.empty_like(cos)
        sizes = positions.numel(), frequencies.data_ptr(), pairs, scale
        self.functions.angles(positions.data_ptr(), *sizes, cos.data_ptr(), sin.data_ptr())
        return cos, sin

    def attend_latents(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        kv_b: torch.Tensor,
        scaling: float,
        rank: int,
        nope: int,
        visible: torch.Tensor | None,
        chosen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Absorbed attention of MLA.

        Args:
            query: [B, T, H, D + P].
            cache: [B, S, R + P], rows side by side.
            kv_b: [H (D + D_v), R].
            visible: bool [B or 1, T, S], see `readable`; None: every query sees every key.
            chosen: int64 [B, T, K], the keys that a query reads, which `visible` is then about; None: all.

        Returns:
            [B, T, H D_v].
        """
        batch, tokens, heads, _ = query.shape
        value_width = kv_b.shape[0] // heads - nope
        output = query.new_empty(batch, tokens, heads * value_width)
        self.functions.attend_latents(
            query.data_ptr(),
            cache.data_ptr(),
            cache.stride(0),
            cache.shape[-1],
            rank,
            cache.shape[1] if chosen is None else chosen.shape[2],
            None if chosen is None else chosen.data_ptr(),
            *seen(visible),
            kv_b.data_ptr(),
            nope,
            value_width,
            batch,
            tokens,
            heads,
            scaling,
            output.data_ptr(),
            torch.get_num_threads(),
        )
        return output

    def attend_shared(
        self, query: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor | None, sinks: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Attention with sinks [H] to one key per token, its value too: query [B, T, H, D], keys [B, S, D].

        What is `visible`: as in `attend_latents`.
        """
        batch, tokens, heads, width = query.shape
        output = torch.empty_like(query)
        self.functions.attend_shared(
            *(query.data_ptr(), keys.data_ptr(), keys.stride(0), width, keys.shape[1], *seen(visible)),
            *(batch, tokens, heads, scaling, sinks.data_ptr(), output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def attend_text(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of a text: query [B, H, T, D], key [B, H_kv, S, D], value [B, H_kv, S, D_v] -> [B, T, H, D_v].

        The numbers of a row stand side by side, rows anywhere.

        Args:
            visible: bool [B or 1, T, S], see `readable`; None: causal, and the last query stands at the last key.
        """
        batch, heads, tokens, width = query.shape
        kv_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
        output = query.new_empty(batch, tokens, heads, value_width)
        rows = [number for each in (query, key, value) for number in (each.data_ptr(), *each.stride()[:3])]
        sizes = batch, heads, heads // kv_heads, tokens, keys, width, value_width
        self.functions.attend_text(*rows, *seen(visible), *sizes, scaling, output.data_ptr(), torch.get_num_threads())
        return output

    def choose_keys(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        visible: torch.Tensor | None,
        top_k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys that an indexer chooses for every query.

        Args:
            query: [B, T, J, D]. keys: [B, S, D], rows side by side, S >= K.
            visible: as in `attend_latents`.
            hidden_states: [B, T, d], which with `weight` [J, d] give the weights of the heads (`head_weights`).

        Returns:
            int64 [B, T, K] in the order of the keys, and bool [B, T, K]: False for keys that are not visible, which
            fill up where less than K are.
        """
        batch, tokens, heads, width = query.shape
        query = query.contiguous()
        chosen = torch.empty(batch, tokens, top_k, dtype=torch.int64)
        sees = torch.empty(batch, tokens, top_k, dtype=torch.bool)
        self.functions.choose_keys(
            *(query.data_ptr(), keys.data_ptr(), keys.stride(0), hidden_states.data_ptr(), weight.data_ptr()),
            *(hidden_states.shape[2], *seen(visible), batch, tokens, heads, width, keys.shape[1], top_k),
            *(chosen.data_ptr(), sees.data_ptr(), torch.get_num_threads()),
        )
        return chosen, sees

    def route(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        choice: tuple[int | float, ...],
        bias: torch.Tensor | None,
        table: torch.Tensor | None,
        ids: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits fp32 [N, E], weights fp32 [N, K] and indices [N, K] of the experts that tokens [N, d] choose.

        Args:
            choice: top_k, n_group, topk_group, group_top, scoring (`SCORING_NUMBERS`), normalises, scale.
            bias: fp32 [E] or None. table: int64 [V, K], by which the token ids [N] alone choose, or None.
        """
        tokens, experts, top_k = x.shape[0], weight.shape[0], int(choice[0])
        ids = None if ids is None else ids.contiguous()
        logits = torch.empty(tokens, experts)
        weights = torch.empty(tokens, top_k)
        indices = torch.empty(tokens, top_k, dtype=torch.int64)
        self.functions.route(
            *(x.data_ptr(), tokens, x.shape[1], weight.data_ptr(), None if bias is None else bias.data_ptr()),
            *(None if table is None else table.data_ptr(), None if ids is None else ids.data_ptr(), experts, *choice),
            *(logits.data_ptr(), weights.data_ptr(), indices.data_ptr(), torch.get_num_threads()),
        )
        return logits, weights, indices

    def mix_experts(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        limit: float | None,
    ) -> torch.Tensor:
        """Tokens [N, d] through their experts [N, K], weighted by fp32 [N, K] and added: [N, d]."""
        output = torch.empty_like(x)
        self.functions.mix_channels(
            *(x.data_ptr(), x.shape[0], x.shape[1], indices.data_ptr(), weights.data_ptr(), indices.shape[1]),
            *(gate_up.data_ptr(), down.data_ptr(), down.shape[2], None, None, None, 0),
            *(math.inf if limit is None else limit, output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def mix_channels(
        self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, limit: float | None
    ) -> torch.Tensor:
        """Tokens [..., d] through one gated network, weights [I, d], [I, d] and [d, I]: [..., d]."""
        output = torch.empty_like(x)
        self.functions.mix_channels(
            *(x.data_ptr(), x.numel() // x.shape[-1], x.shape[-1], None, None, 0, None, None, 0),
            *(gate.data_ptr(), up.data_ptr(), down.data_ptr(), gate.shape[0]),
            *(math.inf if limit is None else limit, output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def read_streams(
        self,
        streams: torch.Tensor,
        fn: torch.Tensor,
        base: torch.Tensor,
        scale: torch.Tensor,
        norm_eps: float,
        eps: float,
        iterations: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a sub-layer reads of streams [B, T, n, d]: [B, T, d]; and its fp32 weights `StreamMixing`."""
        batch, tokens, n, _ = streams.shape
        post, residual = torch.empty(batch, tokens, n), torch.empty(batch, tokens, n, n)
        addresses = iterations, post.data_ptr(), residual.data_ptr()
        return self._sum_streams(streams, (fn, base, scale), norm_eps, eps, addresses), post, residual

    def collapse_streams(
        self, streams: torch.Tensor, weights: tuple[torch.Tensor, ...], norm_eps: float, eps: float
    ) -> torch.Tensor:
        """Streams [B, T, n, d] as one, [B, T, d], by `hc_fn`, `hc_base` and `hc_scale`."""
        return self._sum_streams(streams, weights, norm_eps, eps, (0, None, None))

    def _sum_streams(self, streams, weights, norm_eps: float, eps: float, mixing: tuple) -> torch.Tensor:
        """`mixing`: Sinkhorn's steps, and where to write `post` and `residual`."""
        batch, tokens, n, width = streams.shape
        output = streams.new_empty(batch, tokens, width)
        iterations, *written = mixing
        self.functions.read_streams(
            *(streams.data_ptr(), batch * tokens, n, width, *(each.data_ptr() for each in weights)),
            *(norm_eps, eps, iterations, output.data_ptr(), *written, torch.get_num_threads()),
        )
        return output

    def write_streams(
        self, streams: torch.Tensor, output: torch.Tensor, post: torch.Tensor, residual: torch.Tensor
    ) -> torch.Tensor:
        """Streams [B, T, n, d] after a sub-layer's output [B, T, d], by what `read_streams` gave."""
        batch, tokens, n, width = streams.shape
        written = torch.empty_like(streams)
        self.functions.write_streams(
            *(streams.data_ptr(), output.data_ptr(), post.data_ptr(), residual.data_ptr()),
            *(batch * tokens, n, width, written.data_ptr()),
        )
        return written

    def project_int8(self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, groups: int = 1) -> torch.Tensor:
        """`x W^T` for an int8 weight [n, d] with fp32 scales [n]: [..., d] -> [..., n].

        With groups, as in `project_groups`: [..., G, in], weight [G out, in] and scales [G out] -> [..., G, out].
        """
        rows, width = weight.shape[0] // groups, x.shape[-1]
        output = x.new_empty(*x.shape[:-1], rows)
        self.functions.project_int8(
            *(x.data_ptr(), x.numel() // (groups * width), groups, width, weight.data_ptr(), scale.data_ptr(), rows),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output

    def mix_int8(
        self,
        x: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_scale: torch.Tensor,
        down: torch.Tensor,
        down_scale: torch.Tensor,
        limit: float | None,
    ) -> torch.Tensor:
        """`mix_experts` by int8 weights with fp32 scales [E, 2 I] and [E, d]."""
        output = torch.empty_like(x)
        matrices = gate_up, gate_up_scale, down, down_scale
        self.functions.mix_int8(
            *(x.data_ptr(), x.shape[0], x.shape[1], indices.data_ptr(), weights.data_ptr(), indices.shape[1]),
            *(*[each.data_ptr() for each in matrices], down.shape[2], math.inf if limit is None else limit),
            *(output.data_ptr(), torch.get_num_threads()),
        )
        return output

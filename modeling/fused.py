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

import re
from functools import cache
from itertools import count

import torch
from torch import nn
from transformers.activations import SiLUActivation

from .native import is_ready, library
from .native_arguments import PLAIN
from .native_functions import Kernels

# Tokens of a decoding step: drafts, and rows of a batch.
FEW_TOKENS = 16
# Tokens of a short text. Beyond, functions that are made for few tokens are slower than PyTorch's, and others put
# weights into columns first (`kernels/columns.h`).
SHORT_TEXT = 128
# Numbers of a weight from which on a compiled graph leaves its product with a few tokens to the native function.
LARGE = 2**19
SCORING_NUMBERS = {"sigmoid": 0, "softmax": 1, "sqrtsoftplus": 2}
SILU = (nn.SiLU, SiLUActivation)

_kernels: dict[torch.dtype, Kernels] = {}


def kernels_for(
    training: bool,
    tokens: int,
    x: torch.Tensor,
    *weights: torch.Tensor,
    most: float | None = None,
    any_text: bool = False,
) -> Kernels | None:
    """The native functions, if they can take `x` and weights: few tokens on a CPU, of one dtype, and no gradients.

    None also under autocast, in graphs that are being made, for no tokens at all, for weights that are no plain tensors
    (quantised, sharded, offloaded), and as long as `native` has nothing to call. Whether shapes fit, the functions say.

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
        if not each.numel():
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


def kernels_of(training: bool, x: torch.Tensor) -> Kernels | None:
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
        outputs = kernels and kernels.project(x, *weights)
        if outputs is not None:
            return outputs
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
    outputs = kernels and kernels.project(x, weight)
    return nn.functional.linear(x, weight) if outputs is None else outputs[0]


@torch.library.register_fake(PROJECT.name())
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _project_in_graph(x: torch.Tensor, linear: nn.Module) -> torch.Tensor:
    """As one operator, where a matrix is so large that it takes longer than the call."""
    few = x.is_cpu and x.dim() == 3 and x.shape[0] * x.shape[1] <= FEW_TOKENS and not torch.is_grad_enabled()
    if few and is_plain(linear) and linear.weight.numel() >= LARGE and is_ready(x.dtype):
        return PROJECT(x, linear.weight)
    return linear(x)


def one_for_all_heads(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask [B or 1, 1, T, S] without the dimension of the heads; None where there is none, or one for each."""
    if attention_mask is None or attention_mask.dim() != 4 or attention_mask.shape[1] != 1:
        return None
    return attention_mask[:, 0]

"""Memory of texts on a CPU: of long ones as little as possible, of others always the same.

Every layer makes and frees tensors of some megabytes. glibc gives the end of its heap back to the system as soon as it
is free, and gets it again for the next layer, page by page and each filled with zeros: a quarter of the time in which a
prompt of 4096 tokens is read. So it is told to keep some (`keep_freed_memory`).

Long texts are another matter. What treats each token by itself does so for some of them at a time (`in_parts`), and
what has been freed goes back to the system (`give_back_freed_memory`). Under 32 MiB tensors of many sizes come from one
heap, where a small one that lives on in the middle of a freed large one makes the next large one go to new memory:
reading 32k tokens then holds a third more than there are tensors.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache

import torch

# Tokens of a row that are treated at a time where no gradient is asked for.
TOKENS_AT_ONCE = 4096
LONG_TEXT = 2**14

# Of so few tokens no tensor is large enough to be given back.
FEW_TOKENS = 128
# What glibc may keep of freed memory, and of which size on a tensor has memory of its own, which it never keeps; the
# latter is glibc's largest.
KEPT_BYTES = 2**28
OWN_MEMORY_BYTES = 2**25
# Their numbers in malloc.h, and what a user may have set instead.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def in_parts(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, dim: int = -2, into: torch.Tensor | None = None
) -> torch.Tensor:
    """`function(*inputs)`, which treats each token by itself, for some tokens of a long text at a time.

    What it needs in between is then not held for all of them. A gradient would need all of it anyway, and a compiled
    graph is made for one length.

    Args:
        inputs: tensors whose dimension `dim` is that of the tokens, as it is the result's.
        into: one of the inputs, which nobody needs any more: a long text's result takes its place.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or inputs[0].shape[dim] <= TOKENS_AT_ONCE:
        return function(*inputs)
    tokens, output = inputs[0].shape[dim], into
    for start in range(0, tokens, TOKENS_AT_ONCE):
        part = dim, start, min(TOKENS_AT_ONCE, tokens - start)
        result = function(*(each.narrow(*part) for each in inputs))
        if output is None:
            # Results of the parts, kept one by one, would lie between the memory that each part frees for the next.
            shape = list(result.shape)
            shape[dim] = tokens
            output = result.new_empty(shape)
        output.narrow(*part).copy_(result)
        del result
        give_back_freed_memory(tokens)
    return output


def keep_freed_memory(embeds: torch.Tensor) -> None:
    """Before a text [B, T, d] of more than a few tokens is read on a CPU: what its layers free is kept for the next."""
    if embeds.is_cpu and embeds.shape[:2].numel() > FEW_TOKENS and not torch.compiler.is_compiling():
        _keep_freed_memory()


@cache
def _keep_freed_memory() -> None:
    """Lets glibc keep up to 256 MiB of this process; nothing where its environment says how much.

    Threads beside the first have heaps of their own, to each of which it applies.
    """
    mallopt = _glibc("mallopt")
    if mallopt is not None and not any(name in os.environ for name in SETTINGS):
        mallopt(M_MMAP_THRESHOLD, OWN_MEMORY_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


@cache
def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc's allocator; other systems' have none of that name."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


def give_back_freed_memory(tokens: int) -> None:
    """Gives all free pages of the heap back, also those between tensors, where a text of so many tokens is read.

    Doing so, and asking for pages again, takes some milliseconds, which shorter texts would feel.
    """
    trim = _glibc("malloc_trim") if tokens > LONG_TEXT else None
    if trim is not None:
        trim(0)

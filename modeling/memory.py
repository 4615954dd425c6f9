"""Long texts in little memory: what treats each token by itself does so for some of them at a time, and what has been
freed goes back to the system.

Of a long text every layer makes and frees tensors of many sizes. Under 32 MiB glibc takes them from one heap, where a
small one that lives on in the middle of a freed large one makes the next large one go to new memory: reading 32k tokens
then holds a third more than there are tensors.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch

# Tokens of a row that are treated at a time where no gradient is asked for.
TOKENS_AT_ONCE = 4096
LONG_TEXT = 2**14


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


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's function for it; other systems' allocators have none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back_freed_memory(tokens: int) -> None:
    """Gives all free pages of the heap back, also those between tensors, where a text of so many tokens is read.

    Doing so, and asking for pages again, takes some milliseconds, which shorter texts would feel.
    """
    trim = _trim() if tokens > LONG_TEXT else None
    if trim is not None:
        trim(0)

"""Memory that has been freed, on its way back to the system.

Of a long text every layer makes and frees tensors of many sizes. Under 32 MiB glibc takes them from one heap, where a
small one that lives on in the middle of a freed large one makes the next large one go to new memory: reading 32k tokens
then holds a third more than there are tensors.
"""

import ctypes
from collections.abc import Callable
from functools import cache

LONG_TEXT = 2**14


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

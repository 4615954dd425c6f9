"""Loads a library that `native_build` has made, and turns what its functions return into Python's exceptions.

The library says itself what its functions are called, what they take, and how large the structures are that they are
given. One that was built from another source, whose numbers would be read at other places, is refused.
"""

import ctypes
from types import SimpleNamespace
from typing import Any

from .native_structures import MIRRORED, VERSION

DONE, OUT_OF_MEMORY, UNFIT = 0, 1, 2  # `Status` in kernels/failures.h
ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}


class _Entry(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("address", ctypes.c_void_p), ("arguments", ctypes.c_char_p)]


class _Mirrored(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("bytes", ctypes.c_int64)]


def load(path: str) -> SimpleNamespace:
    """The functions of a library, by name.

    Each returns True, or False where an index that it was given points outside of its array: then nothing of its output
    is to be used, and nothing else has been written to.

    Raises:
        OSError: no library, or one that is not of this source.
        MemoryError, RuntimeError: by the functions, if there is no memory for what they keep, or something else failed.
    """
    library = ctypes.CDLL(path)
    try:
        version = ctypes.c_int64.in_dll(library, "fathom_version").value
        entries = _listed(library, _Entry, "function")
        mirrored = {each.name.decode(): each.bytes for each in _listed(library, _Mirrored, "structure")}
    except ValueError as error:  # a name that is not there
        raise OSError(f"{path} is no library of these kernels: {error}") from error
    expected = {kind.__name__: ctypes.sizeof(kind) for kind in MIRRORED}
    if (version, mirrored) != (VERSION, expected):
        raise OSError(f"{path} was built from another source: version {version} of {VERSION}, structures {mirrored}")
    functions = {entry.name.decode(): _function(entry) for entry in entries}
    return SimpleNamespace(**functions, library=library)


def _listed(library: ctypes.CDLL, kind: type[Any], what: str) -> list[Any]:
    count = ctypes.c_int64.in_dll(library, f"fathom_{what}_count").value
    return list((kind * count).in_dll(library, f"fathom_{what}s"))


def _function(entry: _Entry) -> Any:
    kinds = [ARGUMENTS[letter] for letter in entry.arguments.decode()]
    function = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(entry.address)
    function.errcheck = _has_done  # type: ignore[assignment, attr-defined]
    return function


def _has_done(status: int, function: Any, arguments: tuple) -> bool:
    if status == DONE:
        return True
    if status == UNFIT:
        return False
    if status == OUT_OF_MEMORY:
        raise MemoryError("a native function found no memory for what it computes; give it fewer tokens at a time")
    raise RuntimeError("a native function failed; FATHOM_KERNELS=0 leaves them out")

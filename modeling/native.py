"""The native functions of `kernels/`, for modules to ask for; what they are for, `fused` says.

The first decoding step on a CPU starts the system's C++ compiler in the background (some seconds, once per machine);
until it is done, and where nothing can be built (`native_build`), PyTorch's own operations serve. Then one line says
why. A program does not wait at its end: a build that it has begun ends with it.

Only the installed package builds: in a model's folder on the Hub there is no such source, and PyTorch serves.
"""

import threading
from types import SimpleNamespace

import torch
from transformers.utils import logging

from .native_build import SOURCES, Unwanted, provide

logger = logging.get_logger(__name__)

NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16"}

_libraries: dict[torch.dtype, SimpleNamespace | None] = {}
_builds: dict[torch.dtype, threading.Thread] = {}
_lock = threading.Lock()
_said = False


def library(dtype: torch.dtype) -> SimpleNamespace | None:
    """The functions of `kernels/` for tensors of `dtype`; None while they are built, and where they cannot be."""
    if dtype in _libraries or dtype not in NUMBERS:
        return _libraries.get(dtype)
    with _lock:
        if dtype not in _builds:
            name = f"fathom-kernels-{NUMBERS[dtype]}"
            _builds[dtype] = threading.Thread(target=_provide, args=(dtype,), name=name, daemon=True)
            _builds[dtype].start()
    return None


def wait(*dtypes: torch.dtype) -> bool:
    """Builds and loads for some types (none given: all), and returns when that is done: whether it succeeded."""
    for dtype in dtypes or NUMBERS:
        if library(dtype) is None and dtype in _builds:
            _builds[dtype].join()
    return all(_libraries.get(dtype) is not None for dtype in dtypes or NUMBERS)


@torch._dynamo.assume_constant_result
def is_ready(dtype: torch.dtype) -> bool:
    """The same of one type, for graphs in the making. They are made for long, so that it is worth waiting for."""
    return dtype in NUMBERS and wait(dtype)


def _provide(dtype: torch.dtype) -> None:
    functions = None
    try:
        functions, lacking = provide(NUMBERS[dtype])
        if lacking is not None:
            _say(f"the native functions for CPUs are built anew by every process: {lacking}")
    except Unwanted as wish:
        logger.info(f"PyTorch's own operations serve: {wish}")
    except Exception as error:
        # Whatever it was, in a thread nobody would catch it, and PyTorch serves as well.
        reason = "only the installed package has them" if not SOURCES.is_dir() else str(error) or type(error).__name__
        _say(f"PyTorch's own operations serve, on a CPU slower than native functions: {reason}")
    finally:
        _libraries[dtype] = functions


def _say(line: str) -> None:
    """A warning, the first alone: what keeps one type from being built keeps the other."""
    global _said
    with _lock:
        said, _said = _said, True
    if not said:
        logger.warning(line)

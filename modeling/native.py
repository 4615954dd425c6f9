"""Builds `kernels/` for this machine and loads it; what its functions are for, `fused` says.

The first decoding step on a CPU starts the system's C++ compiler in the background (some seconds, once per machine);
until it is done, and where there is no compiler, PyTorch's own operations serve. What is built stays in
`$XDG_CACHE_HOME/fathom-lm` (`~/.cache/fathom-lm`), under a name made of the source, the compiler and the processor.

    FATHOM_KERNELS=0   neither builds nor loads anything
    CXX                the compiler, where c++, g++ and clang++ are not to be looked for

Only the installed package builds: in a model's folder on the Hub there is no such source, and PyTorch serves.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from functools import cache
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

SOURCES = Path(__file__).with_name("kernels")
NUMBERS = {torch.float32: "float", torch.bfloat16: "bf16"}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# From the best to what every compiler takes: Apple's has no OpenMP, some processors have no `native`.
CHOICES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
LONGEST_BUILD = 300  # seconds

_pointer, _size, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_keys_seen = (_pointer, _size, _size)
_SIGNATURES: dict[str, tuple] = {
    "project": (_pointer, _size, _size, *(_pointer, _pointer, _size) * 4, _size),
    "project_groups": (_pointer, _size, _size, _size, _pointer, _size, _pointer, _size),
    "norm_rotate": (
        *(_pointer, _pointer, _size, _size, _size, _pointer, _size, _real),
        *(_pointer, _pointer, _size, _size, _size, _size, _real, _size),
    ),
    "angles": (_pointer, _size, _pointer, _size, _real, _pointer, _pointer),
    "attend_latents": (
        *(_pointer, _pointer, _size, _size, _size, _size, _pointer, *_keys_seen),
        *(_pointer, _size, _size, _size, _size, _size, _real, _pointer, _size),
    ),
    "attend_shared": (
        *(_pointer, _pointer, _size, _size, _size, *_keys_seen),
        *(_size, _size, _size, _real, _pointer, _pointer, _size),
    ),
    "attend_text": (
        *(_pointer, _size, _size, _size) * 3,
        *_keys_seen,
        *(_size, _size, _size, _size, _size, _size, _size, _real, _pointer, _size),
    ),
    "choose_keys": (
        *(_pointer, _pointer, _size, _pointer, _pointer, _size, *_keys_seen),
        *(_size, _size, _size, _size, _size, _size, _pointer, _pointer, _size),
    ),
    "route": (
        *(_pointer, _size, _size, _pointer, _pointer, _pointer, _pointer),
        *(_size, _size, _size, _size, _size, _size, _size, _real, _pointer, _pointer, _pointer, _size),
    ),
    "mix_channels": (
        *(_pointer, _size, _size, _pointer, _pointer, _size, _pointer, _pointer, _size),
        *(_pointer, _pointer, _pointer, _size, _real, _pointer, _size),
    ),
    "read_streams": (
        *(_pointer, _size, _size, _size, _pointer, _pointer, _pointer, _real, _real, _size),
        *(_pointer, _pointer, _pointer, _size),
    ),
    "write_streams": (_pointer, _pointer, _pointer, _pointer, _size, _size, _size, _pointer),
    "decode_layer": (_pointer,) * 6,
    "read_layer": (_pointer,) * 6,
    "remember_text": (_pointer,) * 4,
    "decode_channels": (_pointer,) * 5,
    "begin_compressed": (_pointer,) * 7,
    "end_compressed": (_pointer,) * 8,
    "project_int8": (_pointer, _size, _size, _size, _pointer, _pointer, _size, _pointer, _size),
    "mix_int8": (
        *(_pointer, _size, _size, _pointer, _pointer, _size, *(_pointer, _pointer) * 2),
        *(_size, _real, _pointer, _size),
    ),
}

_libraries: dict[torch.dtype, ctypes.CDLL | None] = {}
_builds: dict[torch.dtype, threading.Thread] = {}
_lock = threading.Lock()


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The functions of `kernels/` for tensors of `dtype`; None while they are built, and where they cannot be."""
    if dtype in _libraries or dtype not in NUMBERS:
        return _libraries.get(dtype)
    with _lock:
        if dtype not in _builds:
            # No daemon: a short program that ends meanwhile leaves the next one what it has begun.
            _builds[dtype] = threading.Thread(target=_provide, args=(dtype,), name=f"fathom-kernels-{NUMBERS[dtype]}")
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
    try:
        _libraries[dtype] = _load(_built(NUMBERS[dtype]))
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        _libraries[dtype] = None
        logger.info(f"decoding by PyTorch's own operations: {error}")


def _load(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    for name, signature in _SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = signature, None
    return functions


def _built(number: str) -> Path:
    """The library for one type, built unless it is there.

    Raises:
        OSError: no source, no compiler, or no place to write to.
        subprocess.SubprocessError: the compiler fails at every choice of flags.
    """
    if os.environ.get("FATHOM_KERNELS") == "0":
        raise OSError("FATHOM_KERNELS=0")
    compiler = _compiler()
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir())]
    identity = "\0".join((*sources, number, compiler, _version(compiler), _processor()))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom-lm"
    target = root / f"kernels-{number}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            made = Path(folder) / target.name
            _compile(compiler, number, made)
            made.replace(target)  # at once, so that no other process finds half of it
    return target


def _compile(compiler: str, number: str, target: Path) -> None:
    for choice in CHOICES:
        command = [compiler, *FLAGS, *choice, f"-DNUMBER={number}", str(SOURCES / "kernels.cpp"), "-o", str(target)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=LONGEST_BUILD)
            return
        except subprocess.CalledProcessError:
            if choice == CHOICES[-1]:
                raise


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise OSError("there is no C++ compiler (c++, g++ or clang++; CXX names another)")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=60).stdout


@cache
def _processor() -> str:
    """What the machine's processor is and can do: a home directory may be that of several machines."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(
        [platform.machine(), platform.processor(), *sorted({each for each in lines if each.startswith(kinds)})]
    )

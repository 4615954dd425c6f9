"""Builds `kernels/` for this machine.

A library is named after its source, the compiler, its flags and the processor, and kept (`native_cache`). Where there
is no folder that may be trusted, it is built in a temporary one, for this process alone.

    FATHOM_KERNELS=0        neither builds nor loads anything
    CXX                     the compiler, where c++, g++ and clang++ are not to be looked for
    FATHOM_KERNELS_FLAGS    flags behind all others, such as -fsanitize=address
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from .native_cache import STALE_SECONDS, LibraryCache, cache_folder
from .native_child import TOOK_TOO_LONG
from .native_library import load

SOURCES = Path(__file__).with_name("kernels")
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
# From the best to what every compiler takes: Apple's has no OpenMP, some processors have no `native`.
CHOICES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
LONGEST_BUILD = 300  # seconds
LONGEST_LOOK = 60  # seconds, for what a compiler does in less than one
PREFIX = "fathom-kernels-"


class Unwanted(Exception):
    """The environment says that nothing is to be built."""


class CompilerError(OSError):
    """The compiler found something wrong."""


def provide(number: str) -> tuple[SimpleNamespace, str | None]:
    """The functions for numbers of one type (as C++ names it), and why they are not kept, if they are not.

    Raises:
        Unwanted: see there.
        OSError: no source, no compiler, or one that fails; nothing can be written, or loaded.
    """
    if os.environ.get("FATHOM_KERNELS") == "0":
        raise Unwanted("FATHOM_KERNELS=0")
    compiler, flags = _compiler(), shlex.split(os.environ.get("FATHOM_KERNELS_FLAGS", ""))
    name = _name(number, compiler, flags)
    try:
        kept = LibraryCache(cache_folder())
    except (OSError, RuntimeError) as error:
        with build_folder() as folder:
            return load(str(_compile(compiler, flags, number, folder))), str(error)
    with kept:
        if (path := kept.find(name)) is not None:
            try:
                return load(path), None
            except OSError:  # another system's: built anew
                kept.remove(name)
        with build_folder() as folder:
            made = _compile(compiler, flags, number, folder)
            try:
                kept.store(name, made.read_bytes())
                return load(kept.find(name) or str(made)), None
            except OSError as error:
                return load(str(made)), str(error)


def _name(number: str, compiler: str, flags: list[str]) -> str:
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.is_file()]
    version = _output(run(compiler, "--version", seconds=LONGEST_LOOK))
    identity = "\0".join((*sources, number, compiler, version, _processor(), *FLAGS, *flags))
    return f"kernels-{number}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise OSError("there is no C++ compiler (c++, g++ or clang++; CXX names another)")


def _compile(compiler: str, flags: list[str], number: str, folder: Path) -> Path:
    """Builds the library with the first flags that suit compiler and processor.

    Where they suit, and the build fails all the same, others would fail too: a full disk is filled once.
    """
    target, source = folder / "kernels.so", SOURCES / "kernels.cpp"
    small = folder / "small.cpp"
    small.write_text("int nothing() { return 0; }\n")
    problem: CompilerError | None = None
    for choice in CHOICES:
        command = [compiler, *FLAGS, *choice, *flags]
        try:
            run(*command, small, "-o", folder / "small.so", seconds=LONGEST_LOOK, folder=folder)
        except CompilerError as error:
            problem = problem or error
            continue
        command += [f"-DNUMBER={number}", str(source)]
        try:
            run(*command, "-o", target, seconds=LONGEST_BUILD, folder=folder)
            return target
        except CompilerError as error:
            problem = error
            try:
                run(*command, "-fsyntax-only", seconds=LONGEST_BUILD, folder=folder)
            except CompilerError:  # the source is not for these flags
                continue
            raise
    raise problem or CompilerError(f"{compiler} takes none of the flags")


def run(*command: str | Path, seconds: float, folder: Path | None = None) -> bytes:
    """What a command prints. It ends with this program, and after so many seconds; see `native_child`.

    Args:
        folder: where it puts temporary files; removed if the program ends before.

    Raises:
        CompilerError: it fails; the message is the last line that it printed about an error.
        OSError: it cannot be started, or takes too long.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("there is no Python to run the compiler from")
    watcher = Path(__file__).with_name("native_child.py")
    arguments = [str(seconds), str(folder or ""), *map(str, command)]
    environment = os.environ | {"LC_ALL": "C"} | ({} if folder is None else {"TMPDIR": str(folder)})
    with tempfile.TemporaryFile(dir=folder) as output:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", str(watcher), *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # an interrupt at the terminal is for the program to take
        ) as process:
            status = process.wait()
        output.seek(0)
        printed = output.read()
    if status == TOOK_TOO_LONG:
        raise OSError(f"{command[0]} had not ended after {seconds} seconds")
    if status:
        raise CompilerError(f"{command[0]} failed: {_problem(printed)}")
    return printed


def _output(printed: bytes) -> str:
    return printed.decode(errors="replace")


def _problem(printed: bytes) -> str:
    """The first line about an error, or else the last of all."""
    lines = [line.strip() for line in _output(printed).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "No space left" in line]
    return (errors or lines[-1:] or ["no word about why"])[0][:300]


@contextmanager
def build_folder() -> Iterator[Path]:
    """A temporary folder of this user's; those that killed programs have left are removed."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        try:
            status = left.lstat()
        except OSError:
            continue
        if time.time() - status.st_mtime > STALE_SECONDS and (
            not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        ):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@cache
def _processor() -> str:
    """What the machine's processor is and can do: a home directory may be that of several machines."""
    information = Path("/proc/cpuinfo")
    try:
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(
        [platform.machine(), platform.processor(), *sorted({each for each in lines if each.startswith(kinds)})]
    )

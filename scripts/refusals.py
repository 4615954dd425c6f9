"""What ends a verb from outside, in one line: signals, memory that runs out, files that cannot be read or written."""

import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..training.errors import DivergedError, SignalError, UserError

# What torch, the dynamic linker, Arrow and C++ say when memory runs out; most of it is no MemoryError.
_OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|failed to map segment|out of memory|bad_alloc|"
    r"can't start new thread|not enough memory|unable to allocate|malloc of size \d+ failed|realloc of size \d+ failed|"
    r"cannot create thread|pthread_create failed|resource temporarily unavailable",
    re.I,
)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise SignalError in the block, so that what it has begun is cleaned up.

    A handler that somebody set stays; so does an ignored SIGHUP, as under nohup. Of several processes, which wait for
    each other in native code, the others are ended by their launcher: there SIGTERM and SIGHUP keep their effect.

    Raises:
        SignalError: also for what libraries make of an interrupted import.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    had: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        had.append(number)
        raise SignalError(number)

    def not_lost(unraisable: Any) -> None:
        # Raised in a destructor or a callback of the import system, it would be printed and forgotten. It comes again
        # when those are over.
        if isinstance(unraisable.exc_value, SignalError):
            again = threading.Timer(0.01, signal.raise_signal, [unraisable.exc_value.number])
            again.daemon = True
            again.start()
        else:
            sys.__unraisablehook__(unraisable)

    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    names = ("SIGINT", "SIGTERM", "SIGHUP") if alone else ("SIGINT",)
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.signal(number, end) for number in numbers if signal.getsignal(number) in usual}
    hook, sys.unraisablehook = sys.unraisablehook, not_lost
    try:
        yield
    except (UserError, DivergedError, KeyboardInterrupt):
        raise
    except Exception as error:
        if had:
            raise SignalError(had[0]) from error
        raise
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            if signal.getsignal(number) is end:
                signal.signal(number, handler)


def machine_refusal(error: BaseException) -> str | None:
    """The line that says what the machine did not give, or None if the error is a mistake of ours."""
    smaller = "free some, or make the model, --batch_size or --sequence_length smaller"
    seen: BaseException | None = error
    while seen is not None:
        # A SystemError is what Python itself makes of memory that it did not get.
        if isinstance(seen, MemoryError | SystemError) or (
            isinstance(seen, OSError | RuntimeError | ImportError) and _OUT_OF_MEMORY.search(str(seen))
        ):
            return f"memory ran out ({_first_line(seen)}); {smaller}"
        seen = seen.__cause__ or seen.__context__
    if (limit := _exhausted_limit()) is not None:
        return f"memory ran out (ulimit -v allows {limit / 1e6:,.0f} MB: {_first_line(error)}); {smaller}"
    if not isinstance(error, OSError):
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{where}{error.strerror}; make room"
    return f"{where}{error.strerror or _first_line(error)}"


def _exhausted_limit() -> int | None:
    """Bytes of address space that this process may have, if that is less than all and nearly used up.

    Libraries that are half imported then raise anything.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        with open("/proc/self/statm", encoding="ascii") as statm:
            used = int(statm.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError, ValueError):
        return None
    return limit if limit != resource.RLIM_INFINITY and used > 0.8 * limit else None


def _first_line(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:200]

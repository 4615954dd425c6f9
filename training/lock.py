"""One run per folder: a lock on --out that no killed process can leave behind.

The lock is the kernel's (flock) on OUT/.lock, not the file's being there: it ends with the process, however that ends.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

_held: set[int] = set()  # descriptors that hold a lock of this process


@contextmanager
def run_lock(out: Path) -> Iterator[None]:
    """Holds the lock on a run's folder for the duration of the block; makes the folder if it is missing.

    In a distributed run, enter it on one process.

    Raises:
        UserError: another process holds it, or the folder cannot be made or written to.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    descriptor = None
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(out / LOCK, out)
        except OSError as error:
            raise UserError(f"cannot write to --out {out}: {error.strerror or error}; choose another folder") from error
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                (out / LOCK).unlink()
            _held.discard(descriptor)
            os.close(descriptor)
        # What was made here and is still empty goes again.
        for folder in new:
            with suppress(OSError):
                folder.rmdir()


def _locked(file: Path, out: Path) -> int:
    """Opens and locks the file; the descriptor holds the lock until it is closed."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            who = f" (process {owner})" if owner.isdigit() else ""
            raise UserError(
                f"another run{who} is writing to --out {out}; stop it, wait for it, or choose another --out"
            ) from error
        except OSError:
            # A file system without locks: what was possible before them is possible still.
            _held.add(descriptor)
            return descriptor
        # The run before may have removed the file between opening and locking: then the lock is on nothing.
        if _is_open_as(file, descriptor):
            break
        os.close(descriptor)
    with suppress(OSError):  # a full disk: the number is for the other run's message alone
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    _held.add(descriptor)
    return descriptor


def _is_open_as(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _let_go() -> None:
    """In a forked child, which would hold the lock on for as long as it outlives its killed parent."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)

"""Standard output that can fail: a reader that has gone (`| head`), a full disk, a terminal that was closed, ASCII.

Imports next to nothing, so that `fathom --help` stays cheap.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Output:
    """A stream that remembers that it failed, and from then on takes everything and writes nothing.

    Args:
        stream: where to write.
        raising: also raise the first failure, for what prints to end.

    Attributes:
        lost: the failure, or None.
    """

    def __init__(self, stream: Any, raising: bool) -> None:
        self.stream, self.raising = stream, raising
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._tried(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, call: Callable, *arguments: str) -> None:
        if self.lost is not None:
            return
        try:
            call(*arguments)
        except OSError as error:
            self.lost = error
            _let_go(self.stream)
            if self.raising:
                raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def watched_output() -> Iterator[Output]:
    """For the duration of the block, standard output tells whether it failed, and the error output never fails.

    Characters that the encoding of either cannot express are printed as `\\xe9`.
    """
    before = sys.stdout, sys.stderr
    output = Output(_usable(sys.stdout), raising=True)
    sys.stdout, sys.stderr = output, Output(_usable(sys.stderr), raising=False)  # type: ignore[assignment]
    try:
        yield output
    finally:
        for stream in (sys.stderr, sys.stdout):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


@contextmanager
def lasting_output() -> Iterator[Output]:
    """For the duration of the block no print fails; ask for `lost`."""
    before = sys.stdout
    lasting = Output(before, raising=False)
    sys.stdout = lasting  # type: ignore[assignment]
    try:
        yield lasting
    finally:
        sys.stdout = before


def _usable(stream: Any) -> Any:
    if stream is None:  # closed by `>&-`
        return open(os.devnull, "w", encoding="utf-8")
    if getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _let_go(stream: Any) -> None:
    """Sends what a broken stream still holds nowhere, else Python tries to write it when it ends, and complains."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)

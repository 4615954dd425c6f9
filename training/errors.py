"""The exceptions that end a verb with one line and no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_CHARACTERS = 1000  # of a message


class UserError(Exception):
    """The input is wrong, as opposed to Fathom. The message names the value, the limit and the mend, in one line.

    Verbs turn it into exit code 2.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class DivergedError(Exception):
    """Training cannot go on: not finite, or a spike (see `guard`). Verbs turn it into exit code 1."""


class SignalError(KeyboardInterrupt):
    """A signal ends the verb: SIGINT, SIGTERM or SIGHUP. Verbs turn it into one line and exit code 128 + its number.

    Attributes:
        number: of the signal.
        note: what that means for what was under way.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.note = ""


def one_line(text: str) -> str:
    """The text without line breaks and control characters, and cut to a length that can be read.

    Names in messages come from files, which may hold anything.
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(text[: 2 * MOST_CHARACTERS].split()))
    return shown if len(shown) <= MOST_CHARACTERS else f"{shown[: MOST_CHARACTERS - 4]} ..."


def reason(error: BaseException) -> str:
    """What an exception says, as the end of a message: its first line, or all where that only leads to the others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines) if lines and lines[0].endswith(":") else next(iter(lines), "")
    speaks = said and isinstance(error, ValueError | OSError)
    return said if speaks or said.startswith("Validation error") else f"{type(error).__name__}: {said}".rstrip(": ")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as the end of an error message.

    Example: `did_you_mean("v33", ["v3", "v2"])` is `"; did you mean v3?"`, and `""` when nothing is near.
    """
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""

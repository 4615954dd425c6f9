"""The exceptions that end a verb with one line and no traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The input is wrong, as opposed to Fathom. The message names the value, the limit and the mend, in one line.

    Verbs turn it into exit code 2.
    """


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as the end of an error message.

    Example: `did_you_mean("v33", ["v3", "v2"])` is `"; did you mean v3?"`, and `""` when nothing is near.
    """
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""

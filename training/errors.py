"""The one exception that means "the input is wrong", as opposed to "Fathom is wrong"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """Bad input. The message names the value, the limit and the mend, in one line; verbs turn it into exit code 2."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as the end of an error message.

    Example: `did_you_mean("v33", ["v3", "v2"])` is `"; did you mean v3?"`, and `""` when nothing is near.
    """
    nearest = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(nearest)}?" if nearest else ""

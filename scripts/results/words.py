"""What plot and page share: languages and how numbers are written."""

from collections.abc import Callable
from typing import Any

Say = Callable[[str, str], str]
Results = dict[str, list[dict[str, Any]]]  # of every variant, one per seed


def speaker(chinese: bool) -> Say:
    """A function that takes the same words in English and Chinese and gives those of the reader."""
    return lambda english, other: other if chinese else english


def number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"

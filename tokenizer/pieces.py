r"""Long texts in pieces, so that encoding one takes memory for a piece and not for the whole.

    "def f(x):\n    return x\ndef g(" -> "def f(x):\n    return x\n", "def g("

No token spans a newline before a character that is no white space, or the place before a blank and a word. Cut there,
the ids of the pieces in a row are the ids of the whole text. A text without such a place (DNA, base64) is cut after
`length` characters: its ids are then others at the cut, and decode to the same text.
"""

import re
from collections.abc import Iterator

PIECE_LENGTH = 1 << 18  # characters; `tokenizers` needs about 200 bytes for each while it encodes
_NEAR_THE_END = 1 << 12  # characters

# White space of Python includes all that the pre-tokenizer's patterns take for white space.
_LINE_END = re.compile(r"\n(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= [A-Za-z])")


def pieces(text: str, length: int = PIECE_LENGTH) -> Iterator[str]:
    """Cuts `text` into pieces of at most `length` characters; joined they are `text`.

    Args:
        text: any text. One of at most `length` characters, the empty one too, is one piece.
        length: characters, at least 2.
    """
    start = 0
    while len(text) - start > length:
        end = _cut(text, start, start + length)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def _cut(text: str, start: int, end: int) -> int:
    """The last place after `start` and not after `end` that no token spans; `end` where there is none."""
    for begin in (max(start + 1, end - _NEAR_THE_END), start + 1):
        for pattern in (_LINE_END, _WORD_END):
            # One character more than may be in the piece, for the patterns look at what follows.
            places = [found.end() for found in pattern.finditer(text, begin - 1, end + 1) if start < found.end() <= end]
            if places:
                return places[-1]
    return end

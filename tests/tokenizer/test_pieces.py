"""Long texts in pieces: nothing lost, and the same ids where a text has places to cut."""

from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.tokenizer import encode_text, plain_text, train_tokenizer
from fathom.tokenizer.pieces import pieces

TOKENIZER = train_tokenizer(["def f(x):\n    return x  # a word, and another one\r\n\n" * 9], 300, 64)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
FRAGMENTS = ("def", " f", "x", "(", ")", "\n", "\n\n", "\r\n", "    ", " ", "\t", "a word", "é", "深い", "12345", "--")
ODD_FRAGMENTS = ("\x1c", "\x85", "\u2028", "\u3000", "e\u0301", "\u0301", "'s", "🙂", "\0")
lines = st.lists(st.sampled_from(FRAGMENTS + ODD_FRAGMENTS), max_size=60).map("".join)


def is_good_place(text: str, place: int) -> bool:
    """A newline before what is no white space, or the place before a blank and a word."""
    before, after = text[place - 1], text[place : place + 2]
    if after[0] == " ":
        return not before.isspace() and after[1:].isascii() and after[1:].isalpha()
    return before == "\n" and not after[0].isspace()


@settings(deadline=None)
@given(any_text, st.integers(2, 9))
def test_pieces_are_the_text(text, length):
    parts = list(pieces(text, length))
    assert "".join(parts) == text
    assert all(0 < len(part) <= length for part in parts) or parts == [""]


@settings(deadline=None, max_examples=300)
@given(lines, st.integers(8, 24))
def test_cuts_at_lines_and_words_leave_the_ids(text, length):
    parts = list(pieces(text, length))
    cut = [number for part in parts for number in TOKENIZER.backend_tokenizer.encode(part).ids]
    assert TOKENIZER.decode(cut) == text
    if all(is_good_place(text, place) for place in accumulate(map(len, parts[:-1]))):
        assert cut == TOKENIZER.backend_tokenizer.encode(text).ids


def test_a_line_end_is_better_than_a_words_end():
    assert list(pieces("one two\nthree four five", 12)) == ["one two\n", "three four", " five"]
    assert list(pieces("onetwo\nthreefourfive", 12)) == ["onetwo\n", "threefourfiv", "e"]
    assert list(pieces("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]
    # A newline before white space ends no token.
    assert list(pieces("ab\n  cd ef", 6)) == ["ab\n  c", "d ef"]


@pytest.mark.parametrize("text", ["word\n" * 4000, "one word and the next " * 1000, "ACGT" * 5000, "深" * 9000])
def test_long_texts_are_encoded_piece_by_piece(text, monkeypatch):
    whole = encode_text(TOKENIZER, text)
    given: list[int] = []

    def small(text: str):
        for part in pieces(text, 1000):
            given.append(len(part))
            yield part

    monkeypatch.setattr(plain_text, "pieces", small)
    ids = encode_text(TOKENIZER, text)
    assert max(given) <= 1000
    assert TOKENIZER.decode(ids) == text
    if not text.startswith(("ACGT", "深")):
        assert ids == whole

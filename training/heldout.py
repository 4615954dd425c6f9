"""What the evaluations within a run measure, so that their figures compare with the last one and with gzip's.

The last evaluation measures all held-out rows. Those before it take a sample, spread evenly over them: rows lie in the
order of their documents, so that every document counts by its length, in the sample as in the whole. The first rows
would be the first document's. A compressor stands beside a figure only with what it makes of the very same text.
"""

import lzma
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from datasets import Dataset

from .packing import IGNORED


@dataclass(frozen=True)
class Yardsticks:
    """What is said beside a held-out figure.

    Attributes:
        text: which text both are of, for the line of the log.
        bits_per_byte: of compressors, by name; may be empty.
    """

    text: str
    bits_per_byte: dict[str, float]


def spread_sample(rows: Dataset, count: int) -> Dataset:
    """One row out of each of `count` equal parts of the rows, always the same ones; all rows if there are no more."""
    if count >= len(rows):
        return rows
    chooser = random.Random(0)
    edges = [len(rows) * part // count for part in range(count + 1)]
    return rows.select([chooser.randrange(start, end) for start, end in pairwise(edges)])


def target_text(rows: Dataset, token_texts: Sequence[bytes]) -> bytes:
    """The text whose bytes bits per byte are counted by: that of all targets, one behind the other.

    Args:
        rows: with `labels`, of which the first of a row and -100 are no targets.
        token_texts: the bytes of each id (`tokenizer.token_texts`).
    """
    return b"".join(token_texts[label] for labels in rows["labels"] for label in labels[1:] if label != IGNORED)


def compressed_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9e` need for a text; none for an empty one."""
    if not text:
        return {}
    gzip = zlib.compressobj(9, wbits=31)
    sizes = {
        "gzip": len(gzip.compress(text)) + len(gzip.flush()),
        "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(text) for name, size in sizes.items()}

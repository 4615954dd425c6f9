"""`fathom tokenizer`: train a byte-level BPE vocabulary on a corpus."""

import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..tokenizer import encode_text, train_tokenizer
from ..training.checkpoints import staged_directory
from ..training.corpus import load_corpus
from ..training.errors import UserError
from .arguments import parse
from .cli import run


@dataclass
class TokenizerOptions:
    corpus: Path = field(default=Path("runs/corpus"), metadata={"help": "Folder that `fathom corpus` wrote."})
    out: Path = field(default=Path("runs/tokenizer"), metadata={"help": "Folder to write."})
    vocab_size: int = field(
        default=4096, metadata={"help": "Number of ids, with the control tokens and the 256 bytes."}
    )
    model_max_length: int = field(
        default=1024, metadata={"help": "Context in tokens, beyond which transformers warns."}
    )


def main(argv: Sequence[str]) -> int:
    (options,) = parse("tokenizer", __doc__ or "", [TokenizerOptions], argv)
    corpus = load_corpus(options.corpus)

    start = time.perf_counter()
    try:
        tokenizer = train_tokenizer(_texts(corpus["train"]), options.vocab_size, options.model_max_length)
    except ValueError as error:
        raise UserError(f"{error} (corpus: {options.corpus})") from error
    seconds = time.perf_counter() - start
    size, ids = _encoded(tokenizer, corpus["heldout"])

    with staged_directory(options.out) as staging:
        tokenizer.save_pretrained(staging)
        reloaded = AutoTokenizer.from_pretrained(staging, trust_remote_code=False)
        if _encoded(reloaded, corpus["heldout"]) != (size, ids):
            raise RuntimeError("the saved tokenizer encodes held-out text differently from the one that was trained")

    print(f"vocabulary  {len(tokenizer):,} ids, {seconds:.1f} s on {len(corpus['train']):,} documents")
    print(f"held out    {size / len(ids):.3f} bytes per token ({size:,} bytes, {len(ids):,} tokens)")
    print("reload      AutoTokenizer without remote code gives the same ids")
    print(f"written to  {options.out}")
    print(
        f"\nnext: fathom pretrain --corpus {options.corpus} --tokenizer {options.out} "
        f"--out {options.out.parent / 'pretrain'}"
    )
    return 0


def _texts(rows: Dataset) -> Iterator[str]:
    return (row["text"] for row in rows)


def _encoded(tokenizer: PreTrainedTokenizerFast, rows: Dataset) -> tuple[int, array]:
    """Size of the text in bytes and its ids, four bytes each."""
    size, ids = 0, array("I")
    for text in _texts(rows):
        size += len(text.encode())
        ids.extend(encode_text(tokenizer, text))
    return size, ids


if __name__ == "__main__":
    sys.exit(run("tokenizer", main, sys.argv[1:]))

"""`fathom corpus`: collect text, drop duplicates, split it, write parquet."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..training.corpus import HELDOUT_FRACTION, build_corpus
from .arguments import parse
from .cli import run


@dataclass
class CorpusOptions:
    sources: list[str] = field(
        default_factory=lambda: ["stdlib"],
        metadata={
            "help": "Any of: stdlib (this Python's standard library), files, folders or globs of .txt .md .py .jsonl "
            ".parquet, datasets names (owner/name or owner/name:config)."
        },
    )
    out: Path = field(default=Path("runs/corpus"), metadata={"help": "Folder to write."})
    heldout_fraction: float = field(
        default=HELDOUT_FRACTION,
        metadata={"help": "Share of the documents held out; of the standard library's modules never less than 0.05."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Where rows of .jsonl, .parquet and datasets hold text."}
    )
    max_bytes: int | None = field(default=None, metadata={"help": "Stop after this much text."})


def main(argv: Sequence[str]) -> int:
    (options,) = parse("corpus", __doc__ or "", [CorpusOptions], argv, positionals=("sources",))
    report = build_corpus(
        options.sources, options.out, options.heldout_fraction, options.text_column, options.max_bytes
    )
    print(f"sources     {' '.join(report.sources)}: {report.files:,} files, {report.bytes:,} bytes of text")
    print(f"train       {report.train_documents:,} documents, {report.train_bytes:,} bytes")
    share = report.heldout_bytes / report.bytes
    print(f"held out    {report.heldout_documents:,} documents, {report.heldout_bytes:,} bytes ({share:.1%})")
    print(f"            {report.split}")
    print(f"left out    {report.duplicates:,} duplicates, {report.skipped:,} binary or empty")
    print(f"gzip -9     {report.gzip_bits_per_byte:.3f} bits per byte of the held-out text")
    print(f"xz -9e      {report.xz_bits_per_byte:.3f} bits per byte of the held-out text")
    print(f"written to  {options.out}")
    print(f"\nnext: fathom tokenizer --corpus {options.out} --out {options.out.parent / 'tokenizer'}")
    return 0


if __name__ == "__main__":
    sys.exit(run("corpus", main, sys.argv[1:]))

"""`fathom corpus`: collect text, drop duplicates, split it, write parquet."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..training.corpus import HELDOUT_FRACTION, CorpusReport, build_corpus
from ..training.text_files import shown
from .arguments import parse
from .cli import run


@dataclass
class CorpusOptions:
    sources: list[str] = field(
        default_factory=lambda: ["stdlib"],
        metadata={
            "help": "Any of: stdlib (this Python's standard library); files, folders or globs of .txt .md .py .jsonl "
            ".ndjson .json .csv .tsv .parquet, also as .gz .bz2 .xz .zst; folders that datasets saved (save_to_disk); "
            "datasets names (owner/name or owner/name:config). Text in UTF-8; also UTF-16, GBK and Latin-1 where that "
            "is sure."
        },
    )
    out: Path = field(default=Path("runs/corpus"), metadata={"help": "Folder to write."})
    heldout_fraction: float = field(
        default=HELDOUT_FRACTION,
        metadata={"help": "Share of the documents held out; of the standard library's modules never less than 0.05."},
    )
    text_column: str = field(
        default="text", metadata={"help": "Where rows of .jsonl, .json, .csv, .tsv, .parquet and datasets hold text."}
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
    for line in remarks(report):
        print(f"            {line}")
    print(f"gzip -9     {report.gzip_bits_per_byte:.3f} bits per byte of the held-out text")
    print(f"xz -9e      {report.xz_bits_per_byte:.3f} bits per byte of the held-out text")
    print(f"written to  {shown(options.out)}")
    print(f"\nnext: fathom tokenizer --corpus {shown(options.out)} --out {shown(options.out.parent / 'tokenizer')}")
    return 0


def remarks(report: CorpusReport) -> list[str]:
    """Lines about what was read in another way than as UTF-8, or not at all."""
    lines = [f"{count:,} files decoded from {codec}" for codec, count in report.encodings.items()]
    if report.undecoded:
        lines.append(f"binary, or in no encoding that is sure (save text as UTF-8): {_some(report.undecoded)}")
    if report.unread:
        lines.append(f"not read: {_some(report.unread)}")
    if report.links:
        lines.append(f"{report.links:,} links that lead out of their folder; name what they lead to in --sources")
    return lines


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


if __name__ == "__main__":
    sys.exit(run("corpus", main, sys.argv[1:]))

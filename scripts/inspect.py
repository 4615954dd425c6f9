"""`fathom inspect PATH`: what a checkpoint is, and whether it can be loaded.

    fathom inspect runs/sft                     a folder of ours, a checkpoint-N in it, transformers' or DeepSeek's own
    fathom inspect v3-671b --context 100000     a preset: no files needed
    fathom inspect deepseek-ai/DeepSeek-V3      on the Hub: headers only
    fathom inspect runs/sft --tensors --json    everything, for a program

Ends with exit code 1 if something is wrong: truncated or missing files, tensors that the config does not expect or that
are not there, numbers that are not finite, a tokenizer of another vocabulary, a chat template that cannot be used.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..training.errors import UserError, one_line
from .arguments import parse
from .cli import run

if TYPE_CHECKING:
    from ..training.inspection import Inspection

TRILLION, BILLION, MILLION, THOUSAND = 1e12, 1e9, 1e6, 1e3


@dataclass
class InspectOptions:
    """What to look at, and how much of it to print."""

    path: str | None = field(default=None, metadata={"help": "Checkpoint folder, preset (v3-671b, v4), or Hub id."})
    tensors: bool = field(default=False, metadata={"help": "List the tensors, layers and experts taken together."})
    context: int | None = field(default=None, metadata={"help": "Tokens to count the cache for; default: the longest."})
    json: bool = field(default=False, metadata={"help": "Print JSON, tensors included."})

    def __post_init__(self) -> None:
        if self.path is None:
            raise UserError("no checkpoint given; write: fathom inspect PATH")


def main(argv: Sequence[str]) -> int:
    (options,) = parse(
        "inspect",
        "Say what a checkpoint is, and whether it can be loaded.",
        [InspectOptions],
        argv,
        positionals=("path",),
    )
    from ..training.inspection import inspect_checkpoint

    found = inspect_checkpoint(options.path, options.context)
    if options.json:
        print(found.as_json())
    else:
        print(report(found))
        if options.tensors:
            print(f"\n{tensor_table(found)}")
        print(f"next: {next_command(found, options.tensors)}")
    return 1 if found.problems else 0


def report(found: "Inspection") -> str:
    """The findings as aligned lines."""
    shape, counts, cache, memory = found.shape, found.parameters, found.cache, found.memory
    rows = [("model", f"{found.source}: generation {found.generation}, {found.model_type}, {found.dtype}")]
    rows.append(("layers", ", ".join(found.layers)))
    if found.mtp_layers:
        rows.append(("", f"{', '.join(found.mtp_layers)} (MTP)"))
    streams = f" in {shape['hc_mult']} residual streams" if shape["hc_mult"] > 1 else ""
    rows.append(
        (
            "shape",
            f"{shape['hidden_size']:,} wide{streams}, {shape['num_attention_heads']} heads, "
            f"vocabulary {shape['vocab_size']:,}, context {shape['max_position_embeddings']:,}",
        )
    )
    if experts := found.experts:
        rows.append(
            (
                "experts",
                f"{experts['num_experts_per_tok']} of {experts['n_routed_experts']} routed per token, "
                f"{experts['n_shared_experts']} shared",
            )
        )
    mtp = f"; {amount(counts['mtp'])} MTP beside these" if counts["mtp"] else ""
    rows.append(
        (
            "parameters",
            f"{amount(counts['total'])} total, {amount(counts['active'])} active per token "
            f"({amount(counts['active_without_input_embedding'])} without the input embedding), "
            f"{amount(counts['embedding'])} embedding and head{mtp}",
        )
    )
    times = cache.multi_head_bytes_per_token / cache.bytes_per_token if cache.bytes_per_token else None
    rows += [
        (
            "cache",
            f"{cache.bytes_per_token:,.0f} bytes per token in {cache.dtype}, {cache.released_bytes_per_token:,.0f} in "
            f"the formats of DeepSeek's releases",
        ),
        (
            "",
            f"{cache.multi_head_bytes_per_token:,} by plain multi-head attention of the same heads"
            + (f", {times:,.1f} times as much" if times else ""),
        ),
        (
            "",
            f"{size(cache.bytes_at_context)} for {cache.context:,} tokens, {size(cache.multi_head_bytes_at_context)} "
            f"by plain multi-head attention",
        ),
    ]
    stored = f"{size(memory.stored)} as stored, " if memory.stored is not None else ""
    rows += [
        ("memory", f"weights {stored}{size(memory.bf16)} in bf16, {size(memory.fp32)} in fp32"),
        ("", f"training {size(memory.adamw)} with AdamW in fp32, activations not counted"),
    ]
    for n, each in enumerate(found.formats):
        scales = f", scales {size(each.scale_bytes)}: {each.scales}" if each.scales else ""
        line = f"{each.format}: {each.tensors:,} tensors, {amount(each.numbers)} numbers, {size(each.bytes)}{scales}"
        rows.append(("stored" if n == 0 else "", line))
    if found.tokenizer:
        rows.append(("tokenizer", found.tokenizer))
    if found.files or found.problems:
        whole = "whole" if found.values_read else "whole by headers; numbers are looked at on loading"
        rows.append(("files", f"{found.files}, {'NOT WHOLE:' if found.problems else whole}"))
        rows += [("", one_line(problem)) for problem in found.problems]
    return "\n".join(f"{title:<11} {text}" for title, text in rows)


def tensor_table(found: "Inspection") -> str:
    """One line per kind of tensor."""
    rows = [("tensor", "shape", "dtype", "count", "bytes")]
    rows += [
        (each.name, " x ".join(map(str, each.shape)), each.dtype, f"{each.count:,}", f"{each.bytes:,}")
        for each in found.tensors
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = "  ".join(f"{{:{'>' if n > 2 else '<'}{width}}}" for n, width in enumerate(widths))
    return "\n".join(line.format(*row) for row in rows)


def next_command(found: "Inspection", with_tensors: bool) -> str:
    source = shlex.quote(found.source)
    if found.chats:
        return f"fathom chat {source}"
    return f"fathom inspect {source} {'--json' if with_tensors else '--tensors'}"


def amount(number: float) -> str:
    """671,026,404,352 as `671.03 B`."""
    for unit, letter in ((TRILLION, "T"), (BILLION, "B"), (MILLION, "M"), (THOUSAND, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {letter}"
    return f"{number:.0f}"


def size(nbytes: float) -> str:
    """1,342,052,808,704 as `1,342.1 GB`, in powers of ten."""
    for unit, letters in ((BILLION, "GB"), (MILLION, "MB"), (THOUSAND, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {letters}"
    return f"{nbytes:,.0f} bytes"


if __name__ == "__main__":
    sys.exit(run("inspect", main, sys.argv[1:]))

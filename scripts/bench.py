"""`fathom bench`: Fathom beside transformers' own classes, on the same weights and this machine.

    fathom bench --quick                                   a few minutes: does it work, and about how fast
    fathom bench --generations v3 v4 --dtypes bf16         models of a preset with random weights
    fathom bench --model runs/sft --contenders stock fathom draft --kinds generate
    fathom bench --kinds decode --contexts 128 2048 32768 --contenders stock fathom compiled
    fathom bench --kinds serve --contenders fathom shared --batch_sizes 1 4 8 16

Writes every round's time as JSON, a table, and a picture of the cost against the context where there are several. Ends
with exit code 1, and nothing written, if two contenders compute different things.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .arguments import parse
from .cli import run

# What is measured where nothing else is asked for.
USUAL: dict[str, list] = {
    "generations": ["classic", "moe", "v2", "v3", "v3.2", "v4"],
    "kinds": ["prefill", "decode", "train", "memory"],
    "dtypes": ["fp32", "bf16"],
    "contexts": [128, 2048, 8192],
    "prefills": [512, 2048],
    "batch_sizes": [1],
}
QUICK: dict[str, list] = {**USUAL, "dtypes": ["fp32"], "contexts": [128, 512], "prefills": [256]}


@dataclass
class BenchOptions:
    _argument_group_name = "bench"

    generations: list[str] | None = field(default=None, metadata={"help": f"of {' '.join(USUAL['generations'])}; all"})
    size: str = field(default="nano", metadata={"help": "nano, micro or small; with random weights"})
    override: list[str] = field(
        default_factory=list, metadata={"help": "fields of those models' config: num_hidden_layers=8 kv_lora_rank=128"}
    )
    model: str | None = field(default=None, metadata={"help": "a model of yours instead: folder, or owner/name"})
    contenders: list[str] = field(
        default_factory=lambda: ["stock", "fathom"],
        metadata={"help": "of stock, fathom, reference, compiled, int8, draft, shared; ratios are against the first"},
    )
    kinds: list[str] | None = field(
        default=None, metadata={"help": "of prefill, decode, generate, serve, train, memory"}
    )
    dtypes: list[str] | None = field(default=None, metadata={"help": "of fp32 and bf16"})
    contexts: list[int] | None = field(default=None, metadata={"help": "tokens before those that are decoded"})
    prefills: list[int] | None = field(default=None, metadata={"help": "tokens read at once; of a row in training"})
    batch_sizes: list[int] | None = field(default=None, metadata={"help": "rows; of serve: requests"})
    rounds: int = field(default=5, metadata={"help": "turns of every contender, of which the median counts"})
    steps: int = field(default=16, metadata={"help": "tokens of a turn of decoding"})
    new_tokens: int = field(default=64, metadata={"help": "tokens of a turn of generate"})
    stock_experts: str | None = field(
        default=None, metadata={"help": "experts_implementation of stock (eager, grouped_mm, batched_mm)"}
    )
    threads: int | None = field(default=None, metadata={"help": "of the processor; default: torch's own choice"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda; default: cuda where there is one"})
    out: str = field(default="runs/bench", metadata={"help": "folder for bench.json, bench.md and the pictures"})
    quick: bool = field(default=False, metadata={"help": "fp32 and short texts, where nothing else is said"})


def main(argv: Sequence[str]) -> int:
    (options,) = parse("bench", "Measure Fathom beside transformers' own classes.", [BenchOptions], argv)
    import torch

    from ..training.benchmark.measuring import Disagreement, Plan, run_benchmark, source_code_ids
    from ..training.checkpoints import staged_directory
    from ..training.errors import UserError
    from ..training.hub import local_folder
    from ..training.options import pairs, typed
    from ..training.secrecy import public
    from .results.files import files

    if options.threads is not None:
        if options.threads < 1:
            raise UserError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    accelerated = torch.cuda.is_available()
    device = options.device or ("cuda" if accelerated else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not accelerated):
        raise UserError(f"--device {device} is not here; use {'cpu or cuda' if accelerated else 'cpu'}")
    usual = QUICK if options.quick else USUAL
    chosen: dict[str, Any] = {name: getattr(options, name) or usual[name] for name in usual}
    checkpoint = None if options.model is None else str(local_folder(options.model))
    same = ("size", "contenders", "rounds", "steps", "new_tokens", "stock_experts")
    plan = Plan(
        **chosen,
        **{name: getattr(options, name) for name in same},
        override={name: typed(value) for name, value in pairs(options.override, "override").items()},
        checkpoint=checkpoint,
        device=device,
        ceiling_size=512 if options.quick else 2048,
    )
    try:
        report = run_benchmark(plan, None if checkpoint is None else source_code_ids(Path(checkpoint)))
    except Disagreement as error:
        print(f"fathom bench: {error}; nothing is timed where results differ", file=sys.stderr)
        return 1
    written = files(public(report))
    with staged_directory(Path(options.out).expanduser()) as folder:
        for name, content in written.items():
            (folder / name).write_text(content, encoding="utf-8")
    print(f"\n{written['bench.md']}\nwritten to {options.out}: {', '.join(written)}")
    print(f"next: fathom bench {'' if options.quick else '--kinds decode --contexts 2048 8192 32768'}".rstrip())
    return 0


if __name__ == "__main__":
    sys.exit(run("bench", main, sys.argv[1:]))

"""`fathom ablate [EXPERIMENT ...]`: small matched experiments on DeepSeek's findings, with a table and plots.

Every run is a JSON file in OUTPUT/runs, written when it is done; one that is there is not run again, so the command
can be interrupted and given again. The page OUTPUT/README.md, its Chinese twin and the plots are made from all results
that are there.
"""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import takewhile
from pathlib import Path

from ..training.errors import UserError, did_you_mean
from .arguments import parse
from .cli import run
from .quickstart import QuickstartOptions, steps

VOCABULARY = 1024


@dataclass
class AblateOptions:
    """What to compare, and how thoroughly."""

    experiments: list[str] = field(
        default_factory=list, metadata={"help": "experiments, also without this option's name; all if none is named"}
    )
    seeds: int = field(default=3, metadata={"help": "runs per variant, with seeds from 0 on"})
    steps: int = field(default=200, metadata={"help": "optimizer steps of a run, of 1024 tokens each"})
    data: Path = field(
        default=Path("runs/ablate"),
        metadata={"help": "folder of corpus and tokenizer; made from Python's standard library if missing"},
    )
    output: Path = field(default=Path("docs/results"), metadata={"help": "folder for results, page and plots"})
    list: bool = field(default=False, metadata={"help": "say what there is to run and what is done, and end"})

    def check(self) -> None:
        """Raises UserError on a value that no study can have."""
        for name in ("seeds", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")


def main(argv: Sequence[str]) -> int:
    names = list(takewhile(lambda word: not word.startswith("-"), argv))
    words = ["--experiments", *names, *argv[len(names) :]] if names else argv
    (options,) = parse("ablate", str(__doc__), [AblateOptions], words)
    options.check()
    from ..training.ablation import read_result
    from ..training.ablation import run as run_variant
    from ..training.experiments import EXPERIMENTS, FIGURES, VARIANTS
    from .results.page import write_results

    for name in options.experiments:
        if name not in EXPERIMENTS:
            raise UserError(
                f"unknown experiment {name}{did_you_mean(name, EXPERIMENTS)}; there are {', '.join(EXPERIMENTS)}"
            )
    chosen = options.experiments or list(EXPERIMENTS)
    folder = options.output / "runs"
    if options.list:
        for name in chosen:
            variants = EXPERIMENTS[name].variants
            done = sum(
                read_result(folder, variant, seed) is not None for variant in variants for seed in range(options.seeds)
            )
            print(f"{name:<10} {done:>2} of {len(variants) * options.seeds:>2} runs done: {', '.join(variants)}")
        return 0

    study = prepare(options, argv)
    for name in chosen:
        experiment = EXPERIMENTS[name]
        print(f"\n== {name}: {experiment.title[0]}", flush=True)
        for seed in range(options.seeds):
            for variant in experiment.variants:
                done = read_result(folder, variant, seed) is not None
                result = run_variant(variant, VARIANTS[variant], seed, study, folder)
                shown = [(figure, FIGURES[figure].digits) for figure in experiment.figures[:3]]
                figures = result["figures"]
                values = "  ".join(f"{key} {figures[key]:.{digits}f}" for key, digits in shown if key in figures)
                took = "was there" if done else f"{result['seconds']:.0f} s"
                print(f"{variant:<14} seed {seed}  {values}  ({took})", flush=True)
        write_results(options.output)
    print(f"\nwritten to {options.output / 'README.md'}")
    return 0


def prepare(options: AblateOptions, argv: Sequence[str]):
    """The study that all runs belong to; makes corpus and tokenizer by their verbs where they are missing."""
    from datasets import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    from ..tokenizer.bpe import token_byte_lengths
    from ..training.ablation import SEQUENCE_LENGTH, Study
    from ..training.corpus import load_corpus
    from ..training.loading import load_tokenizer
    from ..training.packing import pack_documents
    from ..training.secrecy import public_words

    transformers_logging.disable_progress_bar()
    if not sys.stderr.isatty():
        disable_progress_bars()
    for verb, result, words in steps(QuickstartOptions(out=options.data, vocab_size=VOCABULARY))[:2]:
        if not result.exists():
            print(f"== {shlex.join(['fathom', verb, *words])}", flush=True)
            import_module(f".{verb}", __package__).main(words)
    tokenizer = load_tokenizer(str(options.data / "tokenizer"))
    corpus = load_corpus(options.data / "corpus")
    report = json.loads((options.data / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    rows = {split: pack_documents(corpus[split], tokenizer, SEQUENCE_LENGTH) for split in corpus}
    return Study(
        train=rows["train"],
        heldout=rows["heldout"],
        token_bytes=token_byte_lengths(tokenizer),
        ids={
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        steps=options.steps,
        corpus=f"{' '.join(report['sources'])}, {report['train_bytes']} + {report['heldout_bytes']} bytes",
        origin={
            "command": shlex.join(public_words(["fathom", "ablate", *argv])),
            "commit": commit(),
            "python": platform.python_version(),
        },
    )


def commit() -> str:
    """The commit that this code is, or the version of the installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        from .. import __version__

        return f"fathom {__version__}"
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"], check=False).returncode
    return head.stdout.strip() + (" with changes" if changed else "")


if __name__ == "__main__":
    sys.exit(run("ablate", main, sys.argv[1:]))

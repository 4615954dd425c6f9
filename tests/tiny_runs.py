"""A corpus, a tokenizer and a model small enough that a training run takes a second, for the tests of training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fathom import FathomConfig, FathomForCausalLM
from fathom.tokenizer import train_tokenizer
from fathom.training.corpus import build_corpus

# MLA, one dense layer, two with experts of which one drafts; 16 tokens are enough for several documents in a row.
MODEL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
OVERRIDES = ["--override", *(f"{name}={value}" for name, value in MODEL.items())]


def make_corpus_and_tokenizer(folder: Path, vocab_size: int = 320) -> None:
    """Writes `folder/corpus` (60 short documents) and `folder/tokenizer`."""
    sources = folder / "sources"
    sources.mkdir(parents=True)
    texts = [f"def f{n}(x):\n    return x + {n * n}\n\n# file {n} of many\n" * (1 + n % 7) for n in range(60)]
    for n, text in enumerate(texts):
        (sources / f"{n}.py").write_text(text)
    build_corpus([str(sources)], folder / "corpus", heldout_fraction=0.2)
    train_tokenizer(texts, vocab_size, MODEL["max_position_embeddings"]).save_pretrained(folder / "tokenizer")


def pretrain_words(folder: Path, out: Path | str, *words: str, steps: int = 4) -> list[str]:
    """The words after `fathom pretrain` for a tiny run on the corpus in `folder`."""
    return [
        *("--corpus", str(folder / "corpus"), "--tokenizer", str(folder / "tokenizer"), "--out", str(out)),
        *("--steps", str(steps), "--batch_size", "2", "--sequence_length", "32", "--precision", "fp32"),
        *("--eval_steps", "100", "--save_steps", "2", "--log_steps", "1", "--warmup_steps", "2"),
        *(OVERRIDES if "--generation" not in words else []),
        *words,
    ]


def model(seed: int = 0, **overrides: Any) -> FathomForCausalLM:
    """A V3 model with an MTP layer and random weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FathomForCausalLM(FathomConfig.preset("v3", **{"vocab_size": 97, **MODEL, **overrides}))


def environment() -> dict[str, str]:
    """Of a subprocess: one thread, and output at once."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def torchrun(*words: str, processes: int = 2, timeout: int = 120) -> subprocess.CompletedProcess[str]:
    """`torchrun --standalone --nproc_per_node 2 words...` on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(processes),
        *words,
    ]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        # Not killed: asked to end, torchrun ends its processes, which are in sessions of their own.
        process.terminate()
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)

"""A corpus, a tokenizer and a model small enough that a training run takes a second, for the tests of training."""

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom import FathomConfig, FathomForCausalLM
from fathom.tokenizer import train_tokenizer
from fathom.training.corpus import build_corpus

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

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
VOCABULARY, LENGTH = 97, 24
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
        return FathomForCausalLM(FathomConfig.preset("v3", **{"vocab_size": VOCABULARY, **MODEL, **overrides}))


def packed_rows(count: int, seed: int = 0) -> "Dataset":
    """Packed rows with documents of random length; the first token of a document is no target."""
    import torch
    from datasets import Dataset

    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
        while len(row["input_ids"]) < LENGTH:
            length = int(torch.randint(1, 12, (), generator=generator))
            ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            row["input_ids"] += ids
            row["position_ids"] += range(length)
            row["labels"] += [-100, *ids[1:]]
        made.append({name: values[:LENGTH] for name, values in row.items()})
    return Dataset.from_list(made)


def trainer(folder, trained, train=None, heldout=None, kind=None, callbacks=(), **overrides) -> "Trainer":
    """A FathomTrainer, or one of another `kind`, of three steps of two packed rows."""
    from transformers import TrainingArguments

    from fathom import FathomTrainer
    from fathom.training.packing import collate_rows

    of_trainer = ("token_bytes", "multistep", "spike_factor", "optimizer_cls_and_kwargs")
    further = {name: overrides.pop(name) for name in of_trainer if name in overrides}
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return (kind or FathomTrainer)(
        model=trained,
        args=TrainingArguments(**{**settings, **overrides}),
        train_dataset=train,
        eval_dataset=heldout,
        data_collator=collate_rows,
        callbacks=list(callbacks),
        **further,
    )


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

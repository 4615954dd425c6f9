"""Options of every training verb, apart from `run.py` so that `--help` need not import torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import UserError


@dataclass
class RunOptions:
    """Options of every training verb. All else that transformers' TrainingArguments knows goes through `trainer`."""

    _argument_group_name = "training"

    steps: int = field(default=1000, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=8, metadata={"help": "rows per forward pass and process"})
    accumulation: int = field(default=1, metadata={"help": "forward and backward passes per optimizer step"})
    optimizer: str = field(default="adamw", metadata={"help": "adamw, or muon: Muon for matrices, AdamW for the rest"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak learning rate"})
    schedule: str = field(
        default="wsd",
        metadata={"help": "wsd (constant, then cosine decay), cosine, or multistep (x 0.316 at 80 %%, x 0.1 at 90 %%)"},
    )
    warmup_steps: int = field(default=20, metadata={"help": "steps of linear warm-up, at most half of all"})
    decay_share: float = field(
        default=0.4, metadata={"help": "share of the steps, at the end, over which wsd decays to a tenth"}
    )
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of matrices"})
    precision: str = field(
        default="auto",
        metadata={"help": "fp32, bf16 (autocast), or auto: bf16 where a measured matrix product gains from it"},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "recompute layers in the backward pass"})
    eval_steps: int = field(default=100, metadata={"help": "steps between evaluations on held-out rows"})
    eval_rows: int = field(
        default=64, metadata={"help": "held-out rows of these evaluations, 0 for all; the last one takes all"}
    )
    save_steps: int = field(default=100, metadata={"help": "steps between checkpoints"})
    save_total_limit: int = field(default=2, metadata={"help": "checkpoints to keep, 0 for all"})
    log_steps: int = field(default=10, metadata={"help": "steps between log lines"})
    seed: int = field(default=0, metadata={"help": "seed of initial weights and of the data's order"})
    resume: bool = field(default=False, metadata={"help": "continue from the newest checkpoint in OUT"})
    overwrite: bool = field(
        default=False, metadata={"help": "train into an OUT that holds a run, and remove its checkpoints"}
    )
    tensorboard: bool = field(default=False, metadata={"help": "also log for TensorBoard, to OUT/tensorboard"})
    trainer: list[str] = field(
        default_factory=list, metadata={"help": "further TrainingArguments, as name=value (max_grad_norm=0.5 ...)"}
    )

    def check(self) -> None:
        """Raises UserError on a value that no run can have."""
        for name in ("steps", "batch_size", "accumulation", "eval_steps", "save_steps", "log_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("warmup_steps", "weight_decay", "eval_rows", "save_total_limit"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name} {getattr(self, name)} must be 0 or more")
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"--learning_rate {self.learning_rate} must be above 0")
        if not 0 <= self.decay_share <= 1:
            raise UserError(f"--decay_share {self.decay_share} must be between 0 and 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be between 0 and {2**32 - 1}")
        for name, known in (
            ("precision", ("auto", "fp32", "bf16")),
            ("optimizer", ("adamw", "muon")),
            ("schedule", ("wsd", "cosine", "multistep")),
        ):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"--{name} {value} is unknown; use {', '.join(known[:-1])} or {known[-1]}")


def pairs(words: Sequence[str], option: str) -> dict[str, str]:
    """`["a=1", "b=x=y"]` -> `{"a": "1", "b": "x=y"}`.

    Raises:
        UserError: a word without `=`.
    """
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--{option} takes name=value, not {word!r}")
        values[name] = value
    return values


def typed(text: str) -> Any:
    """The value that a word of the command line stands for: number, true, false, null, [list], {map}, or the word."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    if text[:1] not in ("[", "{"):
        # YAML 1.1 would read 1e-3 as a word, and the words no and off as false.
        return {"True": True, "False": False, "None": None}.get(text, text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{text!r} is no list or map: {' '.join(str(error).split())}") from error

"""What `--resume` insists on, so that a resumed run ends with the weights of an uninterrupted one.

A checkpoint's run.json holds the recipe it was trained by. Some changes of it would break (another model, another
optimizer's state), others would go unnoticed: the learning rate and its schedule are read from the checkpoint whatever
the options say, another batch size or seed skips other rows than those that were seen. All are refused, with the
difference. Two are not: the number of steps, with which a run is prolonged, and how the rows of a step are shared out
among processes and accumulation.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainingArguments

from .checkpoints import read_run
from .errors import UserError
from .options import RunOptions, pairs
from .secrecy import public

OPTIONS = ("optimizer", "learning_rate", "schedule", "warmup_steps", "decay_share", "weight_decay", "seed")
# Of --trainer: beginnings of the names that say what to write, when and where to train, not how.
HARMLESS = (
    *("dataloader_num_workers", "dataloader_persistent", "dataloader_pin", "dataloader_prefetch", "ddp_", "disable_"),
    *("eval_", "fsdp", "hub_", "log", "push_", "report_", "run_name", "save_"),
)


def recipe_of(options: RunOptions, arguments: TrainingArguments) -> dict[str, Any]:
    """What decides the weights of a run, apart from model and data."""
    further = pairs(options.trainer, "trainer")
    return {
        **{name: getattr(options, name) for name in OPTIONS},
        "steps": arguments.max_steps,
        "precision": "bf16" if arguments.bf16 else "fp32",
        "rows_per_step": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "trainer": public({name: value for name, value in sorted(further.items()) if not name.startswith(HARMLESS)}),
    }


def fingerprint(rows: Dataset) -> str:
    """Tells one set of training rows from another: their number, and a hash of 64 of them."""
    places = range(0, len(rows), max(1, len(rows) // 64))
    content = json.dumps([rows[place] for place in places], sort_keys=True)
    return f"{len(rows)} rows, {hashlib.sha256(content.encode()).hexdigest()[:12]}"


def refuse_another_config(config, checkpoint: Path | None) -> None:
    """Raises UserError with the differences if `checkpoint` holds a model of another configuration than `config`."""
    if checkpoint is None:
        return
    ignored = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}
    saved = type(config).from_pretrained(checkpoint).to_dict()
    _refuse(checkpoint, saved, {name: value for name, value in config.to_dict().items() if name not in ignored})


def refuse_another_recipe(recipe: dict[str, Any], checkpoint: Path | None) -> None:
    """Raises UserError with the differences if `checkpoint` was trained by another recipe; `recipe` may be part of one.

    Another number of steps is said, and taken.
    """
    if checkpoint is None or (saved := (read_run(checkpoint) or {}).get("recipe")) is None:
        return
    _refuse(checkpoint, saved, {name: value for name, value in recipe.items() if name != "steps"})
    if (steps := recipe.get("steps", saved["steps"])) != saved["steps"]:
        print(f"steps       {saved['steps']:,} -> {steps:,}; the learning rate follows the new number from here on")


def _refuse(checkpoint: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    differing = [
        f"{name} {saved.get(name)!r} -> {value!r}" for name, value in wanted.items() if saved.get(name) != value
    ]
    if differing:
        raise UserError(
            f"--resume: {checkpoint} has another configuration ({'; '.join(differing)}); use the same options"
        )

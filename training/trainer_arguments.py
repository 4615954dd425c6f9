"""transformers' TrainingArguments of a run, from the options of a verb; all that can be refused is refused here."""

import copy
import os
from collections.abc import Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import HfArgumentParser, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .checkpoints import read_run
from .errors import UserError, did_you_mean
from .flops import bf16_pays
from .optimizers import MuonFactory
from .options import RunOptions, pairs
from .resuming import recipe_of, refuse_another_recipe
from .secrecy import is_secret_name, public, remember


class RunArguments(TrainingArguments):
    """TrainingArguments that tell no secret and no absolute path to what writes them down.

    TensorBoard and other trackers get `to_dict`, a pickle (`training_args.bin`) the state; the run itself has all.
    """

    def to_dict(self) -> dict[str, Any]:
        return public(super().to_dict())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value if isinstance(value, torch.device) else public(value) for name, value in vars(self).items()}

    def __copy__(self) -> "RunArguments":
        return self._with({**vars(self)})

    def __deepcopy__(self, memo: dict[int, Any]) -> "RunArguments":
        return self._with({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})

    def _with(self, values: dict[str, Any]) -> "RunArguments":
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(values)
        return made


def training_arguments(out: Path, options: RunOptions, device: torch.device, checkpoint: Path | None) -> RunArguments:
    """transformers' TrainingArguments of a run.

    Args:
        checkpoint: to resume from, in the precision it was trained in so far.

    Raises:
        UserError: `options.trainer` names what TrainingArguments does not know, or does not accept; `checkpoint` was
            trained otherwise.
    """
    if options.tensorboard:
        if find_spec("tensorboard") is None:
            raise UserError("--tensorboard needs a package that is not installed; run: pip install 'fathom-lm[track]'")
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(out / "tensorboard")
    further = further_arguments(options.trainer)
    trackers = further.pop("report_to", None) or []
    if options.tensorboard and "tensorboard" not in trackers:
        trackers = ["tensorboard", *trackers]
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        **schedule(options, further),
        "weight_decay": options.weight_decay,
        "adam_beta2": 0.95,
        "bf16": trains_in_bf16(options.precision, device, checkpoint),
        "activation_checkpointing": options.gradient_checkpointing,
        "eval_strategy": "steps",
        "eval_steps": options.eval_steps,
        "save_steps": options.save_steps,
        "save_total_limit": options.save_total_limit,
        "logging_steps": options.log_steps,
        "include_num_input_tokens_seen": "non_padding",
        "seed": options.seed,
        "report_to": trackers,
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        # Every parameter gets a gradient in every step.
        "ddp_find_unused_parameters": False,
    }
    try:
        made = RunArguments(**{**arguments, **further})
        check_together(made)
    except (ValueError, TypeError, ImportError, RuntimeError, OSError, KeyError, ArithmeticError) as error:
        raise UserError(f"these training options do not fit together: {' '.join(str(error).split())}") from error
    refuse_another_recipe(recipe_of(options, made), checkpoint)
    return made


def schedule(options: RunOptions, further: dict[str, Any]) -> dict[str, Any]:
    """The learning rate's schedule: that of --schedule, or any of transformers' by --trainer lr_scheduler_type=.

    Those of --schedule begin with a warm-up and end at a tenth of the peak.
    """
    warmup = min(options.warmup_steps, options.steps // 2)
    if "lr_scheduler_type" in further:
        return {"lr_scheduler_kwargs": {}, "warmup_steps": warmup}
    # The Trainer knows no multistep schedule; `FathomTrainer` puts its own in the place of this constant one.
    schedules: dict[str, tuple[str, dict[str, Any]]] = {
        "wsd": (
            "warmup_stable_decay",
            {
                "num_decay_steps": min(max(int(options.steps * options.decay_share), 1), options.steps - warmup),
                "min_lr_ratio": 0.1,
            },
        ),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
        "multistep": ("constant_with_warmup", {}),
    }
    kind, settings = schedules[options.schedule]
    return {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings, "warmup_steps": warmup}


def is_multistep(options: RunOptions) -> bool:
    """Whether `FathomTrainer` is to use its own schedule."""
    return options.schedule == "multistep" and "lr_scheduler_type" not in pairs(options.trainer, "trainer")


def check_together(arguments: TrainingArguments) -> None:
    """Makes what the Trainer would make of the arguments much later: schedule, optimizer's class, trackers.

    Raises:
        ValueError, ImportError, ...: one of them cannot be made.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        arguments.get_warmup_steps(arguments.max_steps),
        arguments.max_steps,
        arguments.lr_scheduler_kwargs,
    )
    Trainer.get_optimizer_cls_and_kwargs(arguments)
    for tracker in get_reporting_integration_callbacks(arguments.report_to):
        tracker()


def muon(options: RunOptions) -> tuple[type, dict[str, Any]]:
    """What the Trainer makes Muon by."""
    return MuonFactory, {"lr": options.learning_rate, "weight_decay": options.weight_decay}


class _TrainerOptions(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"--trainer: {message}")


def further_arguments(words: Sequence[str]) -> dict[str, Any]:
    """`["max_grad_norm=0.5"]` -> `{"max_grad_norm": 0.5}`, of the type that TrainingArguments wants.

    Raises:
        UserError: no such field (with the nearest names), a value of another type, or a field with an option of ours.
    """
    known = {entry.name for entry in fields(TrainingArguments) if entry.init}
    given = pairs(words, "trainer")
    for name, value in given.items():
        if is_secret_name(name):
            remember(value)
        if name not in known:
            raise UserError(f"--trainer {name}: TrainingArguments has no such field{did_you_mean(name, known)}")
        if name in ("output_dir", "max_steps", "num_train_epochs"):
            raise UserError(f"--trainer {name}: use --{'out' if name == 'output_dir' else 'steps'} instead")
    parser = _TrainerOptions(TrainingArguments, allow_abbrev=False)
    parsed = parser.parse_args([f"--{name}={value}" for name, value in given.items()])
    made = {name: getattr(parsed, name) for name in given}
    if isinstance(trackers := made.get("report_to"), str):
        made["report_to"] = [] if trackers == "none" else trackers.split(",")
    return made


def trains_in_bf16(precision: str, device: torch.device, checkpoint: Path | None) -> bool:
    """Whether the run uses bf16 autocast. A measurement decides once: for all ranks, and until the run is done."""
    if precision != "auto":
        return precision == "bf16"
    if checkpoint is not None and (record := read_run(checkpoint)) is not None:
        return record["precision"] == "bf16"
    PartialState(cpu=device.type == "cpu")
    return broadcast_object_list([bf16_pays(device)])[0]


def device_of_run() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

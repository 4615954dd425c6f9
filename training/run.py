"""One training run, whatever the verb: options, printed derivations, console log, resume, final save, run.json.

runs/pretrain/
    config.json model.safetensors tokenizer.json ...   the trained model, written at the end, whole or not at all
    run.json                                            what was run and measured; the model card is made from it
    checkpoint-100/ checkpoint-200/ ...                 to resume from
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, disable_progress_bars
from transformers import (
    GenerationConfig,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from .checkpoints import clear_leftovers, latest_checkpoint, read_run, staged_directory, write_run
from .errors import UserError, did_you_mean
from .flops import bf16_pays, measured_throughput, training_flops_per_token
from .optimizers import MuonFactory
from .options import RunOptions, pairs
from .resuming import fingerprint, recipe_of, refuse_another_recipe
from .trainer import FathomTrainer

LINE_WIDTH = 120


def start(options: RunOptions) -> None:
    """Checks the options and seeds all generators. A rank other than 0 prints nothing from here on."""
    if int(os.environ.get("RANK", "0")) != 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    options.check()
    set_seed(options.seed)
    if not sys.stderr.isatty():
        disable_progress_bars()
    transformers_logging.disable_progress_bar()


def check_out(out: Path, options: RunOptions) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        UserError: `out` holds a run and neither --resume nor --overwrite is given, or there is nothing to resume.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose another folder")
    checkpoint = latest_checkpoint(out)
    if options.resume:
        if checkpoint is None:
            raise UserError(f"--resume: {out} holds no complete checkpoint; start without --resume")
        return checkpoint
    if not options.overwrite and (checkpoint is not None or (out / "config.json").exists()):
        held = checkpoint.name if checkpoint is not None else "a model"
        raise UserError(
            f"{out} already holds {held}; add --resume to continue it, --overwrite, or choose another --out"
        )
    return None


def training_arguments(
    out: Path, options: RunOptions, device: torch.device, checkpoint: Path | None
) -> TrainingArguments:
    """transformers' TrainingArguments of a run. Every schedule begins with a warm-up and ends at a tenth of the peak.

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
    warmup = min(options.warmup_steps, options.steps // 2)
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
    lr_scheduler_type, lr_scheduler_kwargs = schedules[options.schedule]
    further = further_arguments(options.trainer)
    arguments: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": lr_scheduler_type,
        "lr_scheduler_kwargs": lr_scheduler_kwargs,
        "warmup_steps": warmup,
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
        "report_to": ["tensorboard"] if options.tensorboard else [],
        "disable_tqdm": True,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        # Every parameter gets a gradient in every step.
        "ddp_find_unused_parameters": False,
    }
    try:
        made = TrainingArguments(**{**arguments, **further})
    except (ValueError, TypeError) as error:
        raise UserError(f"these training options do not fit together: {' '.join(str(error).split())}") from error
    refuse_another_recipe(recipe_of(options, made), checkpoint)
    return made


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
    for name in given:
        if name not in known:
            raise UserError(f"--trainer {name}: TrainingArguments has no such field{did_you_mean(name, known)}")
        if name in ("output_dir", "max_steps", "num_train_epochs"):
            raise UserError(f"--trainer {name}: use --{'out' if name == 'output_dir' else 'steps'} instead")
    parser = _TrainerOptions(TrainingArguments, allow_abbrev=False)
    parsed = parser.parse_args([f"--{name}={value}" for name, value in given.items()])
    return {name: getattr(parsed, name) for name in given}


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


def command_line(verb: str, argv: Sequence[str]) -> str:
    """The command of this run, as one would type it, with torchrun where that started it."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes == "1":
        return shlex.join(["fathom", verb, *argv])
    return shlex.join(["torchrun", "--nproc_per_node", processes, "-m", f"fathom.scripts.{verb}", *argv])


class ConsoleCallback(TrainerCallback):
    """One readable line per log and evaluation, with speed as a share of the measured matrix throughput.

    Args:
        flops_per_token: of a training step.
        peak: floating-point operations per second of a large matrix product in the run's dtype, one process.
        yardsticks: bits per byte to print beside the model's, by name.
    """

    def __init__(self, flops_per_token: float, peak: float, yardsticks: dict[str, float]):
        self.flops_per_token = flops_per_token
        self.peak = peak
        self.yardsticks = yardsticks

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.restart(state)

    def restart(self, state) -> None:
        self.seconds, self.step, self.tokens = 0.0, state.global_step, state.num_input_tokens_seen

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds += time.perf_counter() - self.started

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if any(name.endswith("_bits_per_byte") for name in logs):
            print(self.evaluation_line(logs), flush=True)
        elif "loss" in logs:
            print(self.training_line(logs, state, args.world_size), flush=True)
            self.restart(state)

    def training_line(self, logs: dict[str, float], state, world_size: int) -> str:
        speed = (state.num_input_tokens_seen - self.tokens) / max(self.seconds, 1e-9)
        left = (state.max_steps - state.global_step) * self.seconds / max(state.global_step - self.step, 1)
        reached = speed * self.flops_per_token / (self.peak * world_size)
        parts = [
            f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}",
            f"loss {logs['loss']:.3f}",
            *([f"mtp {logs['mtp_loss']:.3f}"] if "mtp_loss" in logs else []),
            *([f"load {logs['expert_load']:.2f}"] if "expert_load" in logs else []),
            *([f"indexer {logs['indexer_loss']:.3f}"] if "indexer_loss" in logs else []),
            f"lr {logs['learning_rate']:.1e}",
            f"{speed:,.0f} tokens/s",
            f"{reached:.0%} of peak",
            f"{left / 60:.1f} min left",
        ]
        return "  ".join(parts)

    def evaluation_line(self, logs: dict[str, float]) -> str:
        by_name = {name.removeprefix("eval_"): value for name, value in logs.items()}
        beside = "".join(f", {name} {value:.3f}" for name, value in self.yardsticks.items())
        line = (
            f"held-out ({by_name['targets']:,} tokens): {by_name['bits_per_byte']:.3f} bits per byte{beside}"
            f"; perplexity {by_name['perplexity']:.1f}"
        )
        if "mtp_loss" in by_name:
            line += f"; mtp {by_name['mtp_loss']:.3f}"
        if "expert_load" in by_name:
            line += f"; load {by_name['expert_load']:.2f}"
        if "indexer_recall" in by_name:
            line += (
                f"\n  indexers capture {by_name['indexer_mass']:.1%} of attention and "
                f"{by_name['indexer_recall']:.1%} of its best keys (most recent keys "
                f"{by_name['indexer_recent_mass']:.1%} and {by_name['indexer_recent_recall']:.1%}, "
                f"random {by_name['indexer_random']:.1%}); KL {by_name['indexer_loss']:.3f}"
            )
        return line


class SampleCallback(TrainerCallback):
    """Prints what the model says after each evaluation."""

    def __init__(self, say: Callable[[Any], str]):
        self.say = say

    def on_evaluate(self, args, state, control, model=None, **kwargs) -> None:
        # A sharded model generates on all ranks or on none.
        if not state.is_world_process_zero or type(model).__name__.startswith(("FSDP", "FullySharded")):
            return
        text, width = repr(self.say(model)), LINE_WIDTH - 10
        lines = [text[start : start + width] for start in range(0, len(text), width)]
        print("  sample: " + ("\n" + " " * 10).join(lines), flush=True)


def continuation(model, tokenizer: PreTrainedTokenizerFast, ids: list[int], new_tokens: int) -> str:
    """Greedy continuation of token ids, as text."""
    was_training = model.training
    model.eval()
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )
    model.train(was_training)
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """What DeepSeek's releases store beside the weights: control tokens and sampling that a small model bears.

    No length: stored, it would hold for every caller, also for one that says `max_length` (lm-evaluation-harness) and
    for a whole server (vLLM). `fathom generate`, `chat` and `serve` have defaults of their own.
    """
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.95,
    )


def run_training(
    *,
    verb: str,
    argv: Sequence[str],
    out: Path,
    options: RunOptions,
    model,
    tokenizer: PreTrainedTokenizerFast,
    token_bytes: list[int],
    train: Dataset,
    heldout: Dataset,
    collator: Callable,
    tokens_per_row: float,
    arguments: TrainingArguments,
    checkpoint: Path | None,
    yardsticks: dict[str, float],
    say: Callable[[Any], str],
    facts: dict[str, Any],
) -> int:
    """Prints what was derived, trains, evaluates on all held-out rows, saves the model and run.json.

    Args:
        tokens_per_row: mean over the training rows, without padding.
        checkpoint: to resume from.
        yardsticks: bits per byte to print beside the model's.
        say: gives a sample of what the model says.
        facts: further entries of run.json.

    Returns:
        Exit code: 0, or 130 if a signal ended the run (a checkpoint is saved).

    Raises:
        UserError: `checkpoint` was trained on other data, or in another stage.
        DivergedError: a step was not finite, or its loss a spike.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_model_and_data = {"data": fingerprint(train), "trained_parameters": trained}
    refuse_another_recipe(of_model_and_data, checkpoint)
    recipe = {**recipe_of(options, arguments), **of_model_and_data}
    peak = measured_throughput(torch.bfloat16 if arguments.bf16 else torch.float32, arguments.device)
    flops = training_flops_per_token(model, tokens_per_row)
    counts = model.parameter_counts()
    model.generation_config = generation_config(tokenizer)
    describe(model, arguments, counts, flops, peak, tokens_per_row, len(train), len(heldout))

    def record(state) -> dict[str, Any]:
        return {
            "verb": verb,
            "command": command_line(verb, argv),
            **facts,
            "parameters_total": counts["total"],
            "parameters_active": counts["active"],
            "parameters_mtp": counts["mtp"],
            "tokens_seen": state.num_input_tokens_seen,
            "steps": state.global_step,
            "flops_per_token": flops,
            "world_size": arguments.world_size,
            "precision": "bf16" if arguments.bf16 else "fp32",
            "seed": options.seed,
            "recipe": recipe,
        }

    rows = min(options.eval_rows or len(heldout), len(heldout))
    trainer = FathomTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=heldout.select(range(rows)),
        data_collator=collator,
        processing_class=tokenizer,
        token_bytes=token_bytes,
        multistep=options.schedule == "multistep",
        spike_factor=options.spike_factor,
        optimizer_cls_and_kwargs=muon(options) if options.optimizer == "muon" else None,
        record=record,
        callbacks=[ConsoleCallback(flops, peak, yardsticks), SampleCallback(say)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)

    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    if trainer.is_world_process_zero():
        clear_leftovers(out)
        # Of the run that --overwrite replaces. They would be newer than this run's first ones, by their numbers.
        for old in [] if checkpoint else out.glob("checkpoint-*"):
            shutil.rmtree(old)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted:
        again = command_line(verb, [*(word for word in argv if word != "--resume"), "--resume"])
        print(f"stopped after step {trainer.state.global_step}, checkpoint saved; continue with\n  {again}", flush=True)
        return 130

    metrics = trainer.evaluate(heldout)
    evaluation = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    with staged_directory(out) as staging:
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            # The Trainer's pickle of its arguments; run.json says in text what matters.
            (staging / "training_args.bin").unlink(missing_ok=True)
            write_run(staging, {**record(trainer.state), "evaluation": evaluation})
    return 0


def describe(model, arguments, counts, flops, peak, tokens_per_row, rows, heldout_rows) -> None:
    """Prints what was derived before any of it costs time."""
    config = model.config
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    total = arguments.max_steps * rows_per_step * tokens_per_row
    share = counts["embedding"] / counts["total"]
    mtp, loss = "", ""
    if config.num_nextn_predict_layers:
        mtp = f"; {counts['mtp'] / 1e6:.2f} M MTP beside these"
        loss = (
            f"loss        next token + {config.mtp_loss_weight:g} x MTP + balance; on held-out rows next token alone\n"
        )
    print(
        f"model       {config.generation}: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"vocabulary {config.vocab_size}\n"
        f"parameters  {counts['total'] / 1e6:.2f} M total, {counts['active'] / 1e6:.2f} M active per token, "
        f"{share:.0%} embedding and head{mtp}\n"
        f"data        {rows:,} rows to train on, {heldout_rows:,} held out, {tokens_per_row:.0f} tokens per row\n"
        f"training    {arguments.max_steps:,} steps x {rows_per_step * tokens_per_row:,.0f} tokens = "
        f"{total / 1e6:.2f} M tokens, {total / (rows * tokens_per_row):.1f} passes over the data\n"
        f"{loss}"
        f"work        {flops / 1e6:.1f} MFLOP per token, {flops * total / 1e12:,.1f} TFLOP in all\n"
        f"machine     world size {arguments.world_size}, {arguments.device.type}, {torch.get_num_threads()} threads, "
        f"{'bf16 autocast' if arguments.bf16 else 'fp32'}, peak {peak / 1e9:,.0f} GFLOP/s (a matrix product, measured)",
        flush=True,
    )

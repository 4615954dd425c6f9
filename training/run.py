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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from .checkpoints import checkpoint_folders, staged_directory, write_run
from .console import ConsoleCallback, SampleCallback, describe
from .errors import SignalError, UserError
from .flops import measured_throughput, training_flops_per_token
from .heldout import Yardsticks, compressed_bits_per_byte, spread_sample, target_text
from .interruption import LOST_OUTPUT, EvaluationStopped, signal_name
from .lock import run_lock
from .options import RunOptions
from .output import lasting_output
from .resumable import clear_leftovers, find_whole
from .resuming import fingerprint, recipe_of, refuse_another_recipe
from .secrecy import public_words, redacted_words
from .trainer import FathomTrainer
from .trainer_arguments import is_multistep, muon


def start(options: RunOptions) -> None:
    """Checks the options and seeds all generators. A rank other than 0 prints nothing from here on."""
    if int(os.environ.get("RANK", "0")) != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    options.check()
    set_seed(options.seed)
    if not sys.stderr.isatty():
        disable_progress_bars()
    transformers_logging.disable_progress_bar()


@contextmanager
def run_folder(out: Path, options: RunOptions) -> Iterator[Path | None]:
    """A run's folder for the duration of the block, in which no other run may write to it.

    Gives the checkpoint to resume from, if any.

    Raises:
        UserError: as `check_out`, or another run writes to `out`, or nobody may.
        SignalError: with a note, if a signal comes before the first step.
    """
    check_is_folder(out)
    if int(os.environ.get("RANK", "0")) != 0:
        yield check_out(out, options)
        return
    with run_lock(out):
        clear_leftovers(out)
        checkpoint = check_out(out, options)
        try:
            yield checkpoint
        except SignalError as error:
            kept = f"; {checkpoint} is as it was" if checkpoint else ", so there is nothing to save"
            error.note = f"stopped by {signal_name(error.number)} before the first step{kept}"
            raise


def check_is_folder(out: Path) -> None:
    """Raises UserError if there is something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose another folder")


def check_out(out: Path, options: RunOptions) -> Path | None:
    """The checkpoint to resume from, if any: the newest whole one. What is stepped over is printed.

    Raises:
        UserError: `out` holds a run and neither --resume nor --overwrite is given, or there is nothing to resume.
    """
    check_is_folder(out)
    if options.resume:
        found = find_whole(out)
        if found.checkpoint is None:
            faults = f" ({'; '.join(found.faults)})" if found.faults else ""
            mend = "begin anew with --overwrite" if found.faults else "start without --resume"
            raise UserError(f"--resume: {out} holds no complete checkpoint{faults}; {mend}")
        for note in found.notes():
            print(note, flush=True)
        return found.checkpoint
    held = next((folder.name for folder in checkpoint_folders(out)), None)
    held = "a model" if held is None and (out / "config.json").exists() else held
    if held is not None and not options.overwrite:
        raise UserError(
            f"{out} already holds {held}; add --resume to continue it, --overwrite, or choose another --out"
        )
    return None


def command_line(verb: str, argv: Sequence[str]) -> str:
    """The command of this run, as one would type it, with torchrun where that started it, and without its secrets."""
    return shlex.join(redacted_words(_command_words(verb, argv)))


def _command_words(verb: str, argv: Sequence[str]) -> list[str]:
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    if processes == "1":
        return ["fathom", verb, *argv]
    return ["torchrun", "--nproc_per_node", processes, "-m", f"fathom.scripts.{verb}", *argv]


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
    token_texts: Sequence[bytes] | None = None,
) -> int:
    """Prints what was derived, trains, evaluates on all held-out rows, saves the model and run.json.

    Args:
        tokens_per_row: mean over the training rows, without padding.
        checkpoint: to resume from.
        yardsticks: bits per byte, of all held-out text, to print beside the model's.
        say: gives a sample of what the model says.
        facts: further entries of run.json.
        token_texts: the bytes of each token id, for yardsticks on the sample that evaluations within the run measure.

    Returns:
        Exit code: 0, or 128 + the number of the signal that ended the run (a checkpoint is saved).

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
    sample = spread_sample(heldout, options.eval_rows or len(heldout))
    beside = whole = Yardsticks("held-out", yardsticks)
    evaluation = ""
    if len(sample) < len(heldout):
        beside = Yardsticks("held-out sample", {})
        evaluation = f"{len(sample):,} held-out rows spread over all documents, at the end all {len(heldout):,}"
        if token_texts is not None and yardsticks:
            beside = Yardsticks(beside.text, compressed_bits_per_byte(target_text(sample, token_texts)))
            evaluation += "; gzip and xz of the same text"
    describe(model, arguments, counts, flops, peak, tokens_per_row, len(train), len(heldout), evaluation)

    def record(state) -> dict[str, Any]:
        return {
            "verb": verb,
            "command": shlex.join(public_words(_command_words(verb, argv))),
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

    console = ConsoleCallback(flops, peak, beside)
    trainer = FathomTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=sample,
        data_collator=collator,
        processing_class=tokenizer,
        token_bytes=token_bytes,
        multistep=is_multistep(options),
        spike_factor=options.spike_factor,
        optimizer_cls_and_kwargs=muon(options) if options.optimizer == "muon" else None,
        record=record,
        callbacks=[console, SampleCallback(say)],
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", flush=True)
    elif trainer.is_world_process_zero():
        # Of the run that --overwrite replaces. They would be newer than this run's first ones, by their numbers.
        for old in checkpoint_folders(out):
            shutil.rmtree(old)

    with trainer.interrupt.listening(), lasting_output() as output:
        metrics = trained_and_evaluated(trainer, checkpoint, heldout, console, whole)
        if metrics is not None:
            save_result(trainer, out, {**record(trainer.state), "evaluation": metrics})
    if metrics is None:
        again = command_line(verb, [*(word for word in argv if word != "--resume"), "--resume"])
        say_stopped(trainer.interrupt.number, trainer.state.global_step, again, output.lost)
        return 128 + trainer.interrupt.number
    return 0


def trained_and_evaluated(
    trainer: FathomTrainer, checkpoint: Path | None, heldout: Dataset, console: ConsoleCallback, whole: Yardsticks
) -> dict[str, float] | None:
    """Trains, and gives the figures of all held-out rows; None if a signal ended it, with a checkpoint saved."""
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.interrupted:
        return None
    console.yardsticks = whole
    try:
        metrics = trainer.evaluate(heldout)
    except EvaluationStopped:
        trainer.save_checkpoint()
        return None
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}


def save_result(trainer: FathomTrainer, out: Path, record: dict[str, Any]) -> None:
    """Saves the trained model and run.json to the run's folder."""
    with staged_directory(out) as staging:
        trainer.save_model(str(staging))
        if trainer.is_world_process_zero():
            write_run(staging, record)


def say_stopped(number: int, step: int, again: str, lost: OSError | None) -> None:
    """Says where a signal ended the run and how to go on, on stderr if nobody reads standard output any more."""
    lines = f"stopped after step {step}, checkpoint saved; continue with\n  {again}"
    with suppress(OSError):
        if number == LOST_OUTPUT or lost is not None:
            print(f"standard output cannot be written ({lost}): {lines}", file=sys.stderr)
        else:
            print(lines, flush=True)

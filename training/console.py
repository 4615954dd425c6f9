"""What a training run prints: what was derived before it, one line per log and evaluation, samples of the model."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from .heldout import Yardsticks

LINE_WIDTH = 120


class ConsoleCallback(TrainerCallback):
    """One readable line per log and evaluation, with speed as a share of the measured matrix throughput.

    Args:
        flops_per_token: of a training step.
        peak: floating-point operations per second of a large matrix product in the run's dtype, one process.
        yardsticks: what to print beside the model's bits per byte; exchange it when other text is measured.
    """

    def __init__(self, flops_per_token: float, peak: float, yardsticks: Yardsticks):
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
        beside = "".join(f", {name} {value:.3f}" for name, value in self.yardsticks.bits_per_byte.items())
        line = (
            f"{self.yardsticks.text} ({by_name['targets']:,} tokens): {by_name['bits_per_byte']:.3f} bits per byte"
            f"{beside}; perplexity {by_name['perplexity']:.1f}"
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


def describe(model, arguments, counts, flops, peak, tokens_per_row, rows, heldout_rows, evaluation="") -> None:
    """Prints what was derived before any of it costs time; `evaluation` says what is measured within the run."""
    config = model.config
    rows_per_step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    total = arguments.max_steps * rows_per_step * tokens_per_row
    share = counts["embedding"] / counts["total"]
    mtp = loss = ""
    evaluation = f"evaluation  {evaluation}\n" if evaluation else ""
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
        f"{evaluation}"
        f"training    {arguments.max_steps:,} steps x {rows_per_step * tokens_per_row:,.0f} tokens = "
        f"{total / 1e6:.2f} M tokens, {total / (rows * tokens_per_row):.1f} passes over the data\n"
        f"{loss}"
        f"work        {flops / 1e6:.1f} MFLOP per token, {flops * total / 1e12:,.1f} TFLOP in all\n"
        f"machine     world size {arguments.world_size}, {arguments.device.type}, {torch.get_num_threads()} threads, "
        f"{'bf16 autocast' if arguments.bf16 else 'fp32'}, peak {peak / 1e9:,.0f} GFLOP/s (a matrix product, measured)",
        flush=True,
    )

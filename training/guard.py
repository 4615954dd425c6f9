"""Stops a run at the step whose loss or gradient is not finite, or whose loss jumps, before the weights take it.

One such step spoils the weights and the optimizer's averages for good, and the Trainer goes on: its
`logging_nan_inf_filter` even keeps the number out of the log. Here the run ends with the last checkpoint as it was, and

    OUT/diverged-STEP/report.json          step, reason, the module where it began
    OUT/diverged-STEP/rank-R.safetensors   what rank R trained on in this step: `M.input_ids` of micro-batch M, ...

The module is found by running the step once more, with every module's output and its gradient watched.

A loss that is finite but above `spike_factor` times the median of the last steps can stop the run too. That is off
unless asked for: most spikes pass by themselves, and how large one is depends on the data.
"""

import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from .errors import DivergedError

# Of so many steps is the median taken; before there are enough of them nothing is called a spike.
WINDOW, ENOUGH = 100, 20


class StepGuard:
    """Looks at every optimizer step of a Trainer.

    Args:
        spike_factor: a loss above so many times the median of the last `WINDOW` steps ends the run; 0: none does.
    """

    def __init__(self, spike_factor: float = 0.0):
        self.spike_factor = spike_factor
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.batches: list[dict[str, Any]] = []
        self.loss: torch.Tensor | float = 0.0

    def note(self, inputs: dict[str, Any], loss: torch.Tensor) -> None:
        """Keeps a micro-batch and its share of the step's loss until the step is checked."""
        self.batches.append(inputs)
        self.loss = self.loss + loss.detach()

    def check(self, trainer, grad_norm: torch.Tensor | float) -> None:
        """Call it on all ranks after the last backward pass of a step, before the optimizer's step.

        Raises:
            DivergedError: on all ranks, once the report is written.
        """
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        both = torch.stack([torch.as_tensor(value, device=trainer.args.device).float() for value in (self.loss, norm)])
        loss, norm = trainer.accelerator.reduce(both, "mean").tolist()
        # The gradients of fp16 overflow now and then; its loss scaling skips the step and goes on.
        scaled = trainer.accelerator.scaler is not None
        reason = self.objection(loss, 0.0 if scaled else norm)
        if reason is not None:
            self.stop(trainer, reason, {"loss": loss, "gradient_norm": norm})
        self.remember(loss)
        self.batches, self.loss = [], 0.0

    def remember(self, loss: float) -> None:
        """Counts a step's loss among the last ones; that of no targets, 0, says nothing about what is usual."""
        if loss:
            self.recent.append(loss)

    def objection(self, loss: float, grad_norm: float) -> str | None:
        """What is wrong with a step, or None."""
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        if self.spike_factor and len(self.recent) >= ENOUGH and loss > self.spike_factor * median(self.recent):
            usual = median(self.recent)
            return f"the loss {loss:.4g} is above {self.spike_factor:g} x {usual:.4g}, the median of the last steps"
        return None

    def stop(self, trainer, reason: str, figures: dict[str, float]) -> None:
        step, rank = trainer.state.global_step + 1, trainer.args.process_index
        folder = Path(trainer.args.output_dir) / f"diverged-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, batch in enumerate(self.batches)
            for name, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, folder / f"rank-{rank}.safetensors")
        origins = filter(None, gather_object([self.origin(trainer)]))
        # The gradients of a sharded model are all ranks': where it began, a rank sees an output, the others gradients.
        origin = min(origins, key=lambda found: found.startswith("the gradient"), default=None)
        if rank == 0:
            written = {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}
            report = {"step": step, "reason": reason, **written, "origin": origin}
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        trainer.accelerator.wait_for_everyone()
        where = f"; it began in {origin}" if origin else ""
        raise DivergedError(f"step {step}: {reason}{where}; the step was not taken, report and batch are in {folder}")

    def origin(self, trainer) -> str | None:
        """Where this rank's step leaves the finite numbers; None if it does not, as in a spike."""
        found = []
        # All of them, whatever is found: a sharded model needs all ranks to the end.
        for batch in self.batches:
            trainer.model.zero_grad()

            def run(batch: dict[str, Any] = batch) -> None:
                # Without DDP's wrapper, whose hooks would wait for ranks that need not have this batch's trouble.
                trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).backward()

            found.append(first_not_finite(trainer.model, run))
        return next(filter(None, found), None)


def first_not_finite(model: nn.Module, run: Callable[[], None]) -> str | None:
    """What is first not finite when `run` takes `model` forward and backward, or None.

    Outputs in the order in which modules finish, then the gradients of outputs from the loss downwards, then those of
    parameters.
    """
    found: list[str] = []

    def watch(name: str) -> Callable:
        def look(module: nn.Module, inputs: tuple, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and not tensor.detach().isfinite().all():
                    found.append(f"the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        def look_back(gradient: torch.Tensor) -> None:
            if not found and not gradient.isfinite().all():
                found.append(f"the gradient of the output of {name}")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if not found and local is not None and not local.isfinite().all():
            found.append(f"the gradient of {name}")
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors in what a module returns."""
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)

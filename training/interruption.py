"""A signal ends training with a checkpoint, whenever it comes, and on all processes at the same place.

    between steps, in a step     the step ends, a checkpoint is saved
    in an evaluation             the evaluation ends at once, a checkpoint is saved
    while saving                 the checkpoint is finished

SIGINT (Ctrl-C), SIGTERM and SIGHUP count alike, and so does standard output that nobody reads any more. A signal may
reach one process alone, or each at another step: they agree by a sum over all before one of them stops.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
LOST_OUTPUT = getattr(signal, "SIGPIPE", 13)


class EvaluationStopped(Exception):
    """An evaluation was left because a signal came; the weights are those of the last step."""


class InterruptCallback(TrainerCallback):
    """Ends training at the next step boundary, with a checkpoint; a second Ctrl-C ends it at once.

    Attributes:
        asked: number of the signal that this process had, or 0.
        interrupted: whether any process had one, and all know it.
        number: of that signal.
    """

    def __init__(self) -> None:
        self.asked = self.number = self.depth = 0
        self.interrupted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over for the duration of the block; Python allows that in the main thread alone.

        Blocks within blocks are one. A signal that is ignored, as SIGHUP is under nohup, stays so.
        """
        self.depth += 1
        previous: dict[int, Any] = {}
        if self.depth == 1:
            self.asked = self.number = 0
            self.interrupted = False
            if threading.current_thread() is threading.main_thread():
                heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
                previous = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            self.depth -= 1
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A supervisor sends several signals, and repeats them; only a person at the terminal cannot wait.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = self.asked or number
        # The terminal may be gone, or this may have come in the middle of another print.
        with suppress(OSError, ValueError, RuntimeError):
            print("\ninterrupted: saving after this step (Ctrl-C once more to stop at once)", flush=True)

    def agree(self, device: Any) -> bool:
        """Whether any process had a signal; call it on all of them."""
        if not self.asked and getattr(sys.stdout, "lost", None):
            self.asked = LOST_OUTPUT
        self.number = self.asked
        if dist.is_available() and dist.is_initialized():
            anyone = torch.tensor(float(self.asked), device=device)
            dist.all_reduce(anyone, dist.ReduceOp.MAX)
            self.number = int(anyone)
        self.interrupted = bool(self.number)
        return self.interrupted

    def on_step_end(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.agree(args.device):
            control.should_save = control.should_training_stop = True

    def on_evaluate(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.agree(args.device):
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.agree(args.device):
            control.should_training_stop = True


def signal_name(number: int) -> str:
    """`SIGTERM` for 15; what happened, where no signal did."""
    return "closed output" if number == LOST_OUTPUT else signal.Signals(number).name

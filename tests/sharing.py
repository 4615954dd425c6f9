"""A model whose calls of `generate()` share a batch, with a view of its forwards and a gate before them."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from generations import tokens

from fathom.modeling.continuous_batching import SharedBatch

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = [tokens(1, length) for length in (5, 37, 11, 2, 24, 9)]
THREAD = "fathom-shared-batch"


class Forwards:
    """The shapes [B, T] of a model's forwards, and a gate before them."""

    def __init__(self, ours) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.hook = ours.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs) -> None:
        assert self.gate.wait(30)
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    @property
    def rows(self) -> list[int]:
        return [rows for rows, _ in self.shapes]


@contextmanager
def sharing(ours, **limits: int) -> Iterator[tuple[SharedBatch, Forwards]]:
    forwards = Forwards(ours)
    batch = ours.share_batch(**limits)
    try:
        yield batch, forwards
    finally:
        forwards.gate.set()
        batch.close()
        forwards.hook.remove()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


def start(ours, shared: tuple[SharedBatch, Forwards], prompts: list[torch.Tensor], **kwargs) -> list[Future]:
    """Calls of `generate()`, in this order in the queue, before the first forward. What differs stands in lists."""
    batch, forwards = shared
    forwards.gate.clear()
    pool, calls = ThreadPoolExecutor(len(prompts)), []
    for index, prompt in enumerate(prompts):
        own = {name: value[index] if isinstance(value, list) else value for name, value in kwargs.items()}
        calls.append(pool.submit(ours.generate, prompt, **own))
        until(lambda index=index: len(batch._waiting) + len(batch._joining) == index + 1)
    pool.shutdown(wait=False)
    forwards.gate.set()
    return calls


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


class Listener:
    """A streamer that keeps what it is given, and may raise at a token."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.parts: list[list[int]] = []
        self.ended = False
        self.fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())
        if len(self.parts) - 1 == self.fails_at:
            raise ConnectionError("nobody listens")

    def end(self) -> None:
        self.ended = True

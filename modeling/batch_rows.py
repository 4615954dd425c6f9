"""What takes part in a shared batch (`continuous_batching`): rows, groups of rows with one cache, and how rows end.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

import queue
import sys
import threading
from collections.abc import Callable
from itertools import count

import torch
from transformers.generation import StoppingCriteria

from .cache import FathomDynamicCache


class SharedBatchFull(RuntimeError):
    """As many calls of `generate()` wait for the shared batch as may wait; the call can be repeated later."""


class Cancellation(StoppingCriteria):
    """A stopping criterion that ends a text from outside, whatever state the call of `generate()` is in.

        cancellation = Cancellation()
        model.generate(..., stopping_criteria=[cancellation])    in one thread
        cancellation.cancel()                                    in another

    A row of a shared batch ends at once, also while it waits or its prompt is being read. A text that is generated
    apart ends after its next token. In both cases `generate()` returns the text so far.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Ends the text. Further calls do nothing."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def watch(self, callback: Callable[[], None]) -> None:
        """Has `callback` called once, when the text is cancelled; at once if it has been."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self._cancelled, dtype=torch.bool, device=input_ids.device)


class Row:
    """One call of `generate()`.

    Args:
        input_ids: prompt [1, T], at least one token.
        position_ids: its positions [1, T].
        cache: an empty one.
        logits_processor, stopping_criteria, generation_config: as `generate()` made them.

    Raises:
        ValueError: the prompt is empty.
    """

    _numbers = count()

    def __init__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: FathomDynamicCache,
        logits_processor,
        stopping_criteria,
        generation_config,
    ):
        if input_ids.shape[1] == 0:
            raise ValueError("the prompt has no tokens; begin it with one, the begin-of-sentence token for example")
        self.number = next(self._numbers)  # rows with smaller numbers came earlier
        self.prompt = input_ids
        self.positions = position_ids
        self.cache: FathomDynamicCache | None = cache
        self.process = logits_processor
        self.stops = stopping_criteria
        self.samples = generation_config.do_sample
        self.most = sys.maxsize if generation_config.max_length is None else generation_config.max_length
        # The caller's inference mode does not hold in the thread that writes here.
        with torch.inference_mode(False):
            self.ids = input_ids.new_empty(1, input_ids.shape[1] + 64)
            self.ids[:, : input_ids.shape[1]] = input_ids
        self.length = input_ids.shape[1]
        self.cached = 0
        # Numbers rather than tensors: a step reads them of every row.
        self.newest, self.last_position = int(input_ids[0, -1]), int(position_ids[0, -1])
        # A generator of its own, so that what other rows draw changes nothing.
        self.generator = torch.Generator(device=input_ids.device)
        seed = getattr(generation_config, "seed", None)
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.passed = 0  # later rows that were let in first
        self.preempted = False  # whether it has given its room to others before
        self.alone = False  # whether its forwards are shared with no other row, after a shared one failed
        self.cancelled = False
        # Tokens for the caller, then None or what went wrong.
        self.outbox: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        for each in stopping_criteria:
            if isinstance(each, Cancellation):
                each.watch(self.cancel)

    @property
    def unread(self) -> int:
        """Number of tokens that are not in the cache."""
        return self.length - self.cached

    def cancel(self) -> None:
        """Ends the text where it is; the batch's thread lets go of the row before its next forward."""
        self.cancelled = True
        self.outbox.put(None)

    def fail(self, error: BaseException) -> None:
        """Ends the text with an error, which is raised in the caller's thread."""
        self.cancelled = True
        self.outbox.put(error)

    def next_tokens(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next tokens to read, at most so many, and their positions, both [1, n].

        Positions of generated tokens go on from those of the prompt.
        """
        start, end = self.cached, min(self.cached + tokens, self.length)
        prompt = self.prompt.shape[1]
        positions = self.positions[:, start:end]
        if end > prompt:
            ahead = torch.arange(max(start, prompt), end, device=positions.device)[None] - (prompt - 1)
            positions = torch.cat((positions, ahead + self.last_position), dim=1)
        return self.ids[:, start:end], positions

    @property
    def newest_position(self) -> int:
        """Position of the newest token."""
        return self.last_position + self.length - self.prompt.shape[1]

    def take(self, logits: torch.Tensor) -> bool:
        """Chooses the next token by logits [1, V]. Returns whether the text goes on; errors are the caller's."""
        try:
            text = self.ids[:, : self.length]
            scores = self.process(text, logits.to(text.device, torch.float32))
            if self.samples:
                token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            self._append(token)
            ends = bool(self.stops(self.ids[:, : self.length], None))
            self.outbox.put(self.newest)
        # Panics of Rust extensions are no `Exception`; nothing that a caller brings may end the batch's thread.
        except BaseException as error:
            self.fail(error)
            return False
        if ends:
            self.outbox.put(None)
        return not ends

    def _append(self, token: torch.Tensor) -> None:
        if self.length == self.ids.shape[1]:
            larger = self.ids.new_empty(1, self.length + self.length // 2)
            larger[:, : self.length] = self.ids
            self.ids = larger
        self.ids[:, self.length : self.length + 1] = token
        self.length += 1
        self.newest = int(token)


class Group:
    """Rows that a forward continues together, and their cache. Rows end in the same column of it."""

    def __init__(self, row: Row):
        assert row.cache is not None
        self.rows = [row]
        self.cache, row.cache = row.cache, None

    @property
    def columns(self) -> int:
        """Columns of the cache, which the longest row fills."""
        return max(row.cached for row in self.rows)

    @property
    def room(self) -> int:
        """Cached tokens after the next step, with the padding of shorter rows."""
        return len(self.rows) * max(row.length for row in self.rows)

    def join(self, other: "Group") -> None:
        """Takes the rows of another group in; the other one must not be used any more."""
        self.cache.batch_append(other.cache)
        self.rows += other.rows

    def leave(self, leaving: list[Row]) -> None:
        """Takes rows out, and with them what the cache holds for them alone."""
        columns = self.columns
        staying = [index for index, row in enumerate(self.rows) if row not in leaving]
        self.rows = [self.rows[index] for index in staying]
        if not staying:
            return
        self.cache.batch_select_indices(torch.tensor(staying))
        self.cache.drop_oldest(columns - self.columns)

    def split(self, leaving: list[Row]) -> "Group":
        """Takes rows out into a group of their own; some, not all."""
        other = Group.__new__(Group)
        other.rows, other.cache = self.rows.copy(), self.cache.copied()
        other.leave([row for row in self.rows if row not in leaving])
        self.leave(leaving)
        return other

    def inputs(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the next step reads: newest tokens [B, 1], their positions [B, 1], and a mask where rows are padded."""
        ids = torch.tensor([[row.newest] for row in self.rows], device=device)
        positions = torch.tensor([[row.newest_position] for row in self.rows], device=device)
        lengths = [row.length for row in self.rows]
        columns = max(lengths)
        if min(lengths) == columns:
            return ids, positions, None
        begins = columns - torch.tensor(lengths, device=device)
        return ids, positions, (torch.arange(columns, device=device) >= begins[:, None]).long()  # [B, columns]

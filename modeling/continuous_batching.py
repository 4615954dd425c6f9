"""Continuous batching: calls of `generate()` from several threads share the forwards of one batch.

    model.share_batch(max_rows=8)         from now on
    model.generate(...)                   in as many threads as there are users; as always, each with its own settings

After every token rows may leave the batch and others join it (iteration-level scheduling, Orca, OSDI 2022):

    callers   generate() --> waiting --> joining: prompts read alone, --> rows: one forward for all, one token each
              <--- tokens, one by one    a chunk between two steps        until a row's own criteria stop it

A decoding step of a small batch takes little longer than that of one row, since its cost is weights that are read and
operations that are launched. Rows end in the same column of the cache and the shorter ones begin with padding, which
costs memory and attention where lengths differ much.

Memory. Rows take room as they grow, not by their `max_length`; `max_cached_tokens` bounds the columns of the cache
times the rows. Where padding would exceed it, rows of different lengths continue in groups, each with a cache and a
forward of its own. Where the tokens themselves exceed it, one row is preempted: it waits, and its text is read again
later (vLLM, arXiv 2309.06180, section 4.5). That is the longest of those that have not been preempted yet, then the
latest.

Fairness. Rows are let in as they come. A row that fits passes one that does not, `PATIENCE` times; then later rows wait
until the older one is in. Of the prompts that are being read, the oldest gets half of the tokens and the shortest the
others.

Failures. A call gets what its own processors, criteria or streamer raise, of any kind. If a forward of several rows
fails, each is read again alone, so that one bad row fails alone. Whatever ends the thread, all callers get an
exception, and the next call starts another thread.

A call gets the tokens that it would get alone (in fp32; other shapes round differently), by the logits processors and
stopping criteria that `generate()` made for it, and draws from a generator of its own. What a shared batch cannot carry
(several rows, beams, drafts, a cache of the caller's, scores to return) is generated apart, as ever.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

import queue
import threading
from itertools import pairwise

import torch

from .batch_rows import Group, Row, SharedBatchFull
from .cache import FathomDynamicCache, empty_cache

# Of the tokenizer, stopping criteria have taken what they need.
CARRIED = {"cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer"}
CLOSED, FAILED = "the shared batch was closed", "the shared batch failed"
PATIENCE = 16  # later rows that may pass one which waits for room
GROWTH = 64  # tokens that a row must have room to grow by when it is let in, so that it is not preempted at once
POLL = 1.0  # seconds between two looks of a waiting caller at whether the batch's thread lives


class SharedBatch:
    """A model's batch, and the thread that runs it while there is something to do.

    Args:
        model: a `FathomForCausalLM`.
        max_rows: most texts at a time; others wait.
        max_cached_tokens: most columns of the cache, times rows. A single text cannot have more tokens. Default: 65536,
            or the model's `max_position_embeddings` where that is more.
        prefill_chunk: prompt tokens read between two steps, which bounds how long running texts pause for new ones.
        max_waiting: most calls that wait; a further one raises `SharedBatchFull`.
    """

    def __init__(
        self,
        model,
        max_rows: int = 8,
        max_cached_tokens: int | None = None,
        prefill_chunk: int = 256,
        max_waiting: int = 256,
    ):
        if max_cached_tokens is None:
            max_cached_tokens = max(65536, model.config.max_position_embeddings)
        for name, value in (
            ("max_rows", max_rows),
            ("max_cached_tokens", max_cached_tokens),
            ("prefill_chunk", prefill_chunk),
            ("max_waiting", max_waiting),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model = model
        self.max_rows = max_rows
        self.max_cached_tokens = max_cached_tokens
        self.prefill_chunk = prefill_chunk
        self.max_waiting = max_waiting
        # Shared with the callers, under the lock.
        self._lock = threading.Lock()
        self._waiting: list[Row] = []  # the oldest first
        self._calls = 0  # of `generate()` that have not returned
        self._thread: threading.Thread | None = None
        self._closed = False
        # The thread's own.
        self._joining: list[Row] = []
        self._groups: list[Group] = []

    def __reduce__(self):
        # Of a model that is copied or pickled, the copy shares no batch.
        return type(None), ()

    def carries(self, input_ids: torch.Tensor, generation_config, synced_gpus: bool, model_kwargs: dict) -> bool:
        """Whether a call of `_sample` with these arguments can be a row; the others are generated apart."""
        cache = model_kwargs.get("cache")
        return (
            input_ids.shape[0] == 1
            and input_ids.shape[1] > 0
            and not synced_gpus
            and not generation_config.return_dict_in_generate
            and type(cache) is FathomDynamicCache
            and not (cache.offloading or cache.get_seq_length() or getattr(cache, "_is_user_defined", False))
            and model_kwargs.get("attention_mask") is None
            and model_kwargs.get("position_ids") is not None
            and CARRIED.issuperset(model_kwargs)
            # It holds in the caller's thread alone.
            and not torch.is_autocast_enabled(self.model.device.type)
            # PEFT's prompt learning puts virtual tokens before the prompt there.
            and "prepare_inputs_for_generation" not in vars(self.model)
        )

    def generate(self, row: Row, streamer=None) -> torch.Tensor:
        """Runs in the caller's thread: waits for the row's tokens, streams them, and returns the whole text [1, L].

        However it ends, by an error of the streamer's too, the row leaves the batch before the next step. A row that is
        cancelled (`Cancellation`) ends with the tokens it has.

        Raises:
            ValueError: the prompt has more than `max_cached_tokens` tokens.
            SharedBatchFull: too many other calls wait.
            RuntimeError: the batch was closed, its thread failed, or the text has outgrown `max_cached_tokens`.
            Exception: what the row's own logits processors, stopping criteria or streamer raised.
        """
        self._submit(row)
        tokens: list[int] = []
        try:
            while (item := self._next(row)) is not None:
                if isinstance(item, BaseException):
                    raise item
                tokens.append(item)
                if streamer is not None:
                    streamer.put(torch.tensor([item]))
        finally:
            row.cancelled = True
            with self._lock:
                self._calls -= 1
        if streamer is not None:
            streamer.end()
        return torch.cat((row.prompt, row.prompt.new_tensor([tokens])), dim=1)

    def close(self) -> None:
        """Ends all texts with an error, and the thread; later calls of `generate()` run apart."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if self.model.shared_batch is self:
            self.model.shared_batch = None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _submit(self, row: Row) -> None:
        if row.length > self.max_cached_tokens:
            raise ValueError(
                f"the prompt has {row.length} tokens, more than max_cached_tokens={self.max_cached_tokens} of the "
                f"shared batch; shorten it, or call share_batch() with a larger max_cached_tokens"
            )
        with self._lock:
            if self._closed:
                raise failure(CLOSED)
            if self._thread is not None and not self._thread.is_alive():
                self._end(FAILED)
            if self._calls >= self.max_rows + self.max_waiting:
                raise SharedBatchFull(
                    f"{self._calls} texts are being generated or wait, as many as max_rows={self.max_rows} and "
                    f"max_waiting={self.max_waiting} allow; try again later"
                )
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="fathom-shared-batch", daemon=True)
                self._waiting.append(row)
                try:
                    thread.start()
                except BaseException:
                    self._waiting.remove(row)
                    raise
                self._thread = thread
            else:
                self._waiting.append(row)
            self._calls += 1

    def _next(self, row: Row) -> int | BaseException | None:
        """The row's next token; None at its end; an exception if the thread has ended without a word."""
        while True:
            try:
                return row.outbox.get(timeout=POLL)
            except queue.Empty:
                with self._lock:
                    if (self._thread is None or not self._thread.is_alive()) and row.outbox.empty():
                        return failure(FAILED)

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._admit():
                self._read_prompts()
                self._make_room()
                for group in self._groups.copy():
                    self._step(group)
        except BaseException as error:
            with self._lock:
                self._end(FAILED, error)

    # Who takes part.

    @property
    def _rows(self) -> list[Row]:
        return [row for group in self._groups for row in group.rows]

    @property
    def _present(self) -> list[Row]:
        return [*self._joining, *self._rows]

    def _admit(self) -> bool:
        """Lets rows that nobody waits for go, and others in. Returns False, which ends the thread, if none is left."""
        for group in self._groups.copy():
            self._leave(group, [row for row in group.rows if row.cancelled])
        self._joining = [row for row in self._joining if not row.cancelled]
        self._merge_groups()
        with self._lock:
            if self._closed:
                self._fail_all(CLOSED)
            self._waiting = [row for row in self._waiting if not row.cancelled]
            held_up: list[Row] = []
            for row in self._waiting.copy():
                if self._fits(row):
                    self._waiting.remove(row)
                    self._joining.append(row)
                    for older in held_up:
                        older.passed += 1
                elif self._held_up(row):
                    held_up.append(row)
                    if row.passed >= PATIENCE:
                        break
            if self._present:
                return True
            self._thread = None
            return False

    def _fits(self, row: Row, present: list[Row] | None = None) -> bool:
        """Whether a row has room beside those that are present, without padding: groups can be split."""
        present = self._present if present is None else present
        room = len(present) < self.max_rows and sum(map(self._need, (*present, row))) <= self.max_cached_tokens
        return not present or room

    def _held_up(self, row: Row) -> bool:
        """Whether a row that does not fit would fit if no later row were there."""
        return self._fits(row, [other for other in self._present if other.number < row.number])

    def _need(self, row: Row) -> int:
        return min(row.length + GROWTH, row.most)

    def _used(self) -> int:
        """Cached tokens after the prompts that are being read, and one step more."""
        return sum(row.length for row in self._joining) + sum(group.room for group in self._groups)

    def _make_room(self) -> None:
        """Before a step: splits groups, then preempts rows, until what the step adds to the caches fits."""
        for row in self._rows:
            if row.length > self.max_cached_tokens:
                reached = f"the text has reached max_cached_tokens={self.max_cached_tokens} of the shared batch"
                row.fail(failure(f"{reached}; ask for fewer new tokens, or call share_batch() with a larger one"))
        for group in self._groups.copy():
            self._leave(group, [row for row in group.rows if row.cancelled])
        while self._used() > self.max_cached_tokens:
            if not self._split():
                self._preempt()

    def _split(self) -> bool:
        """Parts the group with the most padding, the shorter rows from the longer. Returns whether there is padding."""
        best: tuple[int, Group, list[Row]] | None = None
        for group in self._groups:
            rows = sorted(group.rows, key=lambda row: row.length)
            for size in range(1, len(rows)):
                saved = size * (rows[-1].length - rows[size - 1].length)
                if saved > (best[0] if best else 0):
                    best = saved, group, rows[:size]
        if best is None:
            return False
        _, group, shorter = best
        rows = group.rows
        try:
            self._groups.append(group.split(shorter))
        except BaseException as error:
            self._recover(rows, error)
        return True

    def _preempt(self) -> None:
        """Has one row give its room to the others."""
        rows = self._present
        fresh = [row for row in rows if not row.preempted]
        row = max(fresh, key=lambda row: row.length) if fresh else max(rows, key=lambda row: row.number)
        row.preempted = True
        self._restart([row])

    def _restart(self, rows: list[Row]) -> None:
        """Has rows wait again; what the cache held of them is read once more."""
        for row in rows:
            row.cached, row.cache = 0, empty_cache(self.model.config)
        self._joining = [row for row in self._joining if row not in rows]
        for group in self._groups.copy():
            self._leave(group, [row for row in group.rows if row in rows])
        with self._lock:
            self._waiting = sorted([*self._waiting, *rows], key=lambda row: row.number)

    # What is computed.

    def _read_prompts(self) -> None:
        """Reads the next tokens of prompts, every one alone; those that are read become rows."""
        budget = self.prefill_chunk
        if len(self._joining) > 1:
            # Neither do short prompts wait for a long one, nor a long one for ever more short ones.
            budget -= self._read(self._joining[0], (budget + 1) // 2)
        while self._joining and budget > 0:
            budget -= self._read(min(self._joining, key=lambda row: row.unread), budget)

    def _read(self, row: Row, tokens: int) -> int:
        """Reads at most so many tokens of a joining row, and returns how many they were."""
        ids, positions = row.next_tokens(tokens)
        try:
            logits = self._forward(row.cache, ids, positions)
        except BaseException as error:
            row.fail(error)
            self._joining.remove(row)
            return 0
        row.cached += ids.shape[1]
        if not row.unread:
            self._joining.remove(row)
            if row.take(logits):
                self._join(row)
        return ids.shape[1]

    def _join(self, row: Row) -> None:
        """Puts a row into the group to which it adds the least padding, or into one of its own."""
        added = {
            group: (len(group.rows) + 1) * max(row.length, *(other.length for other in group.rows)) - group.room
            for group in self._groups
            if not (row.alone or group.rows[0].alone)
        }
        best = min(added, key=added.__getitem__, default=None)
        if best is None or self._used() + added[best] > self.max_cached_tokens:
            self._groups.append(Group(row))
        else:
            self._merge(best, Group(row))

    def _merge(self, group: Group, other: Group) -> None:
        rows = [*group.rows, *other.rows]
        try:
            group.join(other)
        except BaseException as error:
            self._recover(rows, error)

    def _merge_groups(self) -> None:
        """Merges two groups where there is ample room again: a forward less in every step."""
        groups = sorted((group for group in self._groups if not group.rows[0].alone), key=lambda group: group.columns)
        for shorter, longer in pairwise(groups):
            rows = [*shorter.rows, *longer.rows]
            padded = len(rows) * max(row.length for row in rows) - shorter.room - longer.room
            if 4 * (self._used() + padded) <= 3 * self.max_cached_tokens:
                self._groups.remove(shorter)
                self._merge(longer, shorter)
                return

    def _leave(self, group: Group, leaving: list[Row]) -> None:
        if not leaving:
            return
        rows = [row for row in group.rows if row not in leaving]
        try:
            group.leave(leaving)
        except BaseException as error:
            self._recover(rows, error)
        if not rows:
            self._groups.remove(group)

    def _step(self, group: Group) -> None:
        """One more token for every row of a group."""
        rows = group.rows
        try:
            logits = self._forward(group.cache, *group.inputs(self.model.device))
        except BaseException as error:
            self._recover(rows, error)
            return
        for row in rows:
            row.cached += 1
        self._leave(group, [row for index, row in enumerate(rows) if not row.take(logits[index : index + 1])])

    def _recover(self, rows: list[Row], error: BaseException) -> None:
        """After a failure that has left the caches of these rows broken: a single row fails, several are read again."""
        self._groups = [group for group in self._groups if not any(row in rows for row in group.rows)]
        if len(rows) == 1:
            rows[0].fail(error)
            return
        for row in rows:
            row.alone = True
        self._restart(rows)

    def _forward(
        self, cache, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [B, V] after the last of ids [B, T] at positions [B, T]."""
        device = self.model.device
        return self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=positions.to(device),
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]

    # How all of it ends.

    def _end(self, reason: str, cause: BaseException | None = None) -> None:
        """Ends all texts; the next call starts another thread. Under the lock, by the thread or after its death."""
        self._thread = None
        self._fail_all(reason, cause)

    def _fail_all(self, reason: str, cause: BaseException | None = None) -> None:
        for row in (*self._present, *self._waiting):
            row.fail(failure(reason, cause))
        self._groups, self._joining, self._waiting = [], [], []


def failure(reason: str, cause: BaseException | None = None) -> RuntimeError:
    """An exception for one row: raising writes into it, so that threads cannot share one."""
    error = RuntimeError(reason if cause is None else f"{reason}: {cause}")
    error.__cause__ = cause
    return error

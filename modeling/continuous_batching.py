"""Continuous batching: calls of `generate()` from several threads share the forwards of one batch.

    model.share_batch(max_rows=8)         from now on
    model.generate(...)                   in as many threads as there are users; as always, each with its own settings

After every token rows may leave the batch and others join it (iteration-level scheduling, Orca, OSDI 2022):

    callers   generate() --> waiting --> joining: prompts read alone, --> rows: one forward for all, one token each
              <--- tokens, one by one    a chunk between two steps        until a row's own criteria stop it

A decoding step of a small batch takes little longer than that of one row, since its cost is weights that are read and
operations that are launched. Rows end in the same column of the cache and the shorter ones begin with padding, which
costs memory and attention where lengths differ much: `max_cached_tokens` bounds rows x columns.

A call gets the tokens that it would get alone (in fp32; other shapes round differently), by the logits processors and
stopping criteria that `generate()` made for it, and draws from a generator of its own. What a shared batch cannot carry
(several rows, beams, drafts, a cache of the caller's, scores to return) is generated apart, as ever.

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

import queue
import threading
from collections import deque

import torch

from .cache import FathomDynamicCache

# Of the tokenizer, stopping criteria have taken what they need.
CARRIED = {"cache", "attention_mask", "position_ids", "use_cache", "logits_to_keep", "tokenizer"}
CLOSED, FAILED = "the shared batch was closed", "a forward of the shared batch failed"


class Row:
    """One call of `generate()`.

    Args:
        input_ids: prompt [1, T].
        position_ids: its positions [1, T].
        cache: an empty one.
        logits_processor, stopping_criteria, generation_config: as `generate()` made them.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        cache: FathomDynamicCache,
        logits_processor,
        stopping_criteria,
        generation_config,
    ):
        self.prompt = input_ids
        self.positions = position_ids
        self.cache = cache
        self.process = logits_processor
        self.stops = stopping_criteria
        self.samples = generation_config.do_sample
        self.most = generation_config.max_length
        # The caller's inference mode does not hold in the thread that writes here.
        with torch.inference_mode(False):
            self.ids = torch.empty(1, self.most, dtype=input_ids.dtype, device=input_ids.device)
            self.ids[:, : input_ids.shape[1]] = input_ids
        self.length = input_ids.shape[1]
        self.cached = 0
        # Of its own, so that what others draw changes nothing.
        self.generator = torch.Generator(device=input_ids.device)
        seed = getattr(generation_config, "seed", None)
        self.generator.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
        self.cancelled = False
        # Tokens for the caller, then None or what went wrong.
        self.outbox: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def take(self, logits: torch.Tensor) -> bool:
        """Chooses the next token by logits [1, V]. Returns whether the text goes on; errors are the caller's."""
        try:
            text = self.ids[:, : self.length]
            scores = self.process(text, logits.to(text.device, torch.float32))
            if self.samples:
                token = torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator)
            else:
                token = scores.argmax(dim=-1, keepdim=True)
            self.ids[:, self.length : self.length + 1] = token
            self.length += 1
            ends = bool(self.stops(self.ids[:, : self.length], None))
            self.outbox.put(int(token))
        except Exception as error:
            self.outbox.put(error)
            return False
        if ends:
            self.outbox.put(None)
        return not ends


class SharedBatch:
    """A model's batch, and the thread that runs it while there is something to do.

    Args:
        model: a `FathomForCausalLM`.
        max_rows: most texts at a time; others wait, and the first come is served first.
        max_cached_tokens: most columns of the cache, times rows, that texts may come to need; a text that needs more
            runs alone.
        prefill_chunk: prompt tokens read between two steps, which bounds how long running texts pause for new ones.
    """

    def __init__(self, model, max_rows: int = 8, max_cached_tokens: int = 65536, prefill_chunk: int = 256):
        for name, value in (
            ("max_rows", max_rows),
            ("max_cached_tokens", max_cached_tokens),
            ("prefill_chunk", prefill_chunk),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.model = model
        self.max_rows = max_rows
        self.max_cached_tokens = max_cached_tokens
        self.prefill_chunk = prefill_chunk
        # Shared with the callers, under the lock.
        self._lock = threading.Lock()
        self._waiting: deque[Row] = deque()
        self._thread: threading.Thread | None = None
        self._closed = False
        # The thread's own.
        self._joining: list[Row] = []
        self._rows: list[Row] = []
        self._cache: FathomDynamicCache | None = None

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
        )

    def generate(self, row: Row, streamer=None) -> torch.Tensor:
        """Runs in the caller's thread: waits for the row's tokens, streams them, and returns the whole text [1, L].

        However it ends, by an error of the streamer's too, the row leaves the batch before the next step.

        Raises:
            RuntimeError: the batch was closed, or a forward of all rows failed.
            Exception: what the row's own logits processors, stopping criteria or streamer raised.
        """
        with self._lock:
            if self._closed:
                raise failure(CLOSED)
            self._waiting.append(row)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fathom-shared-batch", daemon=True)
                self._thread.start()
        try:
            while (item := row.outbox.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                if streamer is not None:
                    streamer.put(torch.tensor([item]))
        finally:
            row.cancelled = True
        if streamer is not None:
            streamer.end()
        return row.ids[:, : row.length].clone()

    def close(self) -> None:
        """Ends all texts with an error, and the thread; later calls of `generate()` run apart."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if self.model.shared_batch is self:
            self.model.shared_batch = None
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._admit():
                self._read_prompts()
                self._step()
        except Exception as error:
            with self._lock:
                self._thread = None
                self._fail_all(FAILED, error)

    def _admit(self) -> bool:
        """Lets rows that nobody waits for go, and others in. Returns False, which ends the thread, if none is left."""
        self._leave([row for row in self._rows if row.cancelled])
        self._joining = [row for row in self._joining if not row.cancelled]
        with self._lock:
            if self._closed:
                self._fail_all(CLOSED)
            while self._waiting and (self._waiting[0].cancelled or self._fits(self._waiting[0])):
                row = self._waiting.popleft()
                if not row.cancelled:
                    self._joining.append(row)
            if self._rows or self._joining:
                return True
            self._thread = None
            return False

    def _fits(self, row: Row) -> bool:
        present = [*self._rows, *self._joining]
        columns = max(other.most for other in (*present, row))
        count = len(present) + 1
        return not present or (count <= self.max_rows and count * columns <= self.max_cached_tokens)

    def _read_prompts(self) -> None:
        """Reads the next tokens of prompts, every one alone; those that are read become rows."""
        budget = self.prefill_chunk
        while self._joining and budget:
            row = self._joining[0]
            chunk = slice(row.cached, row.cached + budget)
            try:
                ids = row.prompt[:, chunk]
                logits = self._forward(row.cache, ids, row.positions[:, chunk])
            except Exception as error:
                row.outbox.put(error)
                self._joining.remove(row)
                continue
            row.cached += ids.shape[1]
            budget -= ids.shape[1]
            if row.cached == row.prompt.shape[1]:
                self._joining.remove(row)
                if row.take(logits):
                    self._join(row)

    def _join(self, row: Row) -> None:
        if self._cache is None:
            self._cache = row.cache
        else:
            self._cache.batch_append(row.cache)
        del row.cache
        self._rows.append(row)

    def _step(self) -> None:
        """One more token for every row."""
        rows = self._rows
        if not rows:
            return
        ids = torch.cat([row.ids[:, row.length - 1 : row.length] for row in rows])
        # A row's positions go on from those of its prompt.
        generated = [row.cached + 1 - row.prompt.shape[1] for row in rows]
        positions = torch.cat([row.positions[:, -1:] for row in rows])
        positions = positions + torch.tensor(generated, device=positions.device)[:, None]
        lengths = [row.cached + 1 for row in rows]
        columns, mask = max(lengths), None
        if min(lengths) < columns:
            begins = columns - torch.tensor(lengths, device=self.model.device)
            mask = (torch.arange(columns, device=self.model.device) >= begins[:, None]).long()
        try:
            logits = self._forward(self._cache, ids, positions, mask)
        except Exception as error:
            for row in rows:
                row.outbox.put(failure(FAILED, error))
            self._rows, self._cache = [], None
            return
        for row in rows:
            row.cached += 1
        self._leave([row for index, row in enumerate(rows) if not row.take(logits[index : index + 1])])

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

    def _leave(self, leaving: list[Row]) -> None:
        """Takes rows out of the batch, and with them what the cache holds for them alone."""
        if not leaving:
            return
        staying = [index for index, row in enumerate(self._rows) if row not in leaving]
        columns = max(row.cached for row in self._rows)
        self._rows = [self._rows[index] for index in staying]
        if self._cache is None or not staying:
            self._cache = None
            return
        self._cache.batch_select_indices(torch.tensor(staying))
        self._cache.drop_oldest(columns - max(row.cached for row in self._rows))

    def _fail_all(self, reason: str, cause: BaseException | None = None) -> None:
        for row in (*self._rows, *self._joining, *self._waiting):
            row.outbox.put(failure(reason, cause))
        self._rows, self._joining, self._cache = [], [], None
        self._waiting.clear()


def failure(reason: str, cause: BaseException | None = None) -> RuntimeError:
    """An exception for one row: raising writes into it, so that threads cannot share one."""
    error = RuntimeError(reason if cause is None else f"{reason}: {cause}")
    error.__cause__ = cause
    return error

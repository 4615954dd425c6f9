"""How the server generates: a thread per request, whose call of `generate()` is a row of the model's shared batch.

transformers gives a model one thread, in which calls run one after another; its parts are open, and a manager runs
whatever `submit` is given. Whatever happens in a request's thread, of any kind, ends that request: its stream gets an
error, its future an exception, which here is always an `Exception` (others would end the server's event loop).
"""

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from fastapi import HTTPException
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    DirectStreamer,
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    _StreamError,
)
from transformers.generation import StoppingCriteriaList

from ...modeling.batch_rows import Cancellation, SharedBatchFull
from ...modeling.modeling_fathom import FathomForCausalLM
from .checks import check_config, fit_into_context
from .requests import current


class SharingManager(GenerateManager):
    """Generates for one model.

    Args:
        limits: of the model's `SharedBatch`.
    """

    def __init__(self, limits: dict[str, int]):
        super().__init__()
        self.limits = limits
        self.shares = False
        self.model: FathomForCausalLM | None = None
        self.threads: set[threading.Thread] = set()

    def generate_streaming(self, model, processor, inputs, gen_config, request_id, response_parser=None):
        inputs = self._prepare(model, inputs, gen_config)
        if not self.shares:
            return super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue = asyncio.Queue()
        tokenizer = getattr(processor, "tokenizer", processor).backend_tokenizer
        streamer = DirectStreamer(tokenizer, loop, pieces, response_parser=response_parser)

        def put(piece: _StreamError | None) -> None:
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def call() -> None:
            try:
                model.generate(**inputs, streamer=streamer, generation_config=gen_config, tokenizer=processor)
            except _GenerationCancelled:
                pass
            except BaseException as error:
                # transformers pastes it into a JSON string.
                put(_StreamError(json.dumps(str(error) or type(error).__name__)[1:-1]))
            finally:
                put(None)

        current().add(streamer)
        self.submit(call)
        return pieces, streamer

    async def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
        inputs = self._prepare(model, inputs, gen_config)
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except SharedBatchFull as error:
            raise HTTPException(status_code=429, detail=str(error), headers={"Retry-After": "1"}) from error
        except ValueError as error:
            raise HTTPException(status_code=400, detail=str(error)) from error

    def _prepare(self, model, inputs, gen_config) -> dict[str, Any]:
        """Lets the model share a batch, checks the request, and has its text cancelled when the request is over."""
        # A model that nobody asked for some time is loaded anew.
        self.shares = isinstance(model, FathomForCausalLM)
        if self.shares:
            self.model = model
            batch = model.shared_batch or model.share_batch(**self.limits)
            check_config(gen_config)
            context = min(model.config.max_position_embeddings, batch.max_cached_tokens)
            fit_into_context(gen_config, inputs["input_ids"].shape[-1], context)
        cancellation = Cancellation()
        current().add(cancellation)
        return {**inputs, "stopping_criteria": StoppingCriteriaList([cancellation])}

    def submit(self, fn: Callable, *args: Any, **kwargs: Any) -> Future:
        if not self.shares:
            return super().submit(fn, *args, **kwargs)
        future: Future = Future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:
                future.set_exception(RuntimeError(f"{type(error).__name__}: {error}"))
            finally:
                self.threads.discard(threading.current_thread())

        thread = threading.Thread(target=call, name="fathom-request", daemon=True)
        self.threads.add(thread)
        try:
            thread.start()
        except BaseException:
            self.threads.discard(thread)
            raise
        return future

    def async_submit(self, fn: Callable, *args: Any, **kwargs: Any) -> asyncio.Future:
        if not self.shares:
            return super().async_submit(fn, *args, **kwargs)
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))


class SharingState(GenerationState):
    """Gives every model a `SharingManager`."""

    def __init__(self, limits: dict[str, int]):
        super().__init__()
        self.limits = limits
        self.managers: dict[str, SharingManager] = {}

    def get_manager(self, model_id: str, use_cb: bool = False) -> BaseGenerateManager:
        if model_id not in self.managers:
            self.managers[model_id] = SharingManager(self.limits)
        return self.managers[model_id]

    def close(self, seconds: float) -> bool:
        """Ends all texts and the threads that generate them. Returns whether they have ended within the time."""
        threads = [thread for manager in self.managers.values() for thread in manager.threads]
        for manager in self.managers.values():
            if manager.model is not None and manager.model.shared_batch is not None:
                # It waits for the forward that runs.
                thread = threading.Thread(target=manager.model.shared_batch.close, daemon=True)
                thread.start()
                threads.append(thread)
        for thread in threads:
            thread.join(seconds / len(threads))
        return not any(thread.is_alive() for thread in threads)

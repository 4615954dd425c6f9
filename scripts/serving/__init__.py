"""transformers' server, put together so that requests to a Fathom model share its forwards.

`transformers serve` gives a model one thread, in which calls of `generate()` run one after another. Its parts are open:
`build_server` takes the handlers of the endpoints, these take what says which manager generates, and a manager runs
whatever `submit` is given. Here that is a thread per request, and the model's calls share a batch (`share_batch`).
Models of other classes are served as transformers serves them.

Imported by `fathom serve` once it is known that fathom-lm[serve] is installed.
"""

import asyncio
import threading
from concurrent.futures import Future
from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import BaseGenerateManager, GenerateManager, GenerationState

from ...modeling.modeling_fathom import FathomForCausalLM
from .prompts import PlainTextModelManager


class SharingManager(GenerateManager):
    """Generates for one model.

    Args:
        limits: of the model's `SharedBatch`.
    """

    def __init__(self, limits: dict[str, int]):
        super().__init__()
        self.limits = limits
        self.shares = False

    def generate_streaming(self, model, *args, **kwargs):
        self._share(model)
        return super().generate_streaming(model, *args, **kwargs)

    async def generate_non_streaming(self, model, *args, **kwargs):
        self._share(model)
        return await super().generate_non_streaming(model, *args, **kwargs)

    def _share(self, model) -> None:
        # A model that nobody asked for some time is loaded anew.
        self.shares = isinstance(model, FathomForCausalLM)
        if self.shares and model.shared_batch is None:
            model.share_batch(**self.limits)

    def submit(self, fn, *args, **kwargs) -> Future:
        if not self.shares:
            return super().submit(fn, *args, **kwargs)
        future: Future = Future()

        def call() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except Exception as error:
                future.set_exception(error)

        threading.Thread(target=call, name="fathom-request", daemon=True).start()
        return future

    def async_submit(self, fn, *args, **kwargs) -> asyncio.Future:
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


class SeededRequests:
    """Hands a request's seed on to its row. transformers seeds the whole process, for all requests that run."""

    def _build_generation_config(self, body: dict, *args, **kwargs):
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if body.get("seed") is not None:
            config.seed = body["seed"]
        return config


class ChatRequests(SeededRequests, ChatCompletionHandler):
    pass


class TextRequests(SeededRequests, CompletionHandler):
    pass


def build_app(model: str | None, limits: dict[str, int]) -> Any:
    """The application that uvicorn serves.

    Args:
        model: the only one, loaded at once; None: whatever requests name.
        limits: of a `SharedBatch`.
    """
    manager, state = PlainTextModelManager(force_model=model), SharingState(limits)
    return build_server(
        manager,
        ChatRequests(manager, state),
        completion_handler=TextRequests(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state),
        generation_state=state,
    )

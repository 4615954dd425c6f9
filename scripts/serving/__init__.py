"""transformers' server, put together so that requests to a Fathom model share its forwards.

    requests    limits, and what ends with a request       checks      what a request may ask for
    generating  a request as a row of a shared batch        __init__    transformers' handlers and application

`build_server` of transformers takes the handlers of the endpoints, and these take what says which manager generates.
Models of other classes are served as transformers serves them.

Imported by `fathom serve` once it is known that fathom-lm[serve] is installed.
"""

from dataclasses import dataclass
from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler

from ...modeling.modeling_fathom import FathomForCausalLM
from .checks import check_body, check_length
from .generating import SharingState
from .prompts import PlainTextModelManager
from .requests import RequestLimits


class CheckedRequests:
    """Hands a request's seed on to its row, and checks its texts before they are tokenized.

    transformers seeds the whole process, for all requests that run.
    """

    def _build_generation_config(self, body: dict, *args, **kwargs):
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if body.get("seed") is not None:
            config.seed = body["seed"]
        return config

    def _resolve_model(self, body: dict):
        resolved = super()._resolve_model(body)  # type: ignore[misc]
        _, model, processor = resolved
        if isinstance(model, FathomForCausalLM):
            check_body(body)
            check_length(body, processor, model.config.max_position_embeddings)
        return resolved


class ChatRequests(CheckedRequests, ChatCompletionHandler):
    pass


class TextRequests(CheckedRequests, CompletionHandler):
    pass


class ResponseRequests(CheckedRequests, ResponseHandler):
    pass


class DecisionRequests(CheckedRequests, SystemOneHandler):
    pass


@dataclass(frozen=True)
class Service:
    """The application that uvicorn serves, and what has to end with it."""

    app: RequestLimits
    state: SharingState

    def close(self, seconds: float) -> bool:
        """Ends all requests. Returns whether their threads have ended within the time."""
        self.app.end_all()
        return self.state.close(seconds)


def build_service(model: str | None, limits: dict[str, int], max_body: int = 2**22) -> Service:
    """The server.

    Args:
        model: the only one, loaded at once; None: whatever requests name.
        limits: of a `SharedBatch`, `max_rows` and `max_waiting` among them.
        max_body: most bytes of a request.
    """
    manager, state = PlainTextModelManager(force_model=model), SharingState(limits)
    app = build_server(
        manager,
        ChatRequests(manager, state),
        completion_handler=TextRequests(manager, state),
        response_handler=ResponseRequests(manager, state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=DecisionRequests(manager, state),
        generation_state=state,
    )
    return Service(RequestLimits(app, limits["max_rows"] + limits["max_waiting"], max_body), state)


def build_app(model: str | None, limits: dict[str, int]) -> Any:
    """The application of `build_service` alone."""
    return build_service(model, {"max_rows": 8, "max_waiting": 64, **limits}).app

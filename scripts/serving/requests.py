"""Limits of a server's requests, and what a request that ends leaves behind: nothing.

An ASGI middleware around the whole application. It reads a request's body itself, at most so many bytes in so many
seconds, and then watches the connection while the application answers. Whatever the handlers start for a request is put
down in `current()` and cancelled when the request is over: answered, given up by the client before its first token or
between two, closed without having been read, or ended by the server's own end. transformers' handlers notice a client
that leaves only while they stream to it.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Protocol

BODY_SECONDS = 30.0  # for a client to send a body

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class Request:
    """What was started for one request, and is cancelled at its end."""

    def __init__(self) -> None:
        self._started: list[Cancellable] = []
        self._over = False

    def add(self, started: Cancellable) -> None:
        """Has `started` cancelled when the request is over; at once if it is."""
        if self._over:
            started.cancel()
        else:
            self._started.append(started)

    def end(self) -> None:
        self._over = True
        started, self._started = self._started, []
        for each in started:
            each.cancel()


_CURRENT: ContextVar[Request | None] = ContextVar("fathom_request", default=None)


def current() -> Request:
    """The request that is being handled; outside of one a request that never ends."""
    return _CURRENT.get() or Request()


class RequestLimits:
    """The middleware.

    Args:
        app: the ASGI application.
        max_requests: most POST requests at a time; further ones are answered with 429.
        max_body: most bytes of a body; larger ones are answered with 413.
    """

    def __init__(self, app: Any, max_requests: int, max_body: int) -> None:
        self.app = app
        self.max_requests = max_requests
        self.max_body = max_body
        self.running: set[Request] = set()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if len(self.running) >= self.max_requests:
            message = f"{self.max_requests} requests are being answered or wait, as many as may; try again later"
            await refuse(send, 429, message, [(b"retry-after", b"1")])
            return
        request = Request()
        self.running.add(request)
        try:
            await self.handle(request, scope, receive, send)
        finally:
            self.running.discard(request)
            request.end()

    async def handle(self, request: Request, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self.read_body(scope, receive), BODY_SECONDS)
        except TooLarge:
            await refuse(send, 413, f"the request's body has more than {self.max_body} bytes, which is the limit")
            return
        except TimeoutError:
            await refuse(send, 408, f"the request's body did not arrive within {BODY_SECONDS:.0f} seconds")
            return
        except ConnectionError:
            return
        gone, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            request.end()

        async def replay() -> Message:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        _CURRENT.set(request)
        watcher = asyncio.create_task(watch())
        try:
            await self.app(scope, replay, send)
        finally:
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher

    async def read_body(self, scope: Message, receive: Receive) -> bytes:
        """The whole body.

        Raises:
            TooLarge: it is, or says that it will be.
            ConnectionError: the client left.
        """
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self.max_body:
            raise TooLarge
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message.get("body", b"")
            if len(body) > self.max_body:
                raise TooLarge
            if not message.get("more_body"):
                return bytes(body)

    def end_all(self) -> None:
        """Ends all requests: what was started for them is cancelled."""
        for request in list(self.running):
            request.end()


class TooLarge(Exception):
    pass


async def refuse(send: Send, status: int, message: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Answers with an error object as OpenAI's API has it."""
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

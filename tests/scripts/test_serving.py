"""The application of `fathom serve` under clients that ask too much, send too much, or leave.

Every request is sent straight to the application, as a server would, so that a client can leave at any moment.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from generations import save_with_tokenizer

from fathom.training.checkpoints import load_model, load_tokenizer

pytest.importorskip("uvicorn", reason="needs fathom-lm[serve]")

from fathom.modeling.continuous_batching import SharedBatch
from fathom.modeling.modeling_fathom import FathomForCausalLM
from fathom.scripts.serving import Service, build_service
from fathom.scripts.serving import requests as serving_requests

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
LIMITS = {"max_rows": 4, "max_waiting": 60, "max_cached_tokens": 4096}
CONTEXT = 256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    save_with_tokenizer(path, "v3")
    return path


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    from transformers.cli.serving import model_manager

    model_manager.transformers.FathomForCausalLM = FathomForCausalLM
    built = build_service(str(folder), LIMITS, max_body=20000)
    try:
        yield built
    finally:
        assert built.close(30)


class Client:
    """One request: what it got, and a connection that it can close."""

    def __init__(self, service: Service, path: str, body: dict | bytes, reads: bool = True) -> None:
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.left = asyncio.Event()
        self.reads = reads
        self.asked = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
            "scheme": "http",
        }
        self.task = asyncio.create_task(service.app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.reads:
            await self.left.wait()
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            self.parts.append(message["body"])

    @property
    def text(self) -> str:
        return b"".join(self.parts).decode()

    async def answer(self) -> "Client":
        await asyncio.wait_for(self.task, 60)
        return self

    async def until(self, condition: Callable[[], bool]) -> None:
        await until(condition)

    async def leave(self) -> None:
        self.left.set()
        await asyncio.wait_for(self.task, 3)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        await asyncio.sleep(0.005)


def run(conversation: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(conversation, 120))


def chat(text: str = "What is 2 * 2?", **settings: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **settings}


def request_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fathom-request"]


async def idle(service: Service) -> None:
    """Soon nothing of any request is left: no row, no thread, no request."""
    batch = shared_batch(service)
    await until(lambda: batch._calls == 0 and batch._thread is None and not request_threads(), 3)
    assert not service.app.running


def shared_batch(service: Service) -> SharedBatch:
    (manager,) = service.state.managers.values()
    assert manager.model is not None
    assert manager.model.shared_batch is not None
    return manager.model.shared_batch


async def slowed(service: Service, seconds: float = 0.05) -> SharedBatch:
    """After a first answer, every forward takes so long: texts last for seconds."""
    first = await Client(service, CHAT, chat(max_tokens=1)).answer()
    assert first.status == 200, first.text
    batch = shared_batch(service)
    batch.model.register_forward_pre_hook(lambda *args: time.sleep(seconds))
    return batch


# What a request asks for.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, {"max_tokens": 4}),
        (TEXT, {"prompt": "", "max_tokens": 4}),
        (TEXT, {"prompt": "x " * 300}),
        (TEXT, {"prompt": "def", "max_tokens": 0}),
        (TEXT, {"prompt": "def", "max_tokens": -3}),
        (CHAT, chat("x " * 300)),
        (CHAT, chat(max_tokens=0)),
        (CHAT, chat(stop=["x"] * 3000)),
        (CHAT, chat(stop="x" * 10000)),
        (CHAT, chat(stop=[""])),
        (CHAT, chat(chat_template_kwargs={"chat_template": "{% for i in range(10**8) %}{% endfor %}"})),
        (CHAT, chat(chat_template_kwargs={"tokenizer_kwargs": {}})),
        (CHAT, chat(chat_template_kwargs=["thinking"])),
        *[
            (CHAT, chat(generation_config=json.dumps(config)))
            for config in (
                {"num_beams": 2},
                {"num_beams": 2, "do_sample": True},
                {"num_return_sequences": 3, "do_sample": True},
                {"num_beams": 4, "num_beam_groups": 2},
                {"penalty_alpha": 0.6, "top_k": 4},
                {"dola_layers": "low"},
                {"max_length": 10**9},
            )
        ],
        (RESPONSES, {"input": "x " * 300}),
    ],
    ids=lambda each: json.dumps(each)[:60] if isinstance(each, dict) else each.split("/")[2],
)
def test_what_is_no_row_is_refused_before_anything_is_generated(
    service: Service, path: str, body: dict, stream: bool
) -> None:
    async def conversation() -> None:
        batch = await slowed(service, 0)
        forwards: list[Any] = []
        batch.model.register_forward_pre_hook(lambda *args: forwards.append(args))
        refused = await Client(service, path, {**body, "stream": stream}).answer()
        assert refused.status == 400, (refused.status, refused.text)
        assert len(refused.text) > 30
        assert not forwards
        await idle(service)
        assert (await Client(service, CHAT, chat(max_tokens=4)).answer()).status == 200

    run(conversation())


@pytest.mark.parametrize("given", [{}, {"max_tokens": 10**6}, {"max_tokens": 250}], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_new_tokens_are_clipped_to_the_context(service: Service, given: dict, stream: bool) -> None:
    async def conversation() -> None:
        body = chat("x " * 60, stream=stream, **given)
        answer = await Client(service, CHAT, body).answer()
        assert answer.status == 200, answer.text
        last = answer.text.strip().splitlines()[-1].removeprefix("data: ")
        usage = json.loads(last)["usage"]
        assert usage["total_tokens"] == CONTEXT
        assert json.loads(last)["choices"][0]["finish_reason"] == "length"

    run(conversation())


@pytest.mark.parametrize("stored", [{"num_beams": None}, {"use_cache": False}, {"use_mtp": True}], ids=str)
def test_a_folders_own_options_that_no_row_has_do_not_matter(service: Service, folder: Path, stored: dict) -> None:
    """A cache that is off, drafts and the like change no text; requests are rows all the same."""

    async def conversation() -> None:
        batch = await slowed(service, 0)
        for name, value in stored.items():
            setattr(batch.model.generation_config, name, value)
        answer = await Client(service, CHAT, chat(max_tokens=8)).answer()
        assert answer.status == 200, answer.text
        model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
        messages = chat()["messages"]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        text = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert json.loads(answer.text)["choices"][0]["message"]["content"] == tokenizer.decode(text)

    run(conversation())


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def conversation() -> None:
        await slowed(service, 0)
        from transformers import PreTrainedTokenizerBase

        monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", None)
        refused = await Client(service, CHAT, chat("x" * 15000)).answer()
        assert refused.status == 400
        assert "shorten it" in refused.text

    monkeypatch.setattr("fathom.scripts.serving.check_body", lambda *args: None)
    run(conversation())


# How much is sent, and by how many.


@pytest.mark.parametrize("said", [True, False], ids=["announced", "unannounced"])
def test_a_body_that_is_too_large_is_refused(service: Service, said: bool) -> None:
    async def conversation() -> None:
        sent = 0

        async def receive() -> dict[str, Any]:
            nonlocal sent
            sent += 5000
            return {"type": "http.request", "body": b"x" * 5000, "more_body": True}

        answers: list[Any] = []

        async def send(message: Any) -> None:
            answers.append(message)

        headers = [(b"content-length", b"300000000")] if said else []
        await service.app({"type": "http", "method": "POST", "path": CHAT, "headers": headers}, receive, send)
        assert answers[0]["status"] == 413
        assert "20000 bytes" in answers[1]["body"].decode()
        assert sent <= 25000 * (not said)

    run(conversation())


def test_a_body_that_does_not_come_is_not_waited_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_requests, "BODY_SECONDS", 0.1)

    async def conversation() -> None:
        answers: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async def send(message: Any) -> None:
            answers.append(message)

        await service.app({"type": "http", "method": "POST", "path": CHAT, "headers": []}, receive, send)
        assert answers[0]["status"] == 408
        assert not service.app.running

    run(conversation())


def test_more_requests_than_may_wait_are_told_to_come_later(service: Service) -> None:
    """And the others are answered."""

    async def conversation() -> None:
        await slowed(service, 0.001)
        clients = [Client(service, CHAT, chat(max_tokens=12, stream=n % 2 == 0)) for n in range(90)]
        for client in clients:
            await client.answer()
        statuses = [client.status for client in clients]
        assert statuses == [200] * 64 + [429] * 26
        refused = clients[-1]
        assert refused.headers["retry-after"] == "1"
        assert "try again later" in json.loads(refused.text)["error"]["message"]
        await idle(service)
        assert (await Client(service, CHAT, chat(max_tokens=2)).answer()).status == 200

    run(conversation())


# Who leaves.


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
@pytest.mark.parametrize("when", ["at once", "before the first token", "in the middle", "without reading"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_who_leaves_takes_the_row_along(service: Service, path: str, when: str, stream: bool) -> None:
    async def conversation() -> None:
        batch = await slowed(service)
        text = {CHAT: chat(), TEXT: {"prompt": "def"}, RESPONSES: {"input": "def"}}[path]
        client = Client(service, path, {**text, "stream": stream}, reads=when != "without reading")
        if when == "before the first token":
            await until(lambda: batch._calls == 1)
        elif when != "at once":
            await until(lambda: any(row.length > row.prompt.shape[1] + 5 for row in batch._rows))
        await client.leave()
        await idle(service)

    run(conversation())


def test_fifty_that_leave_at_once_leave_nothing_behind(service: Service) -> None:
    """Streams whose generator was never started, and whole answers, more than there are rows."""

    async def conversation() -> None:
        batch = await slowed(service)
        clients = [Client(service, CHAT, chat(stream=n % 2 == 0), reads=False) for n in range(50)]
        await until(lambda: batch._calls == 50)
        for client in clients:
            client.left.set()
        await asyncio.gather(*(client.answer() for client in clients))
        await idle(service)
        assert (await Client(service, CHAT, chat(max_tokens=2)).answer()).status == 200

    run(conversation())


@pytest.mark.parametrize(
    "greedy_one",
    [chat(max_tokens=10**6), chat("x " * 110, max_tokens=10**6), chat(max_tokens=10**6, stream=True)],
    ids=["endless", "long", "stream"],
)
def test_one_client_does_not_keep_the_others_out(service: Service, greedy_one: dict) -> None:
    async def conversation() -> None:
        batch = await slowed(service, 0.03)
        large = [Client(service, CHAT, greedy_one) for _ in range(3)]
        await until(lambda: len(batch._rows) == 3)
        for _ in range(3):
            small = await Client(service, CHAT, chat(max_tokens=3)).answer()
            assert small.status == 200
        assert not any(client.task.done() for client in large)
        for client in large:
            await client.leave()
        await idle(service)

    run(conversation())


# What goes wrong.


class Panic(BaseException):
    """As pyo3 makes of a panic in Rust: no `Exception`."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, Panic, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["generate", "_run"])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_whatever_happens_every_client_gets_an_end(
    service: Service, monkeypatch: pytest.MonkeyPatch, place: str, kind: type[BaseException], path: str
) -> None:
    """An error of any kind, in the request's thread or in the batch's; and the next request is answered."""

    async def conversation() -> None:
        batch = await slowed(service, 0)

        def fails(*args: Any, **kwargs: Any) -> None:
            raise kind('a "fault" of its own')

        text = {CHAT: chat(), TEXT: {"prompt": "def"}, RESPONSES: {"input": "def"}}[path]
        with monkeypatch.context() as patch:
            if place == "generate":
                patch.setattr(batch.model, "generate", fails)
            else:
                patch.setattr(batch, "_read_prompts", fails)
            whole = Client(service, path, {**text, "stream": False})
            stream = Client(service, path, {**text, "stream": True})
            with pytest.raises(Exception, match=r"a .*fault.* of its own"):
                await whole.answer()
            await stream.answer()
        assert "fault" in stream.text
        if path != RESPONSES:
            last = stream.text.strip().splitlines()[-1].removeprefix("data: ")
            assert 'a "fault" of its own' in json.loads(last)["error"]
        await idle(service)
        assert (
            await Client(service, path, {**text, "max_tokens": 2} if path != RESPONSES else text).answer()
        ).status == 200

    run(conversation())

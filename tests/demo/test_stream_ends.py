"""A streamed answer ends: with an error of any kind, without a prompt, and with whoever no longer waits for it."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fathom.demo.generation import chat_prompt, raw_prompt, stream
from fathom.demo.sampling import Sampling
from fathom.modeling.continuous_batching import SharedBatch
from fathom.training.errors import UserError

GREEDY = Sampling(max_new_tokens=10, temperature=0)
ENDLESS = Sampling(max_new_tokens=4000, temperature=0)


@pytest.fixture
def batch(model: Any) -> Iterator[SharedBatch]:
    """One row at a time; every forward takes some milliseconds."""
    hook = model.register_forward_hook(lambda *_: time.sleep(0.01))
    shared = model.share_batch(max_rows=1, max_waiting=2)
    yield shared
    shared.close()
    hook.remove()


def idle(batch: SharedBatch) -> bool:
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        names = [thread.name for thread in threading.enumerate()]
        if batch._calls == 0 and "fathom-generate" not in names and "fathom-shared-batch" not in names:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("end", ["close", "stop"])
@pytest.mark.parametrize("when", ["waiting", "reading", "answering"])
def test_who_leaves_takes_the_row_along(model: Any, tokenizer: Any, batch: SharedBatch, when: str, end: str) -> None:
    prompt = raw_prompt(tokenizer, "the")
    other = stream(model, tokenizer, prompt, ENDLESS) if when == "waiting" else None
    if other is not None:
        while next(other).new_tokens < 2:
            pass
    stop = threading.Event()
    running = stream(model, tokenizer, prompt * (1000 if when == "reading" else 1), ENDLESS, stop)
    progress = next(running)
    while when == "answering" and progress.new_tokens < 5:
        progress = next(running)
    if when != "answering":
        assert progress.new_tokens == 0
    if end == "close":
        running.close()
    else:
        stop.set()
        *_, last = running
        assert last.finish == "stopped"
        assert last.new_tokens < 1000
    if other is not None:
        seen = next(other).new_tokens
        while next(other).new_tokens < seen + 3:
            pass
        other.close()
    assert idle(batch)


def test_more_answers_than_may_wait_are_told_to_come_later(model: Any, tokenizer: Any, batch: SharedBatch) -> None:
    prompt = raw_prompt(tokenizer, "the")
    running = [stream(model, tokenizer, prompt, ENDLESS) for _ in range(3)]
    for each in running:
        next(each)
    deadline = time.monotonic() + 5
    while batch._calls < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(UserError, match="try again later"):
        list(stream(model, tokenizer, prompt, GREEDY))
    for each in running:
        each.close()
    assert idle(batch)


class Panic(BaseException):
    """As pyo3 makes of a panic in Rust: no `Exception`."""


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("kind", [Panic, SystemExit, KeyboardInterrupt, MemoryError])
def test_an_error_of_any_kind_reaches_the_consumer_as_an_exception(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], shared: bool
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise kind("a fault")

    prompt = raw_prompt(tokenizer, "the")
    if shared:
        model.share_batch()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", fails)
        with pytest.raises(Exception, match="a fault"):
            list(stream(model, tokenizer, prompt, GREEDY))
    *_, last = stream(model, tokenizer, prompt, GREEDY)
    assert last.new_tokens == 10
    if shared:
        model.shared_batch.close()


def test_beams_that_a_checkpoint_stores_are_not_streamed(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would never end the stream."""
    prompt = raw_prompt(tokenizer, "the")
    *_, expected = stream(model, tokenizer, prompt, GREEDY)
    monkeypatch.setattr(model.generation_config, "num_beams", 3)
    *_, last = stream(model, tokenizer, prompt, GREEDY)
    assert last.text == expected.text


def test_an_empty_prompt_is_said_to_be_one(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template may render nothing, and a tokenizer may have no begin-of-sentence token."""
    monkeypatch.setattr(tokenizer, "chat_template", "{% if false %}x{% endif %}")
    with pytest.raises(UserError, match="the chat template renders nothing"):
        chat_prompt(tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(UserError, match="the prompt is empty"):
        list(stream(model, tokenizer, [], GREEDY))

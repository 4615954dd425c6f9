"""What goes wrong in a shared batch: it ends the call that it belongs to, no other one, and never the batch.

The oracle of every text is `generate()` of the same call without a shared batch.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from generations import GENERATIONS, model, tokens
from sharing import GREEDY, PROMPTS, Listener, sharing, start, threads, until
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from fathom.modeling import continuous_batching
from fathom.modeling.batch_rows import Cancellation, Group

every_generation = pytest.mark.parametrize("generation", GENERATIONS)
LONG = {**GREEDY, "max_new_tokens": 200}


class Panic(BaseException):
    """As pyo3 makes of a panic in Rust: no `Exception`."""


KINDS = [ZeroDivisionError, Panic, SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, MemoryError]
every_kind = pytest.mark.parametrize("kind", KINDS)


class Failing(LogitsProcessor):
    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 40:
            raise self.kind("a processor of one's own")
        return scores


class Stubborn(StoppingCriteria):
    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] > 14:
            raise self.kind("a criterion of one's own")
        return torch.zeros(1, dtype=torch.bool)


class Outcome:
    """A call in a thread of its own, whose pool would be ended by exceptions that are no `Exception`."""

    def __init__(self, ours, prompt: torch.Tensor, **settings: Any) -> None:
        self.text: torch.Tensor | None = None
        self.error: BaseException | None = None
        self.call = lambda: ours.generate(prompt, **settings)
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.text = self.call()
        except BaseException as error:
            self.error = error

    def wait(self) -> "Outcome":
        self.thread.join(60)
        assert not self.thread.is_alive(), "the call hangs"
        return self


def together(ours, shared, calls: list[dict[str, Any]]) -> list[Outcome]:
    batch, forwards = shared
    forwards.gate.clear()
    outcomes = [Outcome(ours, **call) for call in calls]
    until(lambda: batch._calls == len(calls))
    forwards.gate.set()
    return [outcome.wait() for outcome in outcomes]


@every_kind
def test_what_a_call_brings_fails_that_call_alone(kind: type[BaseException]) -> None:
    ours = model("v2")
    expected = [ours.generate(prompt, **GREEDY) for prompt in (PROMPTS[0], PROMPTS[4])]
    listener = Listener()
    listener.put = lambda value: (_ for _ in ()).throw(kind("a streamer of one's own"))  # type: ignore[method-assign]
    calls: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0]},
        {"prompt": PROMPTS[1], "logits_processor": LogitsProcessorList([Failing(kind)])},
        {"prompt": PROMPTS[2], "stopping_criteria": StoppingCriteriaList([Stubborn(kind)])},
        {"prompt": PROMPTS[4]},
    ]
    with sharing(ours) as shared:
        for _ in range(2):
            outcomes = together(ours, shared, [{**GREEDY, **call} for call in calls])
            for index, text in ((0, expected[0]), (3, expected[1])):
                assert outcomes[index].text is not None
                assert torch.equal(outcomes[index].text, text)
            for index in (1, 2):
                assert type(outcomes[index].error) is kind
                assert "of one's own" in str(outcomes[index].error)


@every_kind
def test_a_streamer_that_raises_leaves_the_batch(kind: type[BaseException]) -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    failing = Listener()
    put = failing.put

    def raises(value: torch.Tensor) -> None:
        put(value)
        if len(failing.parts) > 3:
            raise kind("a streamer of one's own")

    failing.put = raises  # type: ignore[method-assign]
    with sharing(ours) as shared:
        calls = [{"prompt": PROMPTS[1], "streamer": failing, **LONG}, {"prompt": PROMPTS[0], **GREEDY}]
        outcomes = together(ours, shared, calls)
        assert type(outcomes[0].error) is kind
        assert outcomes[1].text is not None
        assert torch.equal(outcomes[1].text, expected)
        until(lambda: not threads())
        assert len(shared[1].shapes) < 60


def test_a_token_that_there_is_not_fails_its_own_call() -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    with sharing(ours) as shared:
        calls = [{"prompt": torch.tensor([[5, 1000, 7]]), **GREEDY}, {"prompt": PROMPTS[0], **GREEDY}]
        outcomes = together(ours, shared, calls)
        assert isinstance(outcomes[0].error, IndexError)
        assert outcomes[1].text is not None
        assert torch.equal(outcomes[1].text, expected)


@every_kind
@every_generation
def test_after_a_failed_forward_of_several_rows_each_goes_on_alone(generation: str, kind: type[BaseException]) -> None:
    """Whatever the forward left in their cache, they get the texts that each gets alone."""
    ours = model(generation)
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS[:4]]
    failed = 0

    def fails(module, args, kwargs, output) -> None:
        nonlocal failed
        if kwargs["input_ids"].shape == (3, 1) and failed < 2:
            failed += 1
            raise kind("out of memory")

    with sharing(ours, max_rows=3) as shared:
        hook = ours.register_forward_hook(fails, with_kwargs=True)
        calls = start(ours, shared, PROMPTS[:4], **GREEDY)
        for call, text in zip(calls, expected, strict=True):
            assert torch.equal(call.result(60), text)
        hook.remove()
    assert failed >= 1


def test_a_row_whose_forwards_fail_fails_alone() -> None:
    """Its token is the one that no forward can take."""
    ours = model("v3")
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS[:3]]
    others = {*expected[0][0].tolist(), *expected[2][0].tolist(), *PROMPTS[1][0].tolist()}
    bad = next(token for token in expected[1][0, -20:-5].tolist() if token not in others)

    def fails(module, args, kwargs) -> None:
        if (kwargs["input_ids"] == bad).any():
            raise ValueError("cannot be read")

    with sharing(ours) as shared:
        hook = ours.register_forward_pre_hook(fails, with_kwargs=True)
        outcomes = together(ours, shared, [{"prompt": prompt, **GREEDY} for prompt in PROMPTS[:3]])
        hook.remove()
    assert str(outcomes[1].error) == "cannot be read"
    for index in (0, 2):
        assert outcomes[index].text is not None
        assert torch.equal(outcomes[index].text, expected[index])


@pytest.mark.parametrize("change", ["join", "leave", "split"])
@every_kind
def test_after_a_failed_change_of_a_cache_each_row_goes_on_alone(
    monkeypatch: pytest.MonkeyPatch, change: str, kind: type[BaseException]
) -> None:
    ours, failed = model("v4"), 0
    new = {**GREEDY, "max_new_tokens": [20, 25, 30, 35]}
    prompts = [tokens(1, length) for length in (60, 5, 7, 9)]
    expected = [
        ours.generate(prompt, **{**GREEDY, "max_new_tokens": count})
        for prompt, count in zip(prompts, new["max_new_tokens"], strict=True)
    ]
    original = getattr(Group, change)

    def fails(self, rows):
        nonlocal failed
        result = original(self, rows)
        if failed < 2:
            failed += 1
            raise kind("out of memory")
        return result

    monkeypatch.setattr(Group, change, fails)
    with sharing(ours, max_rows=4, max_cached_tokens=230) as shared:
        for call, text in zip(start(ours, shared, prompts, **new), expected, strict=True):
            assert torch.equal(call.result(60), text)
    assert failed


@every_kind
@pytest.mark.parametrize("place", ["_admit", "_read_prompts", "_make_room", "_step"])
def test_whatever_ends_the_thread_ends_all_calls_and_not_the_next(place: str, kind: type[BaseException]) -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    with sharing(ours, max_rows=2) as shared:
        batch, count = shared[0], 0
        original = getattr(batch, place)

        def fails(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 4:
                raise kind("a fault of the batch's own")
            return original(*args)

        setattr(batch, place, fails)
        for outcome in together(ours, shared, [{"prompt": prompt, **LONG} for prompt in PROMPTS[:4]]):
            assert isinstance(outcome.error, RuntimeError)
            assert "the shared batch failed: a fault of the batch's own" in str(outcome.error)
            assert type(outcome.error.__cause__) is kind
        outcome = Outcome(ours, PROMPTS[0], **GREEDY).wait()
        assert outcome.text is not None
        assert torch.equal(outcome.text, expected)
        assert batch._calls == 0


def test_a_thread_that_dies_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even its last handler ran. Callers notice, and the next call starts another thread."""
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    monkeypatch.setattr(continuous_batching, "POLL", 0.05)
    with sharing(ours, max_rows=2) as shared:
        batch, forwards = shared
        for place in ("_make_room", "_end"):
            monkeypatch.setattr(batch, place, lambda *args: (_ for _ in ()).throw(MemoryError()))
        monkeypatch.setattr(threading, "excepthook", lambda args: None)
        forwards.gate.clear()
        outcomes = [Outcome(ours, prompt, **LONG) for prompt in PROMPTS[:3]]
        until(lambda: bool(batch._joining))
        thread = batch._thread
        forwards.gate.set()
        for outcome in outcomes:
            assert "the shared batch failed" in str(outcome.wait().error)
        monkeypatch.undo()
        assert not thread.is_alive()
        outcome = Outcome(ours, PROMPTS[0], **GREEDY).wait()
        assert outcome.text is not None
        assert torch.equal(outcome.text, expected)


def test_a_thread_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    with sharing(ours) as shared:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no new thread")))
            with pytest.raises(RuntimeError, match="no new thread"):
                ours.generate(PROMPTS[1], **GREEDY)
        assert torch.equal(ours.generate(PROMPTS[0], **GREEDY), expected)
        assert shared[0]._calls == 0


# An empty prompt, and a stream of what is no growing text, fail before anything shared is touched.


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0), (3, 0)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_mtp": True},
        {"num_beams": 2},
        {"do_sample": True},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@every_generation
def test_an_empty_prompt_is_refused(generation: str, shared: bool, settings: dict, shape: tuple[int, int]) -> None:
    ours = model(generation)
    entered: list[Any] = []
    hook = ours.register_forward_pre_hook(lambda *args: entered.append(args))
    if shared:
        ours.share_batch()
    with pytest.raises(ValueError, match=r"the prompt is empty: input_ids has shape .*; every row needs at least one"):
        ours.generate(torch.empty(shape, dtype=torch.long), max_new_tokens=3, pad_token_id=0, **settings)
    hook.remove()
    assert not entered
    if ours.shared_batch is not None:
        assert ours.shared_batch._thread is None
        ours.shared_batch.close()


@pytest.mark.parametrize("shape", [(1, 0, 64), (0, 3, 64)], ids=str)
def test_empty_embeddings_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="the prompt is empty: inputs_embeds"):
        model("v3").generate(inputs_embeds=torch.empty(shape), max_new_tokens=3, pad_token_id=0)


def test_embeddings_alone_and_no_prompt_at_all_are_no_empty_prompts() -> None:
    ours = model("v3")
    embeds = ours.model.embed_tokens(PROMPTS[0])
    assert ours.generate(inputs_embeds=embeds, **GREEDY).shape == (1, 20)
    assert ours.generate(bos_token_id=5, **GREEDY)[0, 0] == 5


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"num_beams": 2, "do_sample": True}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
def test_a_stream_of_beams_is_refused(shared: bool, settings: dict) -> None:
    """transformers would never end it."""
    ours = model("v3")
    if shared:
        ours.share_batch()
    with pytest.raises(ValueError, match=r"one growing text, .* leave the streamer or num_beams out"):
        ours.generate(PROMPTS[0], streamer=Listener(), **{**GREEDY, **settings})
    if ours.shared_batch is not None:
        ours.shared_batch.close()


# Rows that nobody waits for any more.


@every_generation
def test_a_call_can_be_cancelled_at_any_time(generation: str) -> None:
    """Before its prompt is read, while it is, and in the middle of its text; the others go on."""
    ours = model(generation)
    expected = ours.generate(PROMPTS[0], **GREEDY)
    cancellations = [Cancellation() for _ in range(4)]
    prompts = [PROMPTS[1], tokens(1, 200), PROMPTS[2], PROMPTS[3]]
    with sharing(ours, max_rows=3, prefill_chunk=8) as shared:
        batch, forwards = shared
        forwards.gate.clear()
        with ThreadPoolExecutor(6) as pool:
            calls = [
                pool.submit(ours.generate, prompt, stopping_criteria=[each], **LONG)
                for prompt, each in zip(prompts[:1], cancellations[:1], strict=True)
            ]
            until(lambda: len(batch._joining) == 1)
            for prompt, each in zip(prompts[1:], cancellations[1:], strict=True):
                calls.append(pool.submit(ours.generate, prompt, stopping_criteria=[each], **LONG))
            other = pool.submit(ours.generate, PROMPTS[0], **GREEDY)
            until(lambda: batch._calls == 5)
            cancellations[3].cancel()
            assert torch.equal(calls[3].result(60), prompts[3]), "before any forward"
            forwards.gate.set()
            until(lambda: any(0 < row.cached < 200 for row in batch._joining))
            cancellations[1].cancel()
            assert calls[1].result(60).shape[1] < 400
            until(lambda: bool(batch._rows))
            for each in cancellations:
                each.cancel()
            for call, prompt in zip(calls, prompts, strict=True):
                text = call.result(60)
                assert torch.equal(text[:, : prompt.shape[1]], prompt)
                assert text.shape[1] < prompt.shape[1] + 200
            assert torch.equal(other.result(60), expected)
        until(lambda: not threads())


def test_a_call_that_is_cancelled_beforehand_reads_nothing() -> None:
    ours, cancelled = model("v3"), Cancellation()
    cancelled.cancel()
    cancelled.cancel()
    with sharing(ours) as shared:
        assert torch.equal(ours.generate(PROMPTS[0], stopping_criteria=[cancelled], **LONG), PROMPTS[0])
        until(lambda: not threads())
        assert not shared[1].shapes


@pytest.mark.parametrize("settings", [{}, {"use_mtp": True}, {"use_cache": False}], ids=str)
def test_a_call_apart_is_cancelled_after_its_next_token(settings: dict) -> None:
    ours, cancelled = model("v3"), Cancellation()

    class Ends(Listener):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.parts) == 4:
                cancelled.cancel()

    text = ours.generate(PROMPTS[0], stopping_criteria=[cancelled], streamer=Ends(), **LONG, **settings)
    assert PROMPTS[0].shape[1] + 3 <= text.shape[1] <= PROMPTS[0].shape[1] + 8


def test_cancelled_texts_are_those_of_the_tokens_that_were_streamed() -> None:
    ours, cancelled = model("v3"), Cancellation()
    listener = Listener()
    with sharing(ours), ThreadPoolExecutor(1) as pool:
        call = pool.submit(ours.generate, PROMPTS[0], stopping_criteria=[cancelled], streamer=listener, **LONG)
        until(lambda: len(listener.parts) > 10)
        cancelled.cancel()
        text = call.result(60)
    assert text[0].tolist() == [token for part in listener.parts for token in part]
    assert listener.ended

"""Calls of `generate()` that share a batch give what each gives alone, and disturb each other in nothing.

The oracle is `generate()` of the same call without a shared batch.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generations import GENERATIONS, model, tokens
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, set_seed
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from fathom.modeling.continuous_batching import SharedBatch

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
PROMPTS = [tokens(1, length) for length in (5, 37, 11, 2, 24, 9)]
THREAD = "fathom-shared-batch"

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


class Forwards:
    """The shapes [B, T] of a model's forwards, and a gate before them."""

    def __init__(self, ours) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.hook = ours.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs) -> None:
        assert self.gate.wait(30)
        self.shapes.append(tuple(kwargs["input_ids"].shape))

    @property
    def rows(self) -> list[int]:
        return [rows for rows, _ in self.shapes]


@contextmanager
def sharing(ours, **limits: int) -> Iterator[tuple[SharedBatch, Forwards]]:
    forwards = Forwards(ours)
    batch = ours.share_batch(**limits)
    try:
        yield batch, forwards
    finally:
        forwards.gate.set()
        batch.close()
        forwards.hook.remove()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.001)


def start(ours, shared: tuple[SharedBatch, Forwards], prompts: list[torch.Tensor], **kwargs) -> list[Future]:
    """Calls of `generate()`, in this order in the queue, before the first forward. What differs stands in lists."""
    batch, forwards = shared
    forwards.gate.clear()
    pool, calls = ThreadPoolExecutor(len(prompts)), []
    for index, prompt in enumerate(prompts):
        own = {name: value[index] if isinstance(value, list) else value for name, value in kwargs.items()}
        calls.append(pool.submit(ours.generate, prompt, **own))
        until(lambda index=index: len(batch._waiting) + len(batch._joining) == index + 1)
    pool.shutdown(wait=False)
    forwards.gate.set()
    return calls


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


@every_generation
def test_texts_are_those_of_each_call_alone(generation: str) -> None:
    ours = model(generation)
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS]
    # Few rows and small pieces of prompts: most texts come to rows that are being continued.
    with sharing(ours, max_rows=3, prefill_chunk=7) as shared:
        calls = start(ours, shared, PROMPTS, **GREEDY)
        for call, text in zip(calls, expected, strict=True):
            assert torch.equal(call.result(60), text)
    assert max(shared[1].rows) == 3
    steps = [rows for rows, length in shared[1].shapes if length == 1]
    assert len(steps) < len(PROMPTS) * GREEDY["max_new_tokens"] / 2
    assert not threads(), "nothing is left to do"


@every_generation
def test_every_row_is_sampled_as_its_own_call_says(generation: str) -> None:
    ours = model(generation)
    settings = [
        {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.9},
        {"do_sample": True, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3},
        {"do_sample": False, "repetition_penalty": 1.2},
        {"do_sample": True, "top_k": 5, "min_new_tokens": 18, "eos_token_id": list(range(40, 60))},
        {"do_sample": True, "top_k": 0, "suppress_tokens": list(range(50))},
        {"do_sample": False, "eos_token_id": list(range(30, 97))},
    ]
    expected, configs = [], []
    for seed, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True)):
        configs.append(GenerationConfig(max_new_tokens=20, pad_token_id=0, seed=seed, **own))
        set_seed(seed)
        expected.append(ours.generate(prompt, generation_config=configs[-1]))
    with sharing(ours, max_rows=4) as shared:
        calls = start(ours, shared, PROMPTS, generation_config=configs)
        for call, text in zip(calls, expected, strict=True):
            assert torch.equal(call.result(60), text)


def test_draws_without_a_seed_differ_and_can_be_repeated() -> None:
    ours = model("v3")
    sampled = {**GREEDY, "do_sample": True}
    with sharing(ours):
        set_seed(1)
        texts = [ours.generate(PROMPTS[0], **sampled) for _ in range(2)]
        set_seed(1)
        again = [ours.generate(PROMPTS[0], **sampled) for _ in range(2)]
    assert not torch.equal(*texts)
    assert all(map(torch.equal, texts, again))


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    ours = model("v4")
    with sharing(ours, prefill_chunk=8) as shared:
        batch, forwards = shared
        forwards.gate.clear()
        with ThreadPoolExecutor(2) as pool:
            calls = [pool.submit(ours.generate, PROMPTS[3], **GREEDY)]
            until(lambda: bool(batch._joining))
            calls.append(pool.submit(ours.generate, PROMPTS[1], **GREEDY))
            until(lambda: bool(batch._waiting))
            forwards.gate.set()
            for call in calls:
                call.result(60)
    # After every piece of the long prompt, a step of the short one.
    assert forwards.shapes[:12] == [(1, 2), (1, 1), *[(1, 8), (1, 1)] * 4, (1, 5), (2, 1)]


def test_rows_and_cached_tokens_have_a_limit() -> None:
    ours = model("v3")
    lengths = [prompt.shape[1] + GREEDY["max_new_tokens"] for prompt in PROMPTS]
    # Room for the second, the longest, and two shorter ones beside it.
    with sharing(ours, max_rows=5, max_cached_tokens=3 * max(lengths)) as shared:
        calls = start(ours, shared, PROMPTS, **GREEDY)
        for call in calls:
            call.result(60)
        assert max(shared[1].rows) == 3
    # What does not fit at all runs alone.
    with sharing(ours, max_rows=5, max_cached_tokens=max(lengths) - 1) as shared:
        calls = start(ours, shared, PROMPTS[:3], **GREEDY)
        expected = [call.result(60) for call in calls]
        assert shared[1].rows == [1] * len(shared[1].rows)
    assert all(torch.equal(ours.generate(p, **GREEDY), text) for p, text in zip(PROMPTS, expected, strict=False))


class Listener:
    """A streamer that keeps what it is given, and may raise at a token."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.parts: list[list[int]] = []
        self.ended = False
        self.fails_at = fails_at

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value.flatten().tolist())
        if len(self.parts) - 1 == self.fails_at:
            raise ConnectionError("nobody listens")

    def end(self) -> None:
        self.ended = True


def test_tokens_are_streamed_one_by_one() -> None:
    ours = model("v3")
    listeners = [Listener(), Listener()]
    with sharing(ours) as shared:
        calls = start(ours, shared, PROMPTS[:2], streamer=listeners, **GREEDY)
        for call, listener, prompt in zip(calls, listeners, PROMPTS, strict=False):
            text = call.result(60)
            assert listener.parts == [prompt[0].tolist(), *([token] for token in text[0, prompt.shape[1] :].tolist())]
            assert listener.ended


def test_whoever_stops_listening_leaves_at_once() -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    long = {**GREEDY, "max_new_tokens": [20, 200]}
    with sharing(ours) as shared:
        calls = start(ours, shared, PROMPTS[:2], streamer=[Listener(), Listener(fails_at=3)], **long)
        with pytest.raises(ConnectionError, match="nobody listens"):
            calls[1].result(60)
        assert torch.equal(calls[0].result(60), expected)
        until(lambda: not threads())
        # A step may have run before the thread saw it; not the 197 that were left.
        assert len(shared[1].shapes) < 60


class Failing(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 40:
            raise ZeroDivisionError("a processor of one's own")
        return scores


class Stubborn(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 14:
            raise LookupError("a criterion of one's own")
        return torch.zeros(1, dtype=torch.bool)


def test_an_error_of_one_is_nobody_elses() -> None:
    ours = model("v2")
    expected = [ours.generate(prompt, **GREEDY) for prompt in (PROMPTS[0], PROMPTS[4])]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[2], torch.tensor([[5, 1000, 7]]), PROMPTS[4]]
    none, failing, stubborn = (
        LogitsProcessorList(),
        LogitsProcessorList([Failing()]),
        StoppingCriteriaList([Stubborn()]),
    )
    with sharing(ours) as shared:
        calls = start(
            ours,
            shared,
            prompts,
            logits_processor=[none, failing, none, none, none],
            stopping_criteria=[None, None, stubborn, None, None],
            **GREEDY,
        )
        for call, kind in zip(calls[1:4], (ZeroDivisionError, LookupError, IndexError), strict=True):
            with pytest.raises(kind):
                call.result(60)
        assert torch.equal(calls[0].result(60), expected[0])
        assert torch.equal(calls[4].result(60), expected[1])


def test_a_failed_step_ends_its_rows_and_not_the_batch() -> None:
    ours = model("v3")
    broken = threading.Event()

    def breaks(module, args, kwargs) -> None:
        if broken.is_set() and len(kwargs["input_ids"]) == 2:
            raise torch.OutOfMemoryError("out of memory")

    hook = ours.register_forward_pre_hook(breaks, with_kwargs=True)
    with sharing(ours, max_rows=2) as shared:
        broken.set()
        calls = start(ours, shared, PROMPTS[:3], **GREEDY)
        for call in calls[:2]:
            with pytest.raises(RuntimeError, match="a forward of the shared batch failed: out of memory"):
                call.result(60)
        hook.remove()
        assert torch.equal(calls[2].result(60), ours.generate(PROMPTS[2], **GREEDY))


def test_closing_ends_texts_and_the_thread() -> None:
    ours = model("v4")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    with sharing(ours, max_rows=2) as shared:
        calls = start(ours, shared, PROMPTS[:4], **{**GREEDY, "max_new_tokens": 150})
        until(lambda: 2 in shared[1].rows)
        shared[0].close()
        for call in calls:
            with pytest.raises(RuntimeError, match="the shared batch was closed"):
                call.result(60)
        assert not threads()
        assert ours.shared_batch is None
        assert torch.equal(ours.generate(PROMPTS[0], **GREEDY), expected)


@pytest.mark.parametrize(
    "apart",
    [
        {"num_beams": 2},
        {"use_mtp": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"inputs": torch.cat((tokens(1, 9), tokens(2, 9)[1:]))},
        {"attention_mask": (torch.arange(9) > 3).long()[None]},
    ],
    ids=lambda apart: next(iter(apart)),
)
def test_what_cannot_be_a_row_is_generated_apart(apart: dict) -> None:
    ours = model("v3")
    call = {**GREEDY, "inputs": tokens(1, 9), **apart}
    expected = ours.generate(**call)
    with sharing(ours) as shared:
        entered: list[Any] = []
        shared[0].generate = lambda *args: entered.append(args)  # type: ignore[method-assign]
        text = ours.generate(**call)
        assert not entered
    if apart.get("return_dict_in_generate"):
        expected, text = expected.sequences, text.sequences
    assert torch.equal(text, expected)


def test_a_cache_of_the_callers_is_filled() -> None:
    ours = model("v3")
    with sharing(ours):
        cache = DynamicCache(config=ours.config)
        text = ours.generate(PROMPTS[0], cache=cache, **GREEDY)
        assert cache.get_seq_length() == text.shape[1] - 1
        more = ours.generate(torch.cat((text, PROMPTS[3]), dim=1), cache=cache, **GREEDY)
    assert torch.equal(more, ours.generate(torch.cat((text, PROMPTS[3]), dim=1), **GREEDY))


def test_a_cache_of_the_callers_gets_no_other_rows() -> None:
    ours = model("v3")
    caches = [DynamicCache(config=ours.config), None]
    with sharing(ours) as shared, ThreadPoolExecutor(2) as pool:
        shared[1].gate.clear()
        calls = [
            pool.submit(ours.generate, prompt, cache=cache, **GREEDY)
            for prompt, cache in zip(PROMPTS, caches, strict=False)
        ]
        until(lambda: bool(shared[0]._joining))
        shared[1].gate.set()
        lengths = [call.result(60).shape[1] for call in calls]
    assert caches[0] is not None
    assert caches[0].layers[0].keys.shape[0] == 1
    assert caches[0].get_seq_length() == lengths[0] - 1


def test_the_modes_of_callers_are_their_own() -> None:
    ours = model("v4")
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS[:2]]

    def call(prompt: torch.Tensor, mode) -> torch.Tensor:
        with mode:
            return ours.generate(prompt.clone(), **GREEDY)

    with sharing(ours), ThreadPoolExecutor(2) as pool:
        texts = list(pool.map(call, PROMPTS, [torch.inference_mode(), torch.enable_grad()]))
    assert all(map(torch.equal, texts, expected))


def test_a_copy_of_the_model_shares_no_batch() -> None:
    ours = model("v3")
    ours.share_batch()
    copied = copy.deepcopy(ours)
    assert copied.shared_batch is None
    assert torch.equal(copied.generate(PROMPTS[0], **GREEDY), ours.generate(PROMPTS[0], **GREEDY))


def test_positions_go_on_from_those_of_the_prompt() -> None:
    ours = model("classic")
    own = {**GREEDY, "position_ids": torch.arange(5)[None] + 7}
    expected = ours.generate(PROMPTS[0], **own)
    assert not torch.equal(expected, ours.generate(PROMPTS[0], **GREEDY))
    with sharing(ours) as shared:
        calls = start(ours, shared, PROMPTS[:2], position_ids=[own["position_ids"], None], **GREEDY)
        assert torch.equal(calls[0].result(60), expected)


@pytest.mark.parametrize("limit", ["max_rows", "max_cached_tokens", "prefill_chunk"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit}=0 must be at least 1"):
        model("v3").share_batch(**{limit: 0})

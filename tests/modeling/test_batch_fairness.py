"""Who gets room in a shared batch: small texts pass large ones, none waits for ever, and memory has a limit.

The oracle of every text is `generate()` of the same call without a shared batch.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from generations import GENERATIONS, model, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sharing import GREEDY, PROMPTS, sharing, start, until
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import StoppingCriteriaList

from fathom.modeling import continuous_batching
from fathom.modeling.batch_rows import Row, SharedBatchFull
from fathom.modeling.cache import empty_cache
from fathom.modeling.continuous_batching import SharedBatch

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


@contextmanager
def watching(ours, batch: SharedBatch) -> Iterator[list[int]]:
    """Cached tokens, with padding and those about to be read, before every forward."""
    held: list[int] = []

    def look(module, args, kwargs) -> None:
        held.append(
            sum(row.cached for row in batch._joining)
            + sum(len(group.rows) * group.columns for group in batch._groups)
            + kwargs["input_ids"].numel()
        )

    hook = ours.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield held
    finally:
        hook.remove()


@every_generation
def test_an_endless_text_keeps_nobody_out(generation: str) -> None:
    """Room is what a row has, not what its `max_length` may come to."""
    ours = model(generation)
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS]
    with sharing(ours, max_rows=4, max_cached_tokens=4096) as shared:
        calls = start(ours, shared, [PROMPTS[0], *PROMPTS], max_new_tokens=[10**6] + [20] * 6, **but(GREEDY))
        for call, text in zip(calls[1:], expected, strict=True):
            assert torch.equal(call.result(60), text)
        assert not calls[0].done()
        assert len(shared[1].shapes) < 150
    with pytest.raises(RuntimeError, match="closed"):
        calls[0].result(60)


def but(these: dict[str, Any], name: str = "max_new_tokens") -> dict[str, Any]:
    return {key: value for key, value in these.items() if key != name}


@every_generation
def test_lengths_that_differ_much_continue_in_groups(generation: str) -> None:
    """Padded to one length they would need four times the room there is."""
    ours = model(generation)
    prompts = [tokens(1, 150), *(tokens(1, length) for length in (4, 6, 5, 7))]
    expected = [ours.generate(prompt, **GREEDY) for prompt in prompts]
    limit = 150 + 20 + 4 * (7 + 20) + 4
    with sharing(ours, max_rows=5, max_cached_tokens=limit, prefill_chunk=32) as shared:
        with watching(ours, shared[0]) as held:
            calls = start(ours, shared, prompts, **GREEDY)
            for call, text in zip(calls, expected, strict=True):
                assert torch.equal(call.result(60), text)
        assert max(held) <= limit + 32
        assert max(shared[1].rows) >= 3


@every_generation
def test_rows_that_outgrow_the_room_are_read_again(generation: str) -> None:
    """They are let in as they are, and cannot all become as long as they do."""
    ours, preempted = model(generation), []
    prompts = [tokens(1, length) for length in (5, 7, 9, 11)]
    long = {**GREEDY, "max_new_tokens": 120}
    expected = [ours.generate(prompt, **long) for prompt in prompts]
    limit = 330
    with sharing(ours, max_rows=4, max_cached_tokens=limit) as shared:
        batch = shared[0]
        restart = batch._restart
        batch._restart = lambda rows: (preempted.extend(rows), restart(rows))  # type: ignore[method-assign]
        with watching(ours, batch) as held:
            calls = start(ours, shared, prompts, **long)
            for call, text in zip(calls, expected, strict=True):
                assert torch.equal(call.result(60), text)
    assert preempted
    assert len(preempted) <= 2 * len(prompts)
    assert max(held) <= limit + 4


def test_a_draw_is_the_same_after_a_row_was_read_again() -> None:
    ours = model("v3")
    configs = [
        GenerationConfig(**{**GREEDY, "do_sample": True, "top_k": 0, "max_new_tokens": 100, "seed": seed})
        for seed in (1, 2, 3)
    ]
    prompts = [tokens(1, length) for length in (5, 7, 9)]
    texts = []
    for limit in (10000, 200):
        with sharing(ours, max_cached_tokens=limit) as shared:
            texts.append([call.result(60) for call in start(ours, shared, prompts, generation_config=configs)])
    assert all(map(torch.equal, *texts))
    assert not torch.equal(texts[0][0][:, 5:], texts[0][1][:, 7:])


def test_a_text_larger_than_the_room_ends_with_an_error() -> None:
    ours = model("v3")
    expected = ours.generate(PROMPTS[0], **GREEDY)
    with sharing(ours, max_cached_tokens=60) as shared:
        with pytest.raises(ValueError, match="the prompt has 61 tokens, more than max_cached_tokens=60"):
            ours.generate(tokens(1, 61), **GREEDY)
        calls = start(ours, shared, [PROMPTS[1], PROMPTS[0]], max_new_tokens=[10**6, 20], **but(GREEDY))
        with pytest.raises(RuntimeError, match="the text has reached max_cached_tokens=60"):
            calls[0].result(60)
        assert torch.equal(calls[1].result(60), expected)
    # Just large enough: the last token is never cached.
    with sharing(ours, max_cached_tokens=5 + 20 - 1):
        assert torch.equal(ours.generate(PROMPTS[0], **GREEDY), expected)


def test_the_room_is_at_least_the_models_context() -> None:
    ours = model("v3")
    assert ours.share_batch().max_cached_tokens == 65536
    ours.config.max_position_embeddings = 100000
    assert ours.share_batch().max_cached_tokens == 100000
    assert ours.share_batch(max_cached_tokens=50).max_cached_tokens == 50
    assert ours.shared_batch is not None
    ours.shared_batch.close()


def row(length: int, new: int) -> Row:
    limits = GenerationConfig(max_length=length + new)
    positions = torch.arange(length)[None]
    cache = empty_cache(model("v3").config)
    return Row(tokens(1, length), positions, cache, LogitsProcessorList(), StoppingCriteriaList(), limits)


@pytest.mark.parametrize("patience", [continuous_batching.PATIENCE, 3])
def test_a_large_text_is_not_kept_out_for_ever_by_small_ones(monkeypatch, patience: int) -> None:
    """180 of 190 tokens do not fit beside a small row. There always is one: another comes before one leaves."""
    monkeypatch.setattr(continuous_batching, "PATIENCE", patience)
    batch = SharedBatch(model("v3"), max_rows=4, max_cached_tokens=190)
    batch._waiting = [row(10, 10), row(10, 10)]
    batch._admit()
    large = row(170, 10)
    batch._waiting.append(large)
    passed = 0
    while large not in batch._joining:
        batch._waiting.append(row(10, 10))
        batch._admit()
        passed += 1
        assert passed < 100, "small texts keep the large one out"
        if small := [each for each in batch._joining if each is not large]:
            small[0].cancelled = True
    assert passed >= patience, "it had to wait, but no longer than that"
    assert passed <= patience + 6
    # Whoever waited behind it is let in again.
    large.cancelled = True
    batch._admit()
    assert len(batch._joining) == 4 or not batch._waiting


def test_small_texts_pass_a_large_one_that_waits_for_another_large_one() -> None:
    """Whoever comes later does not make the waiting one wait longer."""
    ours = model("v3")
    with sharing(ours, max_rows=4, max_cached_tokens=300) as shared:
        batch, forwards = shared
        forwards.gate.clear()
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(ours.generate, tokens(1, 100), **{**GREEDY, "max_new_tokens": 10**6})
            until(lambda: bool(batch._joining))
            second = pool.submit(ours.generate, tokens(1, 200), **GREEDY)
            until(lambda: bool(batch._waiting))
            forwards.gate.set()
            for _ in range(3):
                ours.generate(tokens(1, 6), **{**GREEDY, "max_new_tokens": 2})
            assert not second.done()
            with pytest.raises(RuntimeError, match="has reached max_cached_tokens=300"):
                first.result(60)
            assert second.result(60).shape == (1, 220)


class First:
    """A streamer that notes who got a first token, in which order."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order, self.pieces = name, order, 0

    def put(self, value: torch.Tensor) -> None:
        self.pieces += 1
        if self.pieces == 2:  # the first is the prompt
            self.order.append(self.name)

    def end(self) -> None:
        pass


def test_short_prompts_are_read_beside_a_long_one() -> None:
    """The long one, which came first, gets half of the tokens between two steps; the short ones need not wait."""
    ours, order = model("v3"), []
    names = ["long", "short", "short", "short"]
    prompts = [tokens(1, 200), *[tokens(1, 5)] * 3]
    with sharing(ours, prefill_chunk=16) as shared:
        streamers = [First(name, order) for name in names]
        for call in start(ours, shared, prompts, streamer=streamers, **{**GREEDY, "max_new_tokens": 3}):
            call.result(60)
        read = [length for _, length in shared[1].shapes if length > 1]
    assert order == ["short", "short", "short", "long"]
    # Until the short ones are read, and from then on all of it.
    assert read.count(8) <= 4
    assert read.count(16) >= 200 // 16 - 4


def test_a_long_prompt_is_read_beside_ever_more_short_ones() -> None:
    ours, order = model("v3"), []
    names = ["long", *["short"] * 20]
    prompts = [tokens(1, 60), *[tokens(1, 16)] * 20]
    with sharing(ours, max_rows=21, prefill_chunk=16) as shared:
        streamers = [First(name, order) for name in names]
        for call in start(ours, shared, prompts, streamer=streamers, **{**GREEDY, "max_new_tokens": 2}):
            call.result(60)
    # 8 tokens of the long one between two steps, and as many of the short ones, of which some may come late.
    assert order.index("long") in range(1, 6)


def test_of_those_that_wait_there_is_a_limit() -> None:
    ours = model("v3")
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS]
    with sharing(ours, max_rows=2, max_waiting=3) as shared:
        shared[1].gate.clear()
        with ThreadPoolExecutor(5) as pool:
            calls = [pool.submit(ours.generate, prompt, **GREEDY) for prompt in PROMPTS[:5]]
            until(lambda: shared[0]._calls == 5)
            with pytest.raises(SharedBatchFull, match="max_rows=2 and max_waiting=3 allow; try again later"):
                ours.generate(PROMPTS[5], **GREEDY)
            shared[1].gate.set()
            for call, text in zip(calls, expected, strict=False):
                assert torch.equal(call.result(60), text)
        assert torch.equal(ours.generate(PROMPTS[5], **GREEDY), expected[5])


@pytest.mark.parametrize("generation", ["v3", "v4"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_texts_are_those_of_each_call_alone_whatever_the_limits(generation: str, data: st.DataObject) -> None:
    """Any lengths and any limits: the same texts, within the limit, and an end."""
    ours = model(generation)
    rows = data.draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=2, max_size=6))
    prompts = [tokens(1, length) for length, _ in rows]
    new = [count for _, count in rows]
    largest = max(length + count for length, count in rows)
    limit = data.draw(st.integers(largest, 4 * largest))
    chunk = data.draw(st.integers(1, 32))
    expected = [ours.generate(p, **{**GREEDY, "max_new_tokens": n}) for p, n in zip(prompts, new, strict=True)]
    with sharing(ours, max_rows=data.draw(st.integers(1, 6)), max_cached_tokens=limit, prefill_chunk=chunk) as shared:
        with watching(ours, shared[0]) as held:
            calls: list[Future] = start(ours, shared, prompts, max_new_tokens=new, **but(GREEDY))
            for call, text in zip(calls, expected, strict=True):
                assert torch.equal(call.result(60), text)
        assert max(held) <= limit + chunk

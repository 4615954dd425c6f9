"""Calls of `generate()` that share a batch give what each gives alone, and disturb each other in nothing.

The oracle is `generate()` of the same call without a shared batch.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from generations import GENERATIONS, model, tokens
from sharing import GREEDY, PROMPTS, Listener, sharing, start, threads, until
from transformers import DynamicCache, GenerationConfig, set_seed

every_generation = pytest.mark.parametrize("generation", GENERATIONS)


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


def test_the_number_of_rows_has_a_limit() -> None:
    ours = model("v3")
    expected = [ours.generate(prompt, **GREEDY) for prompt in PROMPTS]
    with sharing(ours, max_rows=3) as shared:
        calls = start(ours, shared, PROMPTS, **GREEDY)
        assert all(torch.equal(call.result(60), text) for call, text in zip(calls, expected, strict=True))
        assert max(shared[1].rows) == 3


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
        {"prompt_lookup_num_tokens": 3},
        {"assistant_early_exit": 2},
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


@pytest.mark.parametrize(
    "apart", [{"assistant_early_exit": 1}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}], ids=str
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_is_generated_apart_at_the_same_time_disturbs_no_row(generation: str, apart: dict) -> None:
    """transformers drafts for an early exit with fewer layers in the config, which may not be that of the others."""
    ours = model(generation)
    expected = [ours.generate(prompt, **GREEDY, **(apart if n < 2 else {})) for n, prompt in enumerate(PROMPTS)]
    layers = ours.config.num_hidden_layers
    with sharing(ours), ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            calls = [
                pool.submit(ours.generate, prompt, **GREEDY, **(apart if n < 2 else {}))
                for n, prompt in enumerate(PROMPTS)
            ]
            for call, text in zip(calls, expected, strict=True):
                assert torch.equal(call.result(60), text)
    assert ours.config.num_hidden_layers == layers


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


@pytest.mark.parametrize("limit", ["max_rows", "max_cached_tokens", "prefill_chunk", "max_waiting"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit}=0 must be at least 1"):
        model("v3").share_batch(**{limit: 0})

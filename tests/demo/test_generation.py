"""Streamed text is the text of `generate()`, and generation ends with whoever listens."""

import threading
import time
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, set_seed

from fathom.demo.generation import Reply, chat_prompt, raw_prompt, split_reasoning, stream, stream_reply
from fathom.demo.sampling import Sampling
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS
from fathom.training.errors import UserError

GREEDY = Sampling(max_new_tokens=60, temperature=0)
ENDLESS = Sampling(max_new_tokens=4000, temperature=0)


@pytest.fixture
def calls(model: Any) -> Any:
    """A list that grows by one with each forward pass."""
    seen: list[int] = []
    hook = model.register_forward_hook(lambda *_: seen.append(1))
    yield seen
    hook.remove()


def decoded(model: Any, tokenizer: Any, prompt: list[int], **kwargs: Any) -> str:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=tokenizer.pad_token_id, **kwargs)
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("sampling", "kwargs"),
    [
        (GREEDY, {"do_sample": False}),
        (Sampling(60, repetition_penalty=1.3, temperature=0), {"do_sample": False, "repetition_penalty": 1.3}),
        (
            Sampling(60, temperature=1.5, top_p=0.9, top_k=40),
            {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 40},
        ),
    ],
    ids=["greedy", "penalty", "sampled"],
)
def test_streamed_text_is_the_text_of_generate(model: Any, tokenizer: Any, sampling: Sampling, kwargs: dict) -> None:
    prompt = raw_prompt(tokenizer, "def double(x):")
    set_seed(3)
    expected = decoded(model, tokenizer, prompt, max_new_tokens=60, **kwargs)
    set_seed(3)
    *_, last = stream(model, tokenizer, prompt, sampling)
    assert last.text == expected


def test_any_causal_model_can_talk(tokenizer: Any) -> None:
    config = DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(config).eval()
    prompt = raw_prompt(tokenizer, "the quick")
    *_, last = stream(stock, tokenizer, prompt, Sampling(20, temperature=0))
    eos = tokenizer.eos_token_id
    assert last.text == decoded(stock, tokenizer, prompt, max_new_tokens=20, do_sample=False, eos_token_id=eos)


def test_text_only_grows_and_only_the_last_progress_is_final(model: Any, tokenizer: Any) -> None:
    seen = list(stream(model, tokenizer, raw_prompt(tokenizer, "the"), GREEDY))
    assert all(after.text.startswith(before.text) for before, after in pairwise(seen))
    assert [progress.finish for progress in seen[:-1]] == [None] * (len(seen) - 1)
    last = seen[-1]
    assert (last.finish, last.new_tokens, last.clipped) == ("length", 60, False)
    assert last.first_token_seconds is not None
    assert last.tokens_per_second == pytest.approx(59 / last.decode_seconds)


def test_the_end_of_sentence_ends_it(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = raw_prompt(tokenizer, "the")
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", greedy[9])
    *_, last = stream(model, tokenizer, prompt, GREEDY)
    assert (last.finish, last.new_tokens) == ("eos", greedy.index(greedy[9]) + 1)


def test_the_stop_event_ends_the_forward_passes(model: Any, tokenizer: Any, calls: list[int]) -> None:
    stop = threading.Event()
    running = stream(model, tokenizer, raw_prompt(tokenizer, "the"), ENDLESS, stop)
    while next(running).new_tokens < 5:
        pass
    before = len(calls)
    stop.set()
    *_, last = running
    assert last.finish == "stopped"
    assert last.new_tokens < 1000, "the model was asked for 4000 tokens"
    assert last.new_tokens == len(calls), "one forward pass per token"
    assert_quiet(calls)
    assert len(calls) >= before


def test_closing_the_consumer_ends_the_forward_passes(model: Any, tokenizer: Any, calls: list[int]) -> None:
    stop = threading.Event()
    running = stream(model, tokenizer, raw_prompt(tokenizer, "the"), ENDLESS, stop)
    while next(running).new_tokens < 5:
        pass
    running.close()
    assert stop.is_set()
    assert 5 <= len(calls) < 1000
    assert_quiet(calls)


def assert_quiet(calls: list[int]) -> None:
    before = len(calls)
    time.sleep(0.3)
    assert len(calls) == before, "the model went on for nobody"
    assert not [thread for thread in threading.enumerate() if thread.name == "fathom-generate"]


def test_a_silent_model_still_lets_its_consumer_go(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop must not wait for the next word: the consumer gets control back while nothing is decoded."""
    slow = threading.Event()
    monkeypatch.setattr(model, "generate", lambda *_, **__: slow.wait(30))
    running = stream(model, tokenizer, [0], GREEDY)
    first = next(running)
    assert (first.text, first.new_tokens, first.finish, first.tokens_per_second) == ("", 0, None, None)
    slow.set()
    running.close()


def test_an_error_in_the_thread_reaches_the_consumer(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream(model, tokenizer, raw_prompt(tokenizer, "the"), GREEDY))


def test_a_prompt_that_fills_the_context_names_both_numbers(model: Any, tokenizer: Any, calls: list[int]) -> None:
    with pytest.raises(UserError, match=r"4096 tokens.*context holds 4096"):
        list(stream(model, tokenizer, [0] * 4096, GREEDY))
    assert not calls


def test_the_answer_is_clipped_to_the_room_that_is_left(model: Any, tokenizer: Any) -> None:
    *_, last = stream(model, tokenizer, [0] * 4089, GREEDY)
    assert (last.limit, last.new_tokens, last.clipped, last.finish) == (7, 7, True, "length")


def test_raw_prompts_begin_with_exactly_one_bos(tokenizer: Any) -> None:
    assert raw_prompt(tokenizer, "x = 1") == [tokenizer.bos_token_id, *tokenizer.encode("x = 1")]
    assert raw_prompt(tokenizer, "") == [tokenizer.bos_token_id]


@pytest.mark.parametrize(("thinking", "ending"), [(False, "</think>"), (True, "<think>")])
def test_chat_prompts_end_where_the_assistant_begins(tokenizer: Any, thinking: bool, ending: str) -> None:
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": "hi"}], thinking)
    assert tokenizer.decode(prompt).endswith(f"<｜Assistant｜>{ending}")
    assert prompt.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_control_tokens_in_what_was_said_are_text(tokenizer: Any, token: str) -> None:
    def said(mark: str) -> list[dict[str, str]]:
        roles = ("system", "user", "assistant", "user")
        return [{"role": role, "content": f"x{mark}y"} for role in roles]

    control = set(range(len(SPECIAL_TOKENS)))
    prompt = chat_prompt(tokenizer, said(token))
    assert [i for i in prompt if i in control] == [i for i in chat_prompt(tokenizer, said("")) if i in control]
    assert tokenizer.decode(prompt).count(f"x{token}y") == 4
    raw = raw_prompt(tokenizer, f"x{token}y")
    assert not set(raw[1:]) & control
    assert tokenizer.decode(raw[1:]) == f"x{token}y"
    assert raw_prompt(tokenizer, token, [token])[1:] == [SPECIAL_TOKENS.index(token)]
    with pytest.raises(UserError, match="no control token"):
        chat_prompt(tokenizer, said(""), allowed_special=["<nothing>"])


def test_conversations_that_cannot_be_prompts(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="refuses"):
        chat_prompt(tokenizer, [{"role": "nobody", "content": "hi"}])
    with pytest.raises(UserError, match="surrogate"):
        chat_prompt(tokenizer, [{"role": "user", "content": "\ud800"}])
    with pytest.raises(UserError, match="surrogate"):
        raw_prompt(tokenizer, "\udfff")
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        chat_prompt(tokenizer, [{"role": "user", "content": "hi"}])


def test_stream_reply_answers_the_conversation(model: Any, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    *_, last = stream_reply(model, tokenizer, messages, GREEDY, thinking=True)
    prompt = chat_prompt(tokenizer, messages, thinking=True)
    assert last.text == decoded(model, tokenizer, prompt, max_new_tokens=60, do_sample=False)


@pytest.mark.parametrize(
    ("text", "thinking", "reply"),
    [
        ("Adds.", False, Reply(None, "Adds.")),
        ("It ad", True, Reply("It ad", "", reasoning_ended=False)),
        ("It adds.\n</think>\n\nAdds.", True, Reply("It adds.", "Adds.")),
        ("<think>It adds.</think>Adds.", False, Reply("It adds.", "Adds.")),
        ("a </think> b", False, Reply(None, "a </think> b")),
        ("</think>Adds.", True, Reply("", "Adds.")),
    ],
)
def test_reasoning_is_what_stands_before_the_end_of_thinking(text: str, thinking: bool, reply: Reply) -> None:
    assert split_reasoning(text, thinking) == reply


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_impossible_sampling_names_value_and_limit(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name}={value} must be"):
        Sampling(**{name: value})

"""Conversations as ids: only the template writes control tokens, whatever field they are written in."""

import copy

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.tokenizer import encode_chat, encode_text, train_tokenizer
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS

TOKENIZER = train_tokenizer(["What does `textwrap.dedent(text)` do? Remove the whitespace.\n" * 5], 300, 1024)
CONTROL = set(range(len(SPECIAL_TOKENS)))

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number", "enum": ["x", "y"]}}},
    },
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And then?"},
    {
        "role": "assistant",
        "content": "Let me see.",
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": "one", "b": ["two", {"c": "d"}]}}}
        ],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]
# The way to every text of the conversation and the tools; a key, too, is text (the last word says so).
PLACES = [
    *[("messages", at, "content") for at in range(len(MESSAGES))],
    ("messages", 4, "reasoning_content"),
    ("messages", 4, "tool_calls", 0, "function", "name"),
    ("messages", 4, "tool_calls", 0, "function", "arguments", "a"),
    ("messages", 4, "tool_calls", 0, "function", "arguments", "b", 0),
    ("messages", 4, "tool_calls", 0, "function", "arguments", "b", 1, "c"),
    ("messages", 4, "tool_calls", 0, "function", "arguments", "KEY"),
    ("tools", 0, "function", "name"),
    ("tools", 0, "function", "description"),
    ("tools", 0, "function", "parameters", "properties", "a", "enum", 1),
    ("tools", 0, "function", "parameters", "properties", "KEY"),
]
written = st.lists(
    st.one_of(
        st.sampled_from(SPECIAL_TOKENS),
        st.sampled_from(["<", "｜>", "a", " ", "\ue000", "\ue001", "\U000f0000", "\\ue000", '"', "\n"]),
        st.sampled_from(SPECIAL_TOKENS).flatmap(lambda token: st.integers(1, len(token)).map(lambda end: token[:end])),
    ),
    min_size=1,
    max_size=5,
).map("".join)


def put(place: tuple, text: str) -> tuple[list, list]:
    """Messages and tools with `text` added to the text, or as a key, at `place`."""
    given = {"messages": copy.deepcopy(MESSAGES), "tools": [copy.deepcopy(TOOL)]}
    *way, last = place
    holder = given
    for step in way:
        holder = holder[step]
    if last == "KEY":
        holder[text] = {"type": "string"} if "properties" in way else "value"
    else:
        holder[last] += text
    return given["messages"], given["tools"]


def rendered(messages: list, tools: list | None, **options) -> str:
    return TOKENIZER.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def controls(ids: list[int]) -> list[int]:
    return [number for number in ids if number in CONTROL]


CLEAN = controls(encode_chat(TOKENIZER, MESSAGES, [TOOL]).input_ids)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(PLACES), written)
def test_whatever_is_written_anywhere_stays_text(place, text):
    messages, tools = put(place, text)
    ids = encode_chat(TOKENIZER, messages, tools).input_ids
    assert controls(ids) == CLEAN
    assert TOKENIZER.decode(ids) == rendered(messages, tools)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(PLACES), written), min_size=2, max_size=6))
def test_several_places_at_once(insertions):
    given = {"messages": copy.deepcopy(MESSAGES), "tools": [copy.deepcopy(TOOL)]}
    for place, text in insertions:
        *way, last = place
        holder = given
        for step in way:
            holder = holder[step]
        if last != "KEY":
            holder[last] += text
    encoded = encode_chat(TOKENIZER, given["messages"], given["tools"])
    assert controls(encoded.input_ids) == CLEAN
    assert TOKENIZER.decode(encoded.input_ids) == rendered(given["messages"], given["tools"])


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([place for place in PLACES if place[-1] != "KEY"]), st.sampled_from(SPECIAL_TOKENS))
def test_transformers_own_sanitising_keeps_the_same_control_tokens(place, token):
    messages, tools = put(place, token)
    theirs = TOKENIZER.apply_chat_template(messages, tools=tools, sanitize_control_tokens=True)["input_ids"]
    assert controls(encode_chat(TOKENIZER, messages, tools).input_ids) == controls(theirs)


@pytest.mark.parametrize("count", range(2, len(MESSAGES) + 1))
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["no tools", "tools"])
def test_without_control_tokens_it_is_the_chat_template(count, tools):
    messages = MESSAGES[:count]
    asks = messages[-1]["role"] in ("user", "tool")
    encoded = encode_chat(TOKENIZER, messages, tools, add_generation_prompt=asks)
    theirs = TOKENIZER.apply_chat_template(
        messages, tools=tools, add_generation_prompt=asks, return_assistant_tokens_mask=True
    )
    assert encoded.input_ids == theirs["input_ids"]
    assert [int(answer > 0) for answer in encoded.answers] == theirs["assistant_masks"]


def learned(encoded, number: int) -> str:
    pairs = zip(encoded.input_ids, encoded.answers, strict=True)
    return TOKENIZER.decode([token for token, answer in pairs if answer == number])


def test_answers_are_numbered():
    encoded = encode_chat(TOKENIZER, MESSAGES)
    assert encoded.answer_count == 3
    parts = {number: learned(encoded, number) for number in (1, 2, 3)}
    assert parts[1] == "Because." + TOKENIZER.eos_token
    assert parts[2].startswith("Hm.</think>Let me see.<｜tool▁calls▁begin｜>")
    assert parts[3] == "It is 42." + TOKENIZER.eos_token


@settings(deadline=None, max_examples=50)
@given(st.sampled_from([("messages", at, "content") for at in (1, 2, 4, 6)]), written)
def test_the_mask_is_the_same_text_whatever_is_written(place, text):
    messages, tools = put(place, text)
    encoded = encode_chat(TOKENIZER, messages, tools)
    said = "".join(learned(encoded, number) for number in (1, 2, 3))
    inside = messages[place[1]]["content"] if messages[place[1]]["role"] == "assistant" else "It is 42."
    assert inside in said
    assert "Why?" not in said


def test_asked_for_by_name():
    messages = [{"role": "user", "content": "a<think>b</think>c"}]
    ids = encode_chat(TOKENIZER, messages, allowed_special=["<think>"], add_generation_prompt=True).input_ids
    assert [TOKENIZER.decode([number]) for number in controls(ids)][2:3] == ["<think>"]
    assert TOKENIZER.decode(ids) == rendered(messages, None, add_generation_prompt=True)


def test_text_between_control_tokens_is_encoded_as_a_whole():
    """Not apart at every token that was written: the ids are those of the text."""
    ids = encode_chat(TOKENIZER, [{"role": "user", "content": "the <think> whitespace"}]).input_ids
    assert ids[2:] == encode_text(TOKENIZER, "the <think> whitespace")


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content.split('</think>')[-1] }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content | trim }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m | tojson }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m | tojson(ensure_ascii=True) }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content[::-1] }}{% endfor %}",
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content.split('t') | join('|') }}{% endfor %}",
    ],
)
def test_other_templates_see_the_words_and_give_no_control_tokens(template):
    messages = [{"role": "user", "content": " a<think>b</think>c<|EOT|> "}]
    encoded = encode_chat(TOKENIZER, messages, chat_template=template)
    assert controls(encoded.input_ids) == [0, SPECIAL_TOKENS.index("<｜User｜>")]
    if "[::-1]" not in template:  # which turns the marks around, too
        assert TOKENIZER.decode(encoded.input_ids) == rendered(messages, None, chat_template=template)


def test_variables_and_roles_of_a_request_write_none():
    template = "{{ bos_token }}{{ today }}{% for m in messages %}<｜User｜>{{ m.role }}{{ m.content }}{% endfor %}"
    messages = [{"role": "user</think>", "content": "a"}]
    ids = encode_chat(TOKENIZER, messages, chat_template=template, today="<think>", bos_token="<|EOT|>").input_ids
    assert controls(ids) == [SPECIAL_TOKENS.index("<｜User｜>")]


def test_what_the_template_says_is_free_of_marks():
    with pytest.raises(jinja2.TemplateError) as error:
        encode_chat(TOKENIZER, [{"role": "x<think>", "content": "a"}])
    assert "has the role x<think>; known" in str(error.value)

"""Conversations as rows: a loss on what the assistant says, and on nothing else."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fathom.tokenizer import train_tokenizer
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS
from fathom.training.conversations import encode_conversations
from fathom.training.errors import UserError
from fathom.training.packing import IGNORED


@pytest.fixture
def tokenizer():
    return train_tokenizer(["question answer " * 3], 280, 32)


def conversations(*turns: tuple[str, str]) -> Dataset:
    """One conversation per pair of question and answer."""
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}
            for user, assistant in turns
        ]
    )


def test_targets_are_the_answer_and_its_end(tokenizer):
    (row,) = encode_conversations(conversations(("a question", "an answer")), tokenizer, 128).to_list()
    targets = [label for label in row["labels"] if label != IGNORED]
    assert tokenizer.decode(targets) == "an answer" + tokenizer.eos_token
    rest = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORED]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "a question"}], add_generation_prompt=True)
    assert rest == prompt["input_ids"]
    assert all(label in (token, IGNORED) for token, label in zip(row["input_ids"], row["labels"], strict=True))


def test_every_answer_of_a_longer_conversation_is_a_target(tokenizer):
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    (row,) = encode_conversations(Dataset.from_list([{"messages": messages}]), tokenizer, 256).to_list()
    targets = tokenizer.decode([label for label in row["labels"] if label != IGNORED])
    assert targets == f"first{tokenizer.eos_token}second{tokenizer.eos_token}"


def test_too_long_ones_are_left_out_without_a_warning(tokenizer, capfd):
    short, long = ("q", "a"), ("q" * 200, "a")
    rows = encode_conversations(conversations(short, long), tokenizer, 32)
    assert len(rows) == 1
    assert tokenizer.decode(rows[0]["input_ids"]).count("q") == 1
    assert "longer than" not in capfd.readouterr().err


def test_the_limit_is_inclusive(tokenizer):
    pair = conversations(("q", "a"))
    length = len(encode_conversations(pair, tokenizer, 128)[0]["input_ids"])
    assert len(encode_conversations(pair, tokenizer, length)) == 1
    with pytest.raises(UserError, match=rf"no conversation of 1 has at most {length - 1} tokens; raise --sequence"):
        encode_conversations(pair, tokenizer, length - 1)


def test_a_template_without_marks_is_refused(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"no \{% generation %\} marks"):
        encode_conversations(conversations(("q", "a")), tokenizer, 128)


def learned(row, tokenizer) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != IGNORED])


def test_messages_of_weight_0_are_read_and_not_learned(tokenizer):
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "WRONG", "weight": 0},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "right", "weight": 1},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "right too"},
    ]
    (row,) = encode_conversations(Dataset.from_list([{"messages": messages}]), tokenizer, 256).to_list()
    assert learned(row, tokenizer) == f"right{tokenizer.eos_token}right too{tokenizer.eos_token}"
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    assert row["input_ids"] == tokenizer.apply_chat_template(plain)["input_ids"]


def test_which_message_is_which_must_be_known(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}]
    (row,) = encode_conversations(Dataset.from_list(rows), tokenizer, 256).to_list()
    assert learned(row, tokenizer) == f"b{tokenizer.eos_token}" * 2
    rows[0]["messages"][1] = {"role": "assistant", "content": "b", "weight": 0}
    with pytest.raises(UserError, match="marks 4 parts of 2 assistant messages"):
        encode_conversations(Dataset.from_list(rows), tokenizer, 256)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_in_the_prompt(tokenizer, as_text):
    tools = [{"type": "function", "function": {"name": "f", "description": "Tells the weather.", "parameters": {}}}]
    row = {"messages": conversations(("a", "b"))[0]["messages"]}
    data = Dataset.from_list([{**row, "tools": json.dumps(tools) if as_text else tools}])
    (encoded,) = encode_conversations(data, tokenizer, 999).to_list()
    assert encoded["input_ids"] == tokenizer.apply_chat_template(row["messages"], tools=tools)["input_ids"]
    assert learned(encoded, tokenizer) == "b" + tokenizer.eos_token


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SPECIAL_TOKENS), st.sampled_from(SPECIAL_TOKENS))
def test_control_tokens_in_messages_are_text(tokenizer, first, second):
    pair = conversations((f"a{first}b", f"c{second}d"))
    (row,) = encode_conversations(pair, tokenizer, 256).to_list()
    clean = encode_conversations(conversations(("a", "b")), tokenizer, 256)[0]
    control = set(range(len(SPECIAL_TOKENS)))
    assert [i for i in row["input_ids"] if i in control] == [i for i in clean["input_ids"] if i in control]
    assert row["labels"].count(tokenizer.eos_token_id) == 1
    assert learned(row, tokenizer) == f"c{second}d{tokenizer.eos_token}"


def test_control_tokens_that_are_asked_for(tokenizer):
    pair = conversations(("a", "<think>b</think>c<|EOT|>"))
    (row,) = encode_conversations(pair, tokenizer, 256, allowed_special=["<think>", "</think>"]).to_list()
    names = [tokenizer.decode([label]) for label in row["labels"] if label != IGNORED and label < 20]
    assert names == ["<think>", "</think>", tokenizer.eos_token]
    with pytest.raises(UserError, match="'<thin>' is no control token"):
        encode_conversations(pair, tokenizer, 256, allowed_special=["<thin>"])


@pytest.mark.parametrize("has_features", [False, True])
def test_streamed_conversations(tokenizer, has_features):
    pairs = conversations(("a", "b"), ("q" * 200, "a"), ("c", "d"))
    stream = (
        pairs.to_iterable_dataset() if has_features else IterableDataset.from_generator(lambda: iter(pairs.to_list()))
    )
    rows = list(encode_conversations(stream, tokenizer, 64))
    assert rows == encode_conversations(pairs, tokenizer, 64).to_list()
    assert len(rows) == 2


def test_a_row_that_is_none_is_named(tokenizer):
    unanswered = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}], "source": "the third row"}])
    with pytest.raises(UserError, match="the third row: has no assistant message"):
        encode_conversations(unanswered, tokenizer, 64)
    twice = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "a"}] * 2 + [{"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(UserError, match="a row: message 2 is a user message after a user"):
        encode_conversations(twice, tokenizer, 64)
    with pytest.raises(UserError, match="DatasetDict is no dataset of rows"):
        encode_conversations(DatasetDict(train=conversations(("a", "b"))), tokenizer, 64)

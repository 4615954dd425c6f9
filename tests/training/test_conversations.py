"""Conversations as rows: a loss on what the assistant says, and on nothing else."""

import pytest
from datasets import Dataset

from fathom.tokenizer import train_tokenizer
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

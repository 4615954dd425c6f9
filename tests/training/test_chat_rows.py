"""Rows as conversations: the usual forms, and the same conversation from parquet, jsonl and datasets."""

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.training.chat_rows import conversation, up_to_last_answer, without_nulls
from fathom.training.questions import load_conversations
from fathom.training.row_files import read_rows

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        ({"messages": [json.dumps(USER), json.dumps(ANSWER)]}, [USER, ANSWER]),
        ({"messages": None, "prompt": "a", "completion": "b"}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            [SYSTEM, USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "human", "value": "a"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "42"},
                    {"from": "gpt", "value": "b"},
                ]
            },
            [SYSTEM, USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}, ANSWER],
        ),
        ({"instruction": "a", "input": "", "output": "b"}, [USER, ANSWER]),
        ({"instruction": "a", "input": None, "output": "b"}, [USER, ANSWER]),
        ({"instruction": "a", "output": "b"}, [USER, ANSWER]),
        ({"instruction": "a", "input": "c", "output": "b"}, [{"role": "user", "content": "a\n\nc"}, ANSWER]),
        (
            {"instruction": "a", "input": "", "output": "b", "system": "s", "history": [["q", "r"]]},
            [SYSTEM, {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}, USER, ANSWER],
        ),
        ({"prompt": "a", "completion": "b"}, [USER, ANSWER]),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
        ({"prompt": [USER], "completion": "b"}, [USER, ANSWER]),
        # As in TRL, only the completion is learned.
        (
            {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
            [USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": None}]}, ANSWER]},
            [USER, ANSWER],
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "function_call": CALL["function"]},
                    {"role": "function", "content": "42"},
                ]
            },
            [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "42"}],
        ),
        ({"messages": [USER, {**ANSWER, "reasoning": "r"}]}, [USER, {**ANSWER, "reasoning_content": "r"}]),
        (
            {"messages": [USER, {**ANSWER, "weight": 1.0}, USER, {**ANSWER, "weight": 0}]},
            [USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}],
        ),
        ({"messages": [{**USER, "tool_calls": None, "weight": None}, {**ANSWER, "tool_calls": []}]}, [USER, ANSWER]),
    ],
)
def test_forms_of_rows(row, messages):
    before = copy.deepcopy(row)
    assert conversation(row).messages == messages
    assert row == before


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"conversations": [USER, ANSWER]},
        {"messages": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
        {"prompt": [{"from": "user", "value": "a"}], "completion": [{"from": "assistant", "value": "b"}]},
    ],
)
def test_names_are_changed_as_trl_does(row):
    helpers = pytest.importorskip("trl.data_utils", reason="needs fathom-lm[trl]")
    theirs = helpers.maybe_convert_to_chatml(copy.deepcopy(row))
    messages = theirs["messages"] if "messages" in theirs else theirs["prompt"] + theirs["completion"]
    assert conversation(row).messages == messages


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "it has nothing"),
        ({"text": "a"}, "it has 'text'"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'prompt', 'chosen', 'rejected'"),
        ({"messages": 3}, "'messages'"),
        ({"conversations": [["a", "b"]]}, "'conversations'"),
        ({"prompt": [3], "completion": "b"}, "'prompt'"),
        ({"instruction": 3, "output": "b"}, "no text"),
        ({"instruction": "a", "output": "b", "history": ["a", "b"]}, "'history'"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight 0.5 in message 2"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "weight 0 for every"),
        ({"messages": [USER]}, "no assistant message"),
        ({"messages": [USER, ANSWER], "tools": "search"}, "'tools'"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "'tools'"),
    ],
)
def test_rows_that_are_none(row, message):
    with pytest.raises(ValueError, match=message):
        conversation(row)


def test_what_follows_the_last_learned_answer_is_left_out():
    unlearned = {**ANSWER, "weight": 0}
    assert up_to_last_answer([USER, ANSWER, USER]) == [USER, ANSWER]
    assert up_to_last_answer([USER, ANSWER, USER, unlearned, USER]) == [USER, ANSWER]
    assert up_to_last_answer([USER, unlearned, USER, ANSWER]) == [USER, unlearned, USER, ANSWER]


@pytest.mark.parametrize("given", [list, json.dumps, lambda tools: [json.dumps(tool) for tool in tools]])
@pytest.mark.parametrize("column", ["tools", "functions"])
def test_tools(given, column):
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
    row = {"messages": [USER, ANSWER], column: given(tools)}
    assert conversation(row).tools == tools
    assert conversation({"messages": [USER, ANSWER], "tools": None}).tools == []


def test_nulls_order_and_whole_numbers():
    value = {"b": None, "type": "t", "a": [1.0, None, {"c": None, "d": 1.5}], "properties": {"z": {}, "name": None}}
    plain = without_nulls(value)
    assert plain == {"type": "t", "a": [1, None, {"d": 1.5}], "properties": {"z": {}}}
    assert list(plain) == ["type", "properties", "a"]
    assert json.dumps(plain["a"]) == '[1, null, {"d": 1.5}]'


# A field has the same kind of value in all rows, as Arrow wants it.
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": st.text(max_size=4),
        "count": st.integers(-9, 9),
        "exact": st.booleans(),
        "ratio": st.floats(-9, 9),
        "list": st.lists(st.text(max_size=3), min_size=1, max_size=2),
        "options": st.fixed_dictionaries(
            {"unit": st.text(max_size=3)},
            optional={"deep": st.fixed_dictionaries({"x": st.integers(0, 9)}, optional={"y": st.text(max_size=2)})},
        ),
    },
).flatmap(lambda value: st.permutations(list(value.items())).map(dict))


def row_of(number: int, given: dict) -> dict:
    call = {"type": "function", "function": {"name": f"f{number}", "arguments": given}}
    properties = {name: {"type": "string", "description": f"the {name}"} for name in given}
    tool = {
        "type": "function",
        "function": {"name": f"f{number}", "parameters": {"type": "object", "properties": properties}},
    }
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "It is 42.", "weight": 1},
        ],
        "tools": [tool],
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(arguments.filter(bool), min_size=2, max_size=4))
def test_rows_are_the_same_from_every_kind_of_file(tmp_path_factory, given):
    folder = tmp_path_factory.mktemp("rows")
    rows = [row_of(number, each) for number, each in enumerate(given)]
    expected = [conversation(row) for row in rows]
    for found in expected:
        call = found.messages[1]["tool_calls"][0]["function"]
        assert json.loads(call["arguments"]) == given[int(call["name"][1:])]

    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert [conversation(row) for _, row in read_rows(folder / name)] == expected
    data = Dataset.from_list(rows)
    assert [conversation(row) for row in data] == expected
    data.to_parquet(str(folder / "b.parquet"))
    assert [conversation(row) for _, row in read_rows(folder / "b.parquet")] == expected
    # Twice is as once: `encode_conversations` reads what `load_conversations` gave.
    for found in expected:
        assert conversation({"messages": found.messages, "tools": found.tools}) == found


def test_loaded_they_are_the_same(tmp_path):
    """Also by way of `datasets`' own JSON reader, which keeps objects of different forms as JSON."""
    rows = [row_of(0, {"city": "Paris", "options": {"unit": "C"}}), row_of(1, {"city": 3, "days": [1, 2]})]
    rows += [row_of(n, {"query": "x" * n, "n": n + 0.5, "options": {"lang": "fr"}}) for n in range(2, 6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    data.to_parquet(str(tmp_path / "b.parquet"))
    data.save_to_disk(tmp_path / "saved")

    def loaded(name: str) -> list:
        splits = load_conversations(str(tmp_path / name))
        return sorted(json.dumps([row["messages"], row["tools"]]) for split in splits.values() for row in split)

    assert len(loaded("a.jsonl")) == 6
    assert "null" not in "".join(json.loads(row)[1] for row in loaded("a.jsonl"))
    assert loaded("b.parquet") == loaded("saved") == loaded("a.jsonl")

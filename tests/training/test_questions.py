"""Conversations: real docstrings, modules kept apart, and files checked row by row."""

import ast
import gzip
import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict

from fathom.training import questions, sources
from fathom.training.corpus import build_corpus, load_corpus
from fathom.training.errors import UserError
from fathom.training.questions import docstring_conversations, load_conversations


@pytest.fixture(scope="module")
def docstrings() -> DatasetDict:
    return docstring_conversations()


def asked(source: str, module: str = "pkg.mod") -> dict[str, str]:
    """Questions and answers of a module's source; every question must be another."""
    pairs = list(questions._questions(ast.parse(source), module))
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def name_in(question: str) -> str:
    return question.split("`")[1]


def test_docstrings_of_the_standard_library(docstrings):
    assert len(docstrings["train"]) > 3500
    assert 0.05 < len(docstrings["heldout"]) / len(docstrings["train"]) < 0.15
    pairs = {
        name_in(messages[0]["content"]): messages[1]["content"]
        for messages in docstrings["train"]["messages"]
        if [message["role"] for message in messages] == ["user", "assistant"]
    }
    assert len(pairs) == len(docstrings["train"])
    assert pairs["textwrap.dedent(text)"] == "Remove any common leading whitespace from every line in `text`."
    assert all(20 <= len(answer) <= 300 and "\n" not in answer for answer in pairs.values())
    first = sum(row[0]["content"].startswith(("What does", "What is the")) for row in docstrings["train"]["messages"])
    assert 0.6 < first / len(docstrings["train"]) < 0.8


def test_answers_of_held_out_questions_are_nowhere_in_training(docstrings, tmp_path):
    modules = {split: {name.split(".")[0] for name in docstrings[split]["source"]} for split in docstrings}
    assert modules["train"].isdisjoint(modules["heldout"])
    answers = {split: {row[1]["content"] for row in docstrings[split]["messages"]} for split in docstrings}
    assert answers["train"].isdisjoint(answers["heldout"])

    build_corpus(["stdlib"], tmp_path / "corpus")
    read = {name.split("/")[1].removesuffix(".py") for name in load_corpus(tmp_path / "corpus")["train"]["name"]}
    assert modules["heldout"].isdisjoint(read)
    assert modules["train"] <= read


def test_names_signatures_and_wording_by_kind():
    pairs = asked(
        '''
def plain(a, b: int = 3, *rest: str, key=None, **more) -> str:
    """Do the plain thing with all of it."""
async def waits():
    """Wait until the other side has closed."""
class Thing(Base):
    """A thing that is made of other things."""
    def method(self, value):
        """Change the thing by the given value."""
    def alone(this):
        """Return whether nothing else is around."""
    @classmethod
    def made(cls, x, /, y):
        """Make a thing from two of its parts."""
    @staticmethod
    def still(x):
        """Stand still and return the argument."""
    @property
    def colour(self):
        """The colour in which it is painted."""
    @colour.setter
    def colour(self, value):
        """Set another colour than it had before."""
    class Inner:
        """An inner class of the outer thing."""
if True:
    def conditional():
        """Only there if the condition is true."""
try:
    import fast
except ImportError:
    def fallback():
        """Stand in for the fast thing."""
def wide(first="aaaaaaaaaaaaaaaaaaaaa", second="bbbbbbbbbbbbbbbbbbbbbbbb", third=None):
    """Take very long default values, all three."""
def wider(first_long_argument, second_long_argument, third_long_argument, fourth):
    """Take arguments with very long names."""
'''
    )
    assert {name_in(question): answer for question, answer in pairs.items()} == {
        "pkg.mod.plain(a, b=3, *rest, key=None, **more)": "Do the plain thing with all of it.",
        "pkg.mod.waits()": "Wait until the other side has closed.",
        "pkg.mod.Thing": "A thing that is made of other things.",
        "pkg.mod.Thing.method(value)": "Change the thing by the given value.",
        "pkg.mod.Thing.alone()": "Return whether nothing else is around.",
        "pkg.mod.Thing.made(x, /, y)": "Make a thing from two of its parts.",
        "pkg.mod.Thing.still(x)": "Stand still and return the argument.",
        "pkg.mod.Thing.colour": "The colour in which it is painted.",
        "pkg.mod.Thing.Inner": "An inner class of the outer thing.",
        "pkg.mod.conditional()": "Only there if the condition is true.",
        "pkg.mod.fallback()": "Stand in for the fast thing.",
        "pkg.mod.wide(first, second, third)": "Take very long default values, all three.",
        "pkg.mod.wider(...)": "Take arguments with very long names.",
    }
    for question in pairs:
        if question.startswith("What does"):
            assert question.endswith(" do?")


@pytest.mark.parametrize(
    ("docstring", "answer"),
    [
        ("First paragraph,\n    on two lines.\n\n    Second paragraph.", "First paragraph, on two lines."),
        ("Too short.", None),
        ("word " * 80, None),
        ("replace(old, new, count=-1) -> string", None),
        ("One of the following values:\n\n- a\n- b", None),
        (">>> function_call_in_a_doctest(1, 2)\n    3", None),
        ("Deprecated since version 3.9, use another.", None),
        ("-> the arrow comes first in this text", None),
        ("Internal_name_only_no_sentence", None),
    ],
)
def test_only_prose_is_an_answer(docstring, answer):
    pairs = asked(f'def f():\n    """{docstring}"""\n')
    assert list(pairs.values()) == ([] if answer is None else [answer])


def test_private_things_are_not_asked_about():
    text = '"""This docstring is long enough to be one."""'
    assert not asked(f"def _f():\n    {text}\nclass _C:\n    {text}\n    def m(self):\n        {text}\n")
    assert not asked(f"class C:\n    def __eq__(self, other):\n        {text}\n    def _m(self):\n        {text}\n")
    assert not asked(f"def f():\n    def inner():\n        {text}\n")


def jsonl(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def dialogue(number):
    return [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": f"answer {number}"}]


@pytest.mark.parametrize("count", [2, 5, 300])
def test_jsonl_is_split_by_content(tmp_path, count):
    rows = [{"messages": dialogue(at), "unused": at} for at in range(count)]
    splits = load_conversations(jsonl(tmp_path / "chat.jsonl", rows))
    backwards = load_conversations(jsonl(tmp_path / "backwards.jsonl", rows[::-1]))
    assert len(splits["heldout"]) >= 1
    assert len(splits["train"]) > len(splits["heldout"]) or count == 2
    both = splits["train"]["messages"][:] + splits["heldout"]["messages"][:]
    assert sorted(both, key=str) == sorted(map(dialogue, range(count)), key=str)
    assert sorted(backwards["heldout"]["messages"], key=str) == sorted(splits["heldout"]["messages"], key=str)


def test_tool_calls_keep_their_own_arguments(tmp_path):
    def called(name, arguments):
        return {
            "messages": [
                {"role": "user", "content": f"{name}?"},
                {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]},
                {"role": "tool", "content": "42"},
                {"role": "assistant", "content": "It is 42.", "reasoning_content": "The tool says so."},
            ]
        }

    rows = [called("add", {"a": 1}), called("find", '{"query": "é"}'), called("look", {"where": "här"})]
    splits = load_conversations(jsonl(tmp_path / "tools.jsonl", rows))
    arguments = {}
    for split in splits.values():
        for messages in split["messages"]:
            (call,) = messages[1]["tool_calls"]
            arguments[call["function"]["name"]] = call["function"]["arguments"]
            assert messages[3]["reasoning_content"] == "The tool says so."
    assert arguments == {"add": '{"a": 1}', "find": '{"query": "é"}', "look": '{"where": "här"}'}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": ', "no JSON"),
        ({"text": "a"}, "'messages'"),
        ({"messages": "hello"}, "'messages'"),
        ({"messages": ["hello"]}, "'messages'"),
        ({"messages": []}, "no assistant message"),
        ({"messages": dialogue(1)[:1]}, "no assistant message"),
        ({"messages": dialogue(1)[1:]}, "answers no user"),
        ({"messages": dialogue(1) + dialogue(1)[1:]}, "answers no user"),
        ({"messages": dialogue(1)[:1] * 2 + dialogue(1)[1:]}, "user message after a user"),
        ({"messages": [*dialogue(1), {"role": "human", "content": "a"}]}, "role human"),
        ({"messages": [*dialogue(1), {"role": "user", "content": 3}]}, "is not text"),
        ({"messages": [*dialogue(1), {"role": "user"}]}, "is not text"),
        ({"messages": [*dialogue(1), {"role": "system", "content": "late"}]}, "must come first"),
        ({"messages": [*dialogue(1), {"role": "tool", "content": "42"}]}, "calls no tool"),
        ({"messages": [*dialogue(1), {"role": "user", "content": "half \ud800"}]}, "lone surrogate"),
        (
            {"messages": [dialogue(1)[0], {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
            "tool call 1 has no name",
        ),
    ],
)
def test_bad_row_is_named(tmp_path, row, message):
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": dialogue(0)}, row])
    with pytest.raises(UserError) as error:
        load_conversations(source)
    assert "line 2" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_sources_that_are_none(tmp_path):
    for source in ("nowhere", "some/file.jsonl", str(tmp_path)):
        with pytest.raises(UserError) as error:
            load_conversations(source)
        assert source in str(error.value)
    with pytest.raises(UserError, match="no conversations"):
        load_conversations(jsonl(tmp_path / "empty.jsonl", [""]))
    with pytest.raises(UserError, match="only conversation"):
        load_conversations(jsonl(tmp_path / "one.jsonl", [{"messages": dialogue(1)}] * 3))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 1 is no UTF-8"):
        load_conversations(str(tmp_path / "binary.jsonl"))


def test_parquet_and_datasets_names(tmp_path, monkeypatch):
    table = Dataset.from_dict({"messages": [dialogue(at) for at in range(50)], "extra": list(range(50))})
    table.to_parquet(str(tmp_path / "chat.parquet"))
    from_file = load_conversations(str(tmp_path / "chat.parquet"))
    assert from_file["train"].column_names == ["messages", "source"]

    opened = DatasetDict(train=table)
    monkeypatch.setattr(sources, "load_dataset", lambda *arguments, **options: opened)
    from_hub = load_conversations("owner/chats")
    assert from_hub["heldout"]["messages"][:] == from_file["heldout"]["messages"][:]

    opened["test"] = table.select([0, 1, 2])
    own_split = load_conversations("owner/chats")
    assert own_split["heldout"]["messages"][:] == [dialogue(at) for at in range(3)]
    assert len(own_split["train"]) == 50
    opened.pop("train")
    with pytest.raises(UserError, match="no split train, only test"):
        load_conversations("owner/chats")


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def test_tools_and_weights_are_kept(tmp_path):
    rows = [{"messages": dialogue(at), "tools": TOOLS if at % 2 else None} for at in range(6)]
    rows[0]["messages"][1]["weight"] = 0
    rows[0]["messages"] += dialogue(9)
    splits = load_conversations(jsonl(tmp_path / "chat.jsonl", rows))
    loaded = {row["messages"][0]["content"]: row for split in splits.values() for row in split}
    for at in range(6):
        row = loaded[f"question {at}"]
        assert row["tools"] == (json.dumps(TOOLS) if at % 2 else "")
    weights = [message.get("weight") for message in loaded["question 0"]["messages"]]
    assert weights == [None, 0, None, None]


def test_a_closing_word_of_the_user_is_left_out(tmp_path):
    rows = [{"messages": [*dialogue(at), {"role": "user", "content": "Thanks!"}]} for at in range(4)]
    splits = load_conversations(jsonl(tmp_path / "chat.jsonl", rows))
    messages = [row["messages"] for split in splits.values() for row in split]
    assert sorted(messages, key=str) == [dialogue(at) for at in range(4)]


def test_bad_rows_are_left_out_where_that_is_asked_for(tmp_path):
    good = [{"messages": dialogue(at)} for at in range(4)]
    bad = ['{"messages": ', {"text": "a"}, {"messages": dialogue(1)[1:]}, "[1]", {"messages": [{"role": "user"}]}]
    source = jsonl(tmp_path / "chat.jsonl", [*good[:2], *bad, *good[2:]])
    with open(source, "ab") as file:
        file.write(b'\n{"messages": "\xff"}\n')
    with pytest.raises(UserError, match=r"chat\.jsonl line 3 is no JSON.*; mend it, or .* --skip_bad_rows"):
        load_conversations(source)
    skipped: list[str] = []
    splits = load_conversations(source, skipped)
    assert sum(map(len, splits.values())) == 4
    assert [line.removeprefix(source).split()[1].rstrip(":") for line in skipped] == ["3", "4", "5", "6", "7", "10"]
    assert not [line for line in skipped if "\n" in line]
    with pytest.raises(UserError, match="holds no conversations; the first row: "):
        load_conversations(jsonl(tmp_path / "bad.jsonl", bad), [])


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.json.zst", "saved", "splits"])
def test_further_kinds_of_files(tmp_path, name):
    rows = [{"prompt": f"question {at}", "completion": f"answer {at}"} for at in range(8)]
    path = tmp_path / name
    if name.startswith("a."):
        sign = "\t" if "tsv" in name else ","
        table = "\n".join([f"prompt{sign}completion", *(f"{row['prompt']}{sign}{row['completion']}" for row in rows)])
        lines = "\n".join(map(json.dumps, rows))
        data = (table if "sv" in name else lines if "jsonl" in name else json.dumps(rows)).encode()
        path.write_bytes(
            gzip.compress(data)
            if ".gz" in name
            else pa.compress(data, "zstd", asbytes=True)
            if ".zst" in name
            else data
        )
    elif name == "saved":
        Dataset.from_list(rows).save_to_disk(path)
    else:
        DatasetDict(train=Dataset.from_list(rows[:6]), test=Dataset.from_list(rows[6:])).save_to_disk(path)
    splits = load_conversations(str(path))
    assert sorted((row["messages"] for split in splits.values() for row in split), key=str) == list(
        map(dialogue, range(8))
    )
    if name == "splits":
        assert [row["messages"] for row in splits["heldout"]] == [dialogue(6), dialogue(7)]

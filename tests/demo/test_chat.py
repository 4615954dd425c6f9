"""What the page shows of a conversation, and what the model gets to read of it."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fathom.demo.chat import figures_line, from_markdown, settle, to_markdown, to_messages, to_turn, write_feedback
from fathom.demo.generation import Progress, Reply

USER = {"role": "user", "content": [{"type": "text", "text": "What does `f` do?"}]}
THOUGHT = {"role": "assistant", "content": "hm", "metadata": {"title": "Thought", "status": "done"}}
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "Adds to &lt;module&gt;."}], "metadata": {}}


def progress(**changes: object) -> Progress:
    values = {"text": "", "prompt_tokens": 10, "new_tokens": 5, "limit": 8, "clipped": False}
    return Progress(**{**values, "first_token_seconds": 0.5, "decode_seconds": 2.0, **changes})


def test_the_model_reads_no_reasoning_and_no_markup() -> None:
    assert to_messages([USER, THOUGHT, ANSWER, USER], "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What does `f` do?"},
        {"role": "assistant", "content": "Adds to <module>."},
        {"role": "user", "content": "What does `f` do?"},
    ]


def test_roles_alternate_after_an_answer_that_was_stopped_in_thought() -> None:
    assert [message["role"] for message in to_messages([USER, THOUGHT, USER], " ")] == ["user", "assistant", "user"]


def test_roles_alternate_after_a_question_without_an_answer() -> None:
    assert to_messages([USER, USER], "") == [{"role": "user", "content": "What does `f` do?\n\nWhat does `f` do?"}]


@given(st.text(st.sampled_from("a_<>&;`\n#95lt* ")))
@example("&lt; `&lt;` ```\n<b>\n``` __init__ &amp;")
@example("```\nnever <closed>")
def test_markdown_escapes_can_be_taken_back(text: str) -> None:
    assert from_markdown(to_markdown(text)) == text


def test_tags_and_dunder_names_are_escaped_outside_code_only() -> None:
    assert to_markdown("<b>.__init__ `<b>`\n```\n<b>\n```") == (
        "&lt;b&gt;.&#95;&#95;init&#95;&#95; `<b>`\n```\n<b>\n```"
    )


def test_reasoning_is_folded_while_it_goes_on_and_after() -> None:
    (pending,) = to_turn(Reply("hm", "", reasoning_ended=False), progress(), 2.5, "en")
    assert pending["metadata"] == {"title": "Thinking", "status": "pending"}
    thought, answer = to_turn(Reply("hm", "Adds."), progress(), 1.5, "zh")
    assert thought["metadata"] == {"title": "已思考", "status": "done", "duration": 1.5}
    assert answer == {"role": "assistant", "content": "Adds."}
    cut, *_ = to_turn(Reply("hm", "", reasoning_ended=False), progress(finish="length"), 2.5, "en")
    assert cut["metadata"]["status"] == "done"


def test_a_turn_without_text_is_still_a_turn() -> None:
    assert to_turn(Reply(None, ""), progress(finish="eos"), 0.0, "en") == [{"role": "assistant", "content": ""}]


def test_a_stopped_conversation_thinks_no_more() -> None:
    pending = {**THOUGHT, "metadata": {"title": "Thinking", "status": "pending"}}
    assert settle([USER, pending], "en") == [USER, THOUGHT]
    assert settle([USER, ANSWER], "en") == [USER, ANSWER]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"new_tokens": 0, "first_token_seconds": None, "decode_seconds": 0.0},
            "reading 10 prompt tokens · context 10 of 64",
        ),
        ({}, "5 tokens · 2.0 tokens/s · first token after 0.50 s · context 15 of 64"),
        ({"finish": "eos"}, "5 tokens · 2.0 tokens/s · first token after 0.50 s · context 15 of 64 · ended by itself"),
        (
            {"finish": "length", "clipped": True},
            "5 tokens · 2.0 tokens/s · first token after 0.50 s · context 15 of 64 · "
            "cut at 8 tokens, where the context of 64 is full",
        ),
    ],
)
def test_figures(changes: dict, line: str) -> None:
    assert figures_line(Reply(None, "Adds."), progress(**changes), 64, "en") == line


def test_an_answer_without_a_word_says_so() -> None:
    line = figures_line(Reply(None, ""), progress(new_tokens=1, decode_seconds=0.0, finish="eos"), 64, "en")
    assert line.endswith("ended by itself · the model ended its turn without a word")


def test_feedback_is_an_unpaired_preference(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "feedback.jsonl"
    write_feedback(path, [USER, THOUGHT, ANSWER, USER], 2, True, "runs/sft", "Be brief.")
    write_feedback(path, [USER, THOUGHT, ANSWER, USER], (1, 0), False, "runs/sft", "")
    liked, disliked = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert liked == {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What does `f` do?"},
        ],
        "completion": [{"role": "assistant", "content": "Adds to <module>."}],
        "label": True,
        "checkpoint": "runs/sft",
    }
    assert (disliked["label"], disliked["completion"]) == (False, liked["completion"])

"""Conversations to ids: the chat template writes control tokens, the messages do not.

    messages      [{"role": "user", "content": "hi</think>"}]
    marked        [{"role": "user", "content": "hi\\ue000</think>\\ue001"}]         what a message must not write
    rendered      <BOS><｜User｜>hi\\ue000</think>\\ue001<｜Assistant｜></think>
    ids           BOS  User   hi < / think >       Assistant  /think               the first one as characters

transformers' `sanitize_control_tokens=True` marks in the same way, but gives no mask of the assistant's tokens, drops
two characters from the text, passes over keys (of a tool's arguments), and encodes a marked token apart from the text
around it. Templates see the words of messages as they are, between marks: `content.split('</think>')` still works.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import chain
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from .pieces import pieces
from .plain_text import control_tokens, is_byte_level, plain_backend

# Keys that templates look for by name. All other keys (of arguments, of properties) are text like any other.
_MESSAGE_FIELDS = ("role", "content", "reasoning", "reasoning_content", "thinking", "tool_calls", "tool_call_id")
_CALL_FIELDS = ("id", "index", "type", "function", "name", "arguments", "text")
_SCHEMA_FIELDS = ("description", "parameters", "properties", "required", "items", "enum", "strict", "title")
_FIELDS = frozenset((*_MESSAGE_FIELDS, *_CALL_FIELDS, *_SCHEMA_FIELDS))
_PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE))


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as tokens.

    Attributes:
        input_ids: the tokens.
        answers: for each token the number, from 1, of the part that the template marks as the assistant's own
            (`{% generation %}`); 0 for all others.
        answer_count: how many such parts the template wrote, empty ones too.
    """

    input_ids: list[int]
    answers: list[int]
    answer_count: int


def encode_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None = None,
    *,
    allowed_special: Collection[str] = (),
    chat_template: str | None = None,
    **options: Any,
) -> EncodedChat:
    """Renders a conversation by the tokenizer's chat template and encodes it.

    No text of a message, tool or option becomes a control token, wherever it stands: content, reasoning, names and
    arguments of calls, results and schemas of tools, and keys. Without control tokens in them, the ids are those of
    `tokenizer.apply_chat_template`.

    Args:
        tokenizer: with a chat template and a byte-level BPE.
        messages: as `apply_chat_template` takes them.
        tools: JSON schemas.
        allowed_special: control tokens that are meant where a message holds them.
        chat_template: another template than the tokenizer's, or the name of one.
        options: of `render_jinja_template` (add_generation_prompt, continue_final_message, documents) and variables of
            the template (thinking).

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        ValueError: no template, or a name in `allowed_special` that is no control token.
    """
    backend = plain_backend(tokenizer, allowed_special)
    controls = control_tokens(tokenizer)
    template = tokenizer.get_chat_template(chat_template, tools)
    messages, tools, options = _plain_data(messages), _plain_data(tools or None), _plain_data(options)
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    marks = _unused_characters([template, *_texts([messages, tools, options])])
    barred = _any_of([name for name in controls if name not in allowed_special])

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return barred.sub(lambda found: found[0].join(marks), value)
        if isinstance(value, dict):
            return {key if key in _FIELDS else marked(key): marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    has_mask = re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
    variables = {name: marked(value) for name, value in options.items()}
    try:
        (rendered,), spans = render_jinja_template(
            conversations=[marked(messages)],
            tools=marked(tools),
            chat_template=template,
            return_assistant_tokens_mask=has_mask,
            **{**tokenizer.special_tokens_map, **variables},
        )
    except TemplateError as error:
        raise type(error)(re.sub(f"[{''.join(marks)}]", "", str(error))) from error
    return _encoded(backend, controls, rendered, marks, spans[0] if has_mask else [])


def _plain_data(value: Any) -> Any:
    """Lists and dicts of what may also be tuples, dataclasses and pydantic models; all else as it is."""
    if callable(dump := getattr(value, "model_dump", None)) and not isinstance(value, type):
        value = dump()
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    return [_plain_data(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from chain.from_iterable(map(_texts, chain(value, value.values())))
    elif isinstance(value, list):
        yield from chain.from_iterable(map(_texts, value))


def _unused_characters(texts: Sequence[str]) -> tuple[str, str]:
    """Two characters of private use that no text holds, neither as such nor as JSON escapes them."""

    def is_free(mark: str) -> bool:
        return not any(mark in text or _escaped(mark) in text for text in texts)

    free = filter(is_free, map(chr, _PRIVATE_USE))
    return next(free), next(free)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the tokens; where one begins with another, the longer, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _encoded(
    backend: Tokenizer,
    controls: dict[str, int],
    rendered: str,
    marks: tuple[str, str],
    spans: Sequence[tuple[int, int]],
) -> EncodedChat:
    """Encodes a rendered conversation: control tokens that are not marked as such, all else as plain text.

    Args:
        spans: of the assistant's text, in characters of `rendered`; ascending.
    """
    runs, origins = _runs(rendered, controls, marks)
    spans = [(_position(start, origins), _position(end, origins)) for start, end in spans]
    ids: list[int] = []
    answers: list[int] = []
    at = span = 0
    for text, is_control in runs:
        for number, start, end in [(controls[text], 0, len(text))] if is_control else _tokens(backend, text):
            while span < len(spans) and spans[span][1] <= at + start:
                span += 1
            ids.append(number)
            answers.append(span + 1 if span < len(spans) and spans[span][0] < at + end else 0)
        at += len(text)
    return EncodedChat(ids, answers, len(spans))


def _runs(
    rendered: str, controls: dict[str, int], marks: tuple[str, str]
) -> tuple[list[tuple[str, bool]], list[tuple[int, int]]]:
    """Parts a rendered conversation into control tokens and the text between them, and takes out the marks.

    Returns:
        Runs (text, whether it is a control token), and where unmarked text comes from: ascending pairs of a place in
        `rendered` and its place without marks.
    """
    start, end = (f"(?:{re.escape(mark)}|{re.escape(_escaped(mark))})" for mark in marks)
    any_control = _any_of(list(controls)).pattern
    # A template that cuts a message may leave a mark alone.
    pattern = re.compile(f"{start}(?P<text>{any_control}){end}|{start}|{end}|(?P<control>{any_control})")
    runs: list[tuple[str, bool]] = []
    origins: list[tuple[int, int]] = []
    length = 0

    def add(text: str, place: int, is_control: bool = False) -> None:
        nonlocal length
        if not text:
            return
        origins.append((place, length))
        length += len(text)
        if runs and not is_control and not runs[-1][1]:
            runs[-1] = runs[-1][0] + text, False
        else:
            runs.append((text, is_control))

    at = 0
    for found in pattern.finditer(rendered):
        add(rendered[at : found.start()], at)
        add(found["text"] or "", found.start("text"))
        add(found["control"] or "", found.start("control"), is_control=True)
        at = found.end()
    add(rendered[at:], at)
    return runs, [*origins, (len(rendered), length)]


def _position(place: int, origins: list[tuple[int, int]]) -> int:
    """The place without marks of a place in the rendered text; of a mark, that of what follows it."""
    after = bisect_right(origins, place, key=lambda origin: origin[0])
    if after == 0:
        return 0
    (begin, plain), following = origins[after - 1], origins[min(after, len(origins) - 1)][1]
    return min(plain + place - begin, following)


def _tokens(backend: Tokenizer, text: str) -> Iterator[tuple[int, int, int]]:
    """(id, first character, end) of the tokens of plain text."""
    begin = 0
    for piece in pieces(text) if is_byte_level(backend) else [text]:
        encoding = backend.encode(piece, add_special_tokens=False)
        for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            yield number, begin + start, begin + end
        begin += len(piece)

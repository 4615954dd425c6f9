"""Conversations as training rows: the chat template's tokens, with a loss on the assistant's words alone.

<BOS><User>What does `x` do?<Assistant></think>It ...<EOS>
-    -     -                 -          -      It ...<EOS>      labels
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import jinja2
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from ..tokenizer import encode_chat
from ..tokenizer.plain_text import check_allowed
from .chat_rows import conversation, up_to_last_answer
from .chat_templates import check_template
from .errors import UserError
from .packing import IGNORED, Rows, column_names, mapped


def encode_conversations(
    conversations: Rows,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    allowed_special: Collection[str] = (),
) -> Rows:
    """Renders and tokenizes conversations; those longer than `max_length` tokens are left out.

    Args:
        conversations: rows in a form that `chat_rows.conversation` reads: `messages`, and `tools` if there are any. An
            assistant message of `weight` 0 is read and not learned. Streamed ones are encoded while they are read.
        tokenizer: its chat template marks the assistant's words by `{% generation %}`.
        max_length: tokens.
        allowed_special: control tokens that are meant where a message holds them (`<think>` in the answers, say). All
            others in a message are text.

    Returns:
        Rows of `input_ids` and `labels` (-100 but for the assistant's words).

    Raises:
        UserError: the template marks nothing, a row is no conversation, or none is short enough.
    """
    if not re.search(r"\{%-?\s*generation\s*-?%\}", str(tokenizer.chat_template)):
        raise UserError("the tokenizer's chat template has no {% generation %} marks; train it with `fathom tokenizer`")
    try:
        check_allowed(tokenizer, allowed_special)
    except ValueError as error:
        raise UserError(str(error)) from error
    encode = partial(_encode, tokenizer=tokenizer, allowed_special=tuple(allowed_special))
    rows = mapped(conversations, encode, column_names(conversations), "Tokenizing")
    if not isinstance(rows, Dataset):
        return rows.filter(lambda row: len(row["input_ids"]) <= max_length)
    short = rows.filter(lambda row: len(row["input_ids"]) <= max_length, desc="Measuring")
    if not len(short):
        raise UserError(f"no conversation of {len(rows)} has at most {max_length} tokens; raise --sequence_length")
    return short


def _encode(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, allowed_special: tuple[str, ...]
) -> dict[str, list[int]]:
    place = row.get("source") or "a row"
    try:
        found = conversation(row)
        messages = up_to_last_answer(found.messages)
        check_template(tokenizer, messages, tools=found.tools)
        encoded = encode_chat(tokenizer, messages, found.tools, allowed_special=allowed_special)
    except (UserError, ValueError, TypeError, jinja2.TemplateError) as error:
        raise UserError(f"{place}: {error}") from error
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if 0 in weights and encoded.answer_count != len(weights):
        raise UserError(
            f"{place} has messages of weight 0, but the tokenizer's chat template marks {encoded.answer_count} parts "
            f"of {len(weights)} assistant messages, so which to leave out is not known"
        )
    learned = [0, *weights] if 0 in weights else [0] + [1] * encoded.answer_count
    labels = [
        token if learned[answer] else IGNORED for token, answer in zip(encoded.input_ids, encoded.answers, strict=True)
    ]
    return {"input_ids": encoded.input_ids, "labels": labels}

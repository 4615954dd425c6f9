"""Conversations as training rows: the chat template's tokens, with a loss on the assistant's words alone.

<BOS><User>What does `x` do?<Assistant></think>It ...<EOS>
-    -     -                 -          -      It ...<EOS>      labels
"""

from functools import partial

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from .chat_templates import check_template
from .errors import UserError
from .packing import IGNORED


def encode_conversations(conversations: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int) -> Dataset:
    """Renders and tokenizes conversations; those longer than `max_length` tokens are left out.

    Args:
        conversations: rows with `messages`, as `apply_chat_template` takes them.
        tokenizer: its chat template marks the assistant's words by `{% generation %}`.
        max_length: tokens.

    Returns:
        Rows of `input_ids` and `labels` (-100 but for the assistant's words).

    Raises:
        UserError: the template marks nothing, or no conversation is short enough.
    """
    rows = conversations.map(
        partial(_encode, tokenizer=tokenizer), remove_columns=conversations.column_names, desc="Tokenizing"
    )
    if len(rows) and all(label == IGNORED for label in rows[0]["labels"]):
        raise UserError("the tokenizer's chat template has no {% generation %} marks; train it with `fathom tokenizer`")
    short = rows.filter(lambda row: len(row["input_ids"]) <= max_length, desc="Measuring")
    if not len(short):
        raise UserError(f"no conversation of {len(rows)} has at most {max_length} tokens; raise --sequence_length")
    return short


def _encode(row: dict, tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    check_template(tokenizer, row["messages"])
    encoded = tokenizer.apply_chat_template(
        row["messages"],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        # No warning of what is longer than the context: it is measured and left out.
        tokenizer_kwargs={"verbose": False},
    )
    marks = encoded["assistant_masks"]
    labels = [token if marked else IGNORED for token, marked in zip(encoded["input_ids"], marks, strict=True)]
    return {"input_ids": encoded["input_ids"], "labels": labels}

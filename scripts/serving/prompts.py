"""Prompts of the server: control tokens in what a request says are text.

transformers' handlers call the tokenizer that the model manager loads, `apply_chat_template` for conversations and the
tokenizer itself for plain text. Both would turn a `<｜end▁of▁sentence｜>` that a client writes into the token.
"""

from collections.abc import Sequence
from functools import wraps
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager

from ...tokenizer import encode_chat, encode_texts


class PlainTextPrompts:
    """Mixed into a tokenizer's class: the two methods that the server encodes prompts by."""

    def __call__(
        self, text: Any = None, *args: Any, return_tensors: str | None = None, **options: Any
    ) -> BatchEncoding:
        if args or options or not isinstance(text, str | list):
            # Not of a request: to find stop strings, transformers tokenizes parts of the vocabulary.
            return super().__call__(text, *args, return_tensors=return_tensors, **options)  # type: ignore[misc]
        texts = [text] if isinstance(text, str) else text
        return _batch(encode_texts(self, texts), isinstance(text, str), return_tensors)  # type: ignore[arg-type]

    @wraps(PreTrainedTokenizerFast.apply_chat_template)
    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Any] | None = None,
        tokenize: bool = True,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        if not tokenize:
            return super().apply_chat_template(conversation, tools, tokenize=False, **options)  # type: ignore[misc]
        options.pop("sanitize_control_tokens", None)
        ids = encode_chat(self, conversation, tools, **options).input_ids  # type: ignore[arg-type]
        batch = _batch([ids], is_one=True, return_tensors=return_tensors)
        return batch if return_dict else batch["input_ids"]


def _batch(ids: list[list[int]], is_one: bool, return_tensors: str | None) -> BatchEncoding:
    masks = [[1] * len(row) for row in ids]
    if is_one and return_tensors is None:
        return BatchEncoding({"input_ids": ids[0], "attention_mask": masks[0]})
    return BatchEncoding({"input_ids": ids, "attention_mask": masks}, tensor_type=return_tensors)


class PlainTextModelManager(ModelManager):
    """Gives every tokenizer that it loads the methods of `PlainTextPrompts`."""

    def load_model_and_processor(self, *args: Any, **kwargs: Any) -> Any:
        model, processor = super().load_model_and_processor(*args, **kwargs)
        kind = type(processor)
        if isinstance(processor, PreTrainedTokenizerFast) and not isinstance(processor, PlainTextPrompts):
            processor.__class__ = type(kind.__name__, (PlainTextPrompts, kind), {})
        return model, processor

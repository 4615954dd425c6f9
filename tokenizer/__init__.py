"""Text to ids and back: a byte-level BPE trained on one's own text, with DeepSeek's control tokens and chat format."""

from .bpe import MIN_VOCAB_SIZE, chat_template, check_text, token_byte_lengths, train_tokenizer
from .chat import EncodedChat, encode_chat
from .plain_text import control_tokens, encode_text, encode_texts

__all__ = [
    "MIN_VOCAB_SIZE",
    "EncodedChat",
    "chat_template",
    "check_text",
    "control_tokens",
    "encode_chat",
    "encode_text",
    "encode_texts",
    "token_byte_lengths",
    "train_tokenizer",
]

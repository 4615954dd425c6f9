"""Text to ids and back: a byte-level BPE trained on one's own text, with DeepSeek's control tokens and chat format."""

from .bpe import MIN_VOCAB_SIZE, chat_template, check_text, token_byte_lengths, train_tokenizer

__all__ = ["MIN_VOCAB_SIZE", "chat_template", "check_text", "token_byte_lengths", "train_tokenizer"]

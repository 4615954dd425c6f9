r"""Byte-level BPE in the form of DeepSeek-V3's tokenizer, trained on one's own text.

    text -> three isolated splits -> bytes as 256 printable characters -> merges, most frequent pair first

The splits (tokenizer.json of deepseek-ai/DeepSeek-V3; arXiv 2412.19437, section 4.1) bound what a token may span:
at most three digits; runs of Chinese and Japanese letters; then words with the blank or sign before them,
punctuation with the newlines after it, and white space. Every byte is in the vocabulary, nothing is normalised, so
decoding an encoding gives back any text exactly.

Ids: control tokens (`special_tokens.py`), then the 256 bytes, then the merges in the order they were found.
"""

import json
import re
from collections.abc import Iterable, Iterator
from importlib.resources import files

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .pieces import pieces
from .plain_text import control_tokens
from .special_tokens import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS, added_tokens

PRE_TOKEN_SPLITS = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)
MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# A pair must occur twice to become a token: a merge that was seen once is a piece of one document.
_MIN_FREQUENCY = 2

# The trainer of `tokenizers` moves the rest of a word at every merge: time by the square of a word's length. What is
# longer than any word (DNA, base64, a line of 1,000 dashes) is learned from in parts. The longest of the standard
# library is 96.
_LONGEST_WORD = 512  # characters
# Words that long are all different, and the trainer needs 90 bytes for each of their characters. It learns from no more
# than so many of them; of each further one it sees the first `_LONGEST_WORD` characters.
_LONG_WORD_CHARACTERS = 1 << 22
_LONG_WORD = re.compile(rf"[^\W\d_]{{{_LONGEST_WORD + 1},}}|[^\w\s]{{{_LONGEST_WORD + 1},}}")


def chat_template() -> str:
    """The Jinja text of `chat_template.jinja`, which says what it does at its top."""
    return files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")


def check_text(text: str) -> str:
    """Returns `text`, or says what makes it no Unicode text.

    The fast tokenizers meet a lone surrogate, which UTF-8 cannot express, with a TypeError about their own types.

    Raises:
        ValueError: a lone surrogate, with its code and position.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which no UTF-8 "
            "text may hold; decode the text with errors='replace'"
        ) from error
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Trains a vocabulary; the same texts give the same tokenizer.

    No BOS is added when text is encoded (as in DeepSeek-V4's tokenizer_config): the chat template writes its own, and
    who packs or continues plain text puts `bos_token_id` in front. So it can never be doubled.

    Args:
        texts: documents; read once.
        vocab_size: number of ids, control tokens and bytes included.
        model_max_length: context in tokens, beyond which transformers warns.

    Raises:
        ValueError: `vocab_size` below `MIN_VOCAB_SIZE` or above what the texts can fill, a `model_max_length` below 1,
            text with a lone surrogate.
    """
    if model_max_length < 1:
        raise ValueError(f"model_max_length is {model_max_length}; it must be at least 1")
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE}: "
            f"{len(SPECIAL_TOKENS)} control tokens and 256 bytes"
        )
    learner = _bare_tokenizer(models.BPE(), rf"[\s\S]{{{_LONGEST_WORD}}}")
    learner.train_from_iterator(
        _learned_from(texts),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=_MIN_FREQUENCY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    reached = learner.get_vocab_size()
    if reached < vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the text fills only {reached}; give more text or {reached}")

    # The trainer marks all control tokens as special. Built anew from vocabulary and merges, each has its own flag,
    # and what trained is equal to what a reload gives.
    model = json.loads(learner.to_str())["model"]
    tokenizer = _bare_tokenizer(models.BPE(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.add_tokens(added_tokens())
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        add_bos_token=False,
        # A decoder continues the last column, so a batch of prompts needs its padding on the left. Collators for
        # training pad as they like; under a mask the side makes no difference to the loss.
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        # apply_chat_template(sanitize_control_tokens=True) encodes these as plain text where a user wrote them.
        chat_control_tokens=list(SPECIAL_TOKENS),
    )
    wrapped.chat_template = chat_template()
    return wrapped


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Bytes of UTF-8 text that each id stands for, 0 for control tokens: the denominator of bits per byte.

    Over the ids of a text without control tokens (`encode_text`) the lengths add up to `len(text.encode())`, even where
    a token is part of a character.
    """
    # In a byte-level vocabulary each character of a token is one byte.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
    for token_id, token in tokenizer.added_tokens_decoder.items():  # a user's own words, as they are written
        lengths[token_id] = len(token.content.encode())
    for token_id in control_tokens(tokenizer).values():
        lengths[token_id] = 0
    return lengths


def token_texts(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes of UTF-8 text that each id stands for, none for control tokens: `token_byte_lengths` of them."""
    # GPT-2's alphabet: a byte that prints is its own character, the others follow from U+0100 on in order.
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in prints]
    byte_of = {chr(byte): byte for byte in prints} | {chr(256 + place): byte for place, byte in enumerate(others)}
    added = {token_id: token.content.encode() for token_id, token in tokenizer.added_tokens_decoder.items()}
    added |= dict.fromkeys(control_tokens(tokenizer).values(), b"")
    return [
        added[token_id] if token_id in added else bytes(byte_of[character] for character in token)
        for token_id, token in enumerate(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    ]


def _learned_from(texts: Iterable[str]) -> Iterator[str]:
    left = _LONG_WORD_CHARACTERS

    def shortened(word: re.Match[str]) -> str:
        nonlocal left
        kept = word[0][: max(_LONGEST_WORD, left)]
        left -= len(kept)
        return kept

    for text in texts:
        for piece in pieces(check_text(text)):
            yield _LONG_WORD.sub(shortened, piece)


def _bare_tokenizer(model: models.BPE, *further_splits: str) -> Tokenizer:
    tokenizer = Tokenizer(model)
    patterns = (*PRE_TOKEN_SPLITS, *further_splits)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer

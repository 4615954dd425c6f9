"""The vocabulary: lossless on any text, DeepSeek's splits and ids, and the same after a plain reload."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fathom.tokenizer import MIN_VOCAB_SIZE, check_text, token_byte_lengths, train_tokenizer
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS

TEXTS = [
    "def double(x):\n    return 2 * x\n\n\nclass Café:\n    '''深い海の底まで。你好，世界'''\r\n" * 3,
    "The quick brown fox jumps over the lazy dog; 1234567 times, isn't it?\t\n" * 3,
    "emoji 🙂🙃 and 👩‍👩‍👧, <think> as text, ===== ----- #####\n" * 3,
]

TOKENIZER = train_tokenizer(TEXTS, 400, 64)
BYTE_LENGTHS = token_byte_lengths(TOKENIZER)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
# Words of a real text between all kinds of white space, control characters and control tokens.
mixed_text = st.lists(
    st.one_of(
        any_text,
        st.sampled_from(
            [*SPECIAL_TOKENS, " ", "  ", "\r\n", "\n\n", "\t", "\0", "\x7f", "\u2028", "\ufeff", " ,", "n't"]
        ),
        st.sampled_from(["你好", "カタカナ", "🙂", "👩‍👩‍👧", "e\u0301", "12345", "<｜", "｜>", "<think", "def f(x):"]),
    )
).map("".join)


def ids_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@settings(deadline=None)  # two busy cores
@given(mixed_text)
def test_decoding_gives_back_any_text(text):
    assert TOKENIZER.decode(ids_of(text)) == text


@settings(deadline=None)  # two busy cores
@given(any_text)
def test_byte_lengths_add_up(text):
    text = re.sub("|".join(map(re.escape, SPECIAL_TOKENS)), "", text)
    assert sum(BYTE_LENGTHS[token_id] for token_id in ids_of(text)) == len(text.encode())


def test_control_tokens_have_no_bytes():
    ids = ids_of("".join(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS)))
    assert [BYTE_LENGTHS[token_id] for token_id in ids] == [0] * len(SPECIAL_TOKENS)
    assert len(BYTE_LENGTHS) == len(TOKENIZER) == 400


def test_ids_and_names():
    assert TOKENIZER.convert_ids_to_tokens([0, 1, 2]) == [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜▁pad▁｜>",
    ]
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id) == (0, 1, 2)
    single_bytes = {TOKENIZER.convert_ids_to_tokens(at) for at in range(len(SPECIAL_TOKENS), MIN_VOCAB_SIZE)}
    assert len(single_bytes) == 256
    assert {len(token) for token in single_bytes} == {1}
    assert TOKENIZER.model_max_length == 64
    assert TOKENIZER.padding_side == "left"


def test_what_survives_skip_special_tokens():
    shown = TOKENIZER.decode(list(range(len(SPECIAL_TOKENS))), skip_special_tokens=True)
    removed = [token for token in SPECIAL_TOKENS if token not in shown]
    assert removed == ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|EOT|>"]


def test_no_bos_is_added():
    assert ids_of("text")[0] != TOKENIZER.bos_token_id
    assert TOKENIZER("") == {"input_ids": [], "attention_mask": []}


def test_splits_bound_the_tokens():
    # By hand from DeepSeek-V3's three patterns, in a vocabulary that would love to merge across all of them.
    text = "in 2026 12345 items,depth你好 world!!\n\n  x"
    tokenizer = train_tokenizer([text] * 50, MIN_VOCAB_SIZE + 30, 64)
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    pre_tokens = [span for _, span in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    # fmt: off
    assert [text[start:end] for start, end in pre_tokens] == [
        "in", " ", "202", "6", " ", "123", "45", " items", ",depth", "你好", " world", "!!\n\n", " ", " x",
    ]
    # fmt: on


def test_merges_are_the_most_frequent_pairs():
    # Words: low, 2 x " low", 2 x " lower", " er". Pairs: lo and ow 5, then lo+w 5, then " "+low 4, then er 3.
    tokenizer = train_tokenizer(["low low low lower lower er"], MIN_VOCAB_SIZE + 4, 64)
    learned = [tokenizer.decode([at]) for at in range(MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 4)]
    assert learned in (["lo", "low", " low", "er"], ["ow", "low", " low", "er"])


def test_training_is_deterministic():
    assert train_tokenizer(TEXTS, 400, 64).backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()


def test_reload_without_remote_code(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    reloaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert isinstance(reloaded, PreTrainedTokenizerFast)
    assert reloaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert reloaded.special_tokens_map == TOKENIZER.special_tokens_map
    assert reloaded.chat_template == TOKENIZER.chat_template
    assert (reloaded.model_max_length, reloaded.padding_side) == (64, "left")
    assert reloaded.clean_up_tokenization_spaces is False
    text = " leading, trailing <think> 👩‍👩‍👧 , . ! n't \r\n"
    assert reloaded(text) == TOKENIZER(text)
    assert reloaded.decode(reloaded(text)["input_ids"]) == text
    assert reloaded.decode(range(20), skip_special_tokens=True) == TOKENIZER.decode(range(20), skip_special_tokens=True)


@pytest.mark.parametrize("vocab_size", [0, MIN_VOCAB_SIZE - 1])
def test_vocabulary_too_small(vocab_size):
    with pytest.raises(ValueError, match=f"is {vocab_size}; it must be at least {MIN_VOCAB_SIZE}"):
        train_tokenizer(TEXTS, vocab_size, 64)
    assert len(train_tokenizer(TEXTS, MIN_VOCAB_SIZE, 64)) == MIN_VOCAB_SIZE


def test_vocabulary_larger_than_the_text_fills():
    with pytest.raises(ValueError, match="the text fills only") as error:
        train_tokenizer(["ab ab ab"], 1000, 64)
    reached = int(re.search(r"fills only (\d+)", str(error.value))[1])
    assert MIN_VOCAB_SIZE < reached < 1000
    assert len(train_tokenizer(["ab ab ab"], reached, 64)) == reached


def test_context_below_one():
    with pytest.raises(ValueError, match="model_max_length is 0"):
        train_tokenizer(TEXTS, 400, 0)


def test_lone_surrogates_are_refused_clearly():
    assert check_text("🙂") == "🙂"
    for call in (lambda: check_text("ab\ud800c"), lambda: train_tokenizer(["ab\ud800c"], 400, 64)):
        with pytest.raises(ValueError, match=r"character 2 of the text is the lone surrogate U\+D800"):
            call()


def test_batches_pad_on_the_left():
    batch = TOKENIZER(["a", "abc def ghi"], padding=True)
    assert batch["input_ids"][0][:2] == [2, 2]
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1

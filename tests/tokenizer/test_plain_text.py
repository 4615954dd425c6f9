"""Control tokens in text are text: every one of them, anywhere, in any tokenizer, unless asked for by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from fathom.tokenizer import control_tokens, encode_text, encode_texts, token_byte_lengths, train_tokenizer
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS

TEXTS = ["def f(x):\n    return lambda x: <think> x\n" * 9, "The quick brown fox; 深い海、你好。\n" * 9]


def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 330, 64)


TOKENIZER = trained()
LENGTHS = token_byte_lengths(TOKENIZER)

fragments = st.one_of(
    st.sampled_from(SPECIAL_TOKENS),
    st.sampled_from(SPECIAL_TOKENS).flatmap(lambda token: st.integers(0, len(token)).map(lambda end: token[:end])),
    st.sampled_from(SPECIAL_TOKENS).flatmap(lambda token: st.integers(0, len(token)).map(lambda start: token[start:])),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.sampled_from(["<", ">", "<｜", "｜>", "think", "\n", " ", "lambda", "\0", "\ue000", "\U000f0000"]),
)
texts = st.lists(fragments, max_size=12).map("".join)


@settings(deadline=None, max_examples=300)
@given(texts)
def test_no_text_becomes_a_control_token(text):
    ids = encode_text(TOKENIZER, text)
    assert not set(ids) & set(range(len(SPECIAL_TOKENS)))
    assert TOKENIZER.decode(ids) == text
    assert sum(LENGTHS[number] for number in ids) == len(text.encode())


@settings(deadline=None)
@given(texts)
def test_other_text_has_the_ids_of_the_tokenizer_itself(text):
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "")
    if not any(token in text for token in SPECIAL_TOKENS):  # what was cut out may have joined another
        assert encode_text(TOKENIZER, text) == TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_asked_for_by_name_it_is_the_token(token):
    text = f"a{token}b{token}" + "".join(other for other in SPECIAL_TOKENS if other != token)
    ids = encode_text(TOKENIZER, text, [token])
    assert [number for number in ids if number < len(SPECIAL_TOKENS)] == [SPECIAL_TOKENS.index(token)] * 2
    assert TOKENIZER.decode(ids) == text
    assert encode_text(TOKENIZER, text, SPECIAL_TOKENS) == TOKENIZER(text)["input_ids"]


@pytest.mark.parametrize(
    ("allowed", "message"), [(["<thnk>"], "<think>"), (["lambda"], "no control token"), ("<think>", "a list")]
)
def test_names_that_are_none(allowed, message):
    with pytest.raises(ValueError, match=message):
        encode_text(TOKENIZER, "a", allowed)


def test_words_that_a_user_adds_are_words():
    tokenizer = trained()
    before = encode_text(tokenizer, "lambda <|new|> <odd> <div>")
    tokenizer.add_tokens(["lambda", "<div>"])
    tokenizer.add_tokens([AddedToken("<|new|>", special=False), AddedToken("<odd>", special=True)])
    added = {name: tokenizer.convert_tokens_to_ids(name) for name in ("lambda", "<div>", "<|new|>", "<odd>")}
    # One with the form of DeepSeek's marks, and one that is special, are control tokens.
    assert set(control_tokens(tokenizer)) == {*SPECIAL_TOKENS, "<|new|>", "<odd>"}
    ids = encode_text(tokenizer, "lambda <|new|> <odd> <div>")
    assert ids != before
    assert added["lambda"] in ids
    assert added["<div>"] in ids
    assert not {added["<|new|>"], added["<odd>"]} & set(ids)
    assert tokenizer.decode(ids) == "lambda <|new|> <odd> <div>"
    lengths = token_byte_lengths(tokenizer)
    assert sum(lengths[number] for number in ids) == len("lambda <|new|> <odd> <div>")
    assert encode_text(tokenizer, "<odd>", ["<odd>"]) == [added["<odd>"]]


def test_a_learned_word_that_is_made_special_is_no_longer_reached():
    tokenizer = trained()
    words = {word: number for word, number in tokenizer.get_vocab().items() if word.isalpha() and len(word) > 3}
    word, number = next(pair for pair in words.items() if encode_text(tokenizer, pair[0]) == [pair[1]])
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    ids = encode_text(tokenizer, f"{word} and {word}s")
    assert number not in ids
    assert tokenizer.decode(ids) == f"{word} and {word}s"


def test_a_tokenizer_that_names_no_control_tokens():
    """As DeepSeek's own: what the template writes is one, and what has their form."""
    tokenizer = trained()
    tokenizer.chat_control_tokens = None
    tokenizer.add_tokens(["[INST]", "word"])
    tokenizer.chat_template = "{% for message in messages %}[INST]{{ message.content }}{% endfor %} a word"
    assert set(control_tokens(tokenizer)) == {*SPECIAL_TOKENS, "[INST]"}
    inst = tokenizer.convert_tokens_to_ids("[INST]")
    assert inst not in encode_text(tokenizer, "a [INST] b")


def test_the_state_of_the_tokenizer_does_not_matter():
    tokenizer = trained()
    expected = encode_text(tokenizer, "<think> a")
    tokenizer("a b", padding="max_length", truncation=True, max_length=2, split_special_tokens=False)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    assert encode_text(tokenizer, "<think> a") == expected
    assert tokenizer("<think>", padding=False)["input_ids"] == [SPECIAL_TOKENS.index("<think>")]


def test_many_texts_are_each_its_own():
    many = ["", "a<think>", "b" * 3000, "", "</think>c"]
    assert encode_texts(TOKENIZER, many) == [encode_text(TOKENIZER, text) for text in many]
    assert encode_texts(TOKENIZER, []) == []


@pytest.mark.parametrize("word", ["ACGT" * 3000, "é" * 4000, "-" * 9000, "深海" * 5000, " " * 9000, "q" * 600])
def test_words_longer_than_any_word_are_learned_and_encoded(word):
    tokenizer = train_tokenizer([word, "def f(x):\n    return x\n" * 5], 282, 64)
    assert tokenizer.decode(encode_text(tokenizer, word)) == word


def test_time_to_learn_from_a_word_is_not_its_length_squared(monkeypatch):
    """Counted, not timed: no pre-token that the trainer sees is longer than the limit."""
    from fathom.tokenizer import bpe

    longest = []
    bare = bpe._bare_tokenizer

    def watched(model, *splits):
        tokenizer = bare(model, *splits)
        if splits:
            longest.append(
                max(end - start for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str("ACGT" * 999))
            )
        return tokenizer

    monkeypatch.setattr(bpe, "_bare_tokenizer", watched)
    monkeypatch.setattr(bpe, "_LONG_WORD_CHARACTERS", 5000)
    seen = [len(piece) for piece in bpe._learned_from(["ACGT" * 1000, "ACGT" * 1000, "ACGT" * 1000, "word " * 900])]
    assert seen == [4000, 1000, bpe._LONGEST_WORD, 4500]
    train_tokenizer(["ACGT" * 999], 280, 64)
    assert longest == [bpe._LONGEST_WORD]

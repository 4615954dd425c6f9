"""Packing: nothing lost, nothing twice, no document in another's targets or logits."""

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_runs import model
from transformers import PreTrainedTokenizerFast

from fathom.tokenizer import token_byte_lengths, train_tokenizer
from fathom.tokenizer.special_tokens import SPECIAL_TOKENS
from fathom.training import packing
from fathom.training.errors import UserError
from fathom.training.packing import IGNORED, collate_rows, pack_documents, pad_conversations

LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def tokenizer():
    """With the bytes and one merge, and a context that is shorter than the documents."""
    return train_tokenizer(["ab ab"] * 3, 277, 16)


def packed_one_by_one(documents: list[str], tokenizer, length: int) -> list[dict[str, list[int]]]:
    """What `pack_documents` has to give, token by token."""
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    rows: list[dict[str, list[int]]] = []
    for text in documents:
        for place, token in enumerate([bos, *tokenizer(text)["input_ids"], eos]):
            if not rows or len(rows[-1]["input_ids"]) == length:
                rows.append({"input_ids": [], "position_ids": [], "labels": []})
            row = rows[-1]
            starts = place == 0 or not row["input_ids"]
            row["position_ids"].append(0 if starts else row["position_ids"][-1] + 1)
            row["input_ids"].append(token)
            row["labels"].append(IGNORED if place == 0 else token)
    missing = length - len(rows[-1]["input_ids"])
    rows[-1]["input_ids"] += [pad] * missing
    rows[-1]["position_ids"] += range(missing)
    rows[-1]["labels"] += [IGNORED] * missing
    return rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.text(LETTERS, max_size=40), min_size=1, max_size=12),
    length=st.integers(min_value=2, max_value=24),
)
def test_rows_equal_a_reference_that_goes_token_by_token(documents, length, tokenizer):
    rows = pack_documents(Dataset.from_dict({"text": documents}), tokenizer, length)
    assert rows.to_list() == packed_one_by_one(documents, tokenizer, length)


def test_batches_of_documents_end_in_padding_and_lose_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "DOCUMENTS_AT_ONCE", 3)
    documents = [LETTERS[: 1 + n % 8] * n for n in range(10)]
    rows = pack_documents(Dataset.from_dict({"text": documents}), tokenizer, 8).to_list()
    expected = [
        row for start in range(0, 10, 3) for row in packed_one_by_one(documents[start : start + 3], tokenizer, 8)
    ]
    assert rows == expected
    tokens = [token for row in rows for token in row["input_ids"] if token != tokenizer.pad_token_id]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokens == [token for text in documents for token in (bos, *tokenizer(text)["input_ids"], eos)]


def test_a_long_document_is_no_reason_for_a_warning(tokenizer, capfd):
    pack_documents(Dataset.from_dict({"text": ["ab" * 100]}), tokenizer, 8)
    assert "longer than" not in capfd.readouterr().err


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_a_packed_document_has_the_logits_it_has_alone(tokenizer, training):
    documents = ["ab", "abcdefgh", "", "hgfedcba" * 2, "c"]
    rows = pack_documents(Dataset.from_dict({"text": documents}), tokenizer, 64)
    language_model = model(vocab_size=len(tokenizer), initializer_range=0.15).train(training)
    with torch.no_grad():
        logits = language_model(**collate_rows(rows.to_list())).logits[0]
        start = 0
        for text in documents:
            alone = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            end = start + alone.shape[1]
            torch.testing.assert_close(logits[start:end], language_model(alone).logits[0], atol=1e-5, rtol=0)
            start = end


def test_packing_does_not_change_the_loss_of_a_document(tokenizer):
    """Loss of one row with three documents = mean over all targets of the documents alone; MTP alike."""
    documents = ["abcdefgh", "hgfedcba", "abab"]
    language_model = model(vocab_size=len(tokenizer), initializer_range=0.15).eval()
    (row,) = pack_documents(Dataset.from_dict({"text": documents}), tokenizer, 40).to_list()
    sums = torch.zeros(2)
    with torch.no_grad():
        packed = language_model(**collate_rows([row]), num_items_in_batch=1)
        for text in documents:
            (alone,) = pack_documents(Dataset.from_dict({"text": [text]}), tokenizer, 40).to_list()
            output = language_model(**collate_rows([alone]), num_items_in_batch=1)
            sums += torch.stack([output.loss, output.mtp_loss])
    torch.testing.assert_close(torch.stack([packed.loss, packed.mtp_loss]), sums, rtol=1e-5, atol=0)


def test_conversations_are_padded_on_the_right_and_padding_is_no_target():
    batch = pad_conversations(
        [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}, {"input_ids": [8], "labels": [8]}], pad_token_id=2
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", "b", " ", "<", "｜>", "\n"]), min_size=1, max_size=9).map("".join)
)
def test_control_tokens_in_documents_are_text_and_their_bytes_count(tokenizer, text):
    rows = pack_documents(Dataset.from_dict({"text": [text, "ab"]}), tokenizer, 16).to_list()
    targets = [label for row in rows for label in row["labels"] if label != IGNORED]
    control = [label for label in targets if label < len(SPECIAL_TOKENS)]
    assert control == [tokenizer.eos_token_id] * 2
    lengths = token_byte_lengths(tokenizer)
    assert sum(lengths[label] for label in targets) == len((text + "ab").encode())


def test_control_tokens_that_are_asked_for(tokenizer):
    documents = Dataset.from_dict({"text": ["a<｜fim▁hole｜>b<think>"]})
    (row,) = pack_documents(documents, tokenizer, 32, allowed_special=["<｜fim▁hole｜>"]).to_list()
    hole, think = (tokenizer.convert_tokens_to_ids(name) for name in ("<｜fim▁hole｜>", "<think>"))
    assert hole in row["input_ids"]
    assert think not in row["input_ids"]
    with pytest.raises(UserError, match="'<hole>' is no control token"):
        pack_documents(documents, tokenizer, 32, allowed_special=["<hole>"])


@pytest.mark.parametrize("has_features", [False, True])
def test_streamed_documents(tokenizer, has_features):
    documents = Dataset.from_dict({"text": [f"abc{n}" * n for n in range(9)], "more": range(9)})
    stream = (
        documents.to_iterable_dataset()
        if has_features
        else IterableDataset.from_generator(lambda: iter(documents.to_list()))
    )
    packed = pack_documents(stream, tokenizer, 8)
    assert list(packed) == pack_documents(documents, tokenizer, 8).to_list()
    assert list(packed) == list(packed), "a stream can be read again"


def test_long_documents_are_packed_a_few_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "BYTES_AT_ONCE", 1000)
    batches = []
    encode_texts = packing.encode_texts
    monkeypatch.setattr(
        packing, "encode_texts", lambda own, texts, named: batches.append(texts) or encode_texts(own, texts, named)
    )
    documents = ["ab" * 100] * 30
    rows = pack_documents(Dataset.from_dict({"text": documents}), tokenizer, 8).to_list()
    assert 3 <= max(map(len, batches)) <= 5
    tokens = [token for row in rows for token in row["input_ids"] if token != tokenizer.pad_token_id]
    assert tokens == [0, *tokenizer(documents[0])["input_ids"], 1] * 30


def test_what_cannot_be_packed(tokenizer):
    with pytest.raises(UserError, match="no column 'body', only text"):
        pack_documents(Dataset.from_dict({"text": ["a"]}), tokenizer, 8, text_column="body")
    with pytest.raises(UserError, match="DatasetDict is no dataset of rows; give one split"):
        pack_documents(DatasetDict(train=Dataset.from_dict({"text": ["a"]})), tokenizer, 8)
    with pytest.raises(UserError, match="holds no rows"):
        pack_documents(IterableDataset.from_generator(lambda: iter(())), tokenizer, 8)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="bos_token, eos_token and pad_token"):
        pack_documents(Dataset.from_dict({"text": ["a"]}), bare, 8)

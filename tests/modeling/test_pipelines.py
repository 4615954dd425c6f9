"""transformers' pipelines on a saved folder, by its path alone: one text at a time, padded batches, chats."""

from pathlib import Path

import pytest
import torch
from generations import GENERATIONS, save_with_tokenizer
from transformers import AutoTokenizer, pipeline

from fathom import FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification

TEXTS = ["def double", "the quick brown fox jumps over the lazy dog.", "01"]


@pytest.fixture(scope="module", params=GENERATIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    save_with_tokenizer(path, request.param)
    return path


def save_classifier(folder: Path, to: Path, model_class: type) -> None:
    torch.manual_seed(0)
    model_class.from_pretrained(folder, num_labels=3).save_pretrained(to)
    AutoTokenizer.from_pretrained(folder).save_pretrained(to)


def greedy(folder: Path, ids: torch.Tensor, new_tokens: int) -> str:
    """What the model writes after `ids` [1, T], every token computed from the whole text before it."""
    model, tokenizer = FathomForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = ids
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[:, -1]
        logits[:, model.generation_config.suppress_tokens] = float("-inf")
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    return tokenizer.decode(text[0, ids.shape[1] :])


def test_text_generation(folder):
    generate, tokenizer = pipeline("text-generation", str(folder)), AutoTokenizer.from_pretrained(folder)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = [greedy(folder, tokenizer(text, return_tensors="pt").input_ids, 8) for text in TEXTS]
    assert [generate(text, **settings)[0]["generated_text"] for text in TEXTS] == expected
    batch = generate(TEXTS, batch_size=3, **settings)
    assert [answers[0]["generated_text"] for answers in batch] == expected

    chat = [{"role": "user", "content": "What is 2 * 2?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = generate(chat, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert answer == [*chat, {"role": "assistant", "content": greedy(folder, prompt["input_ids"], 8)}]


def test_feature_extraction(folder):
    features = pipeline("feature-extraction", str(folder), return_tensors=True)(TEXTS[1])
    ids = AutoTokenizer.from_pretrained(folder)(TEXTS[1], return_tensors="pt").input_ids
    with torch.no_grad():
        expected = FathomForCausalLM.from_pretrained(folder).model(ids).last_hidden_state
    assert torch.equal(features, expected)


def test_text_classification(folder, tmp_path):
    save_classifier(folder, tmp_path, FathomForSequenceClassification)
    classify = pipeline("text-classification", str(tmp_path), top_k=None)
    classifier, tokenizer = classify.model, AutoTokenizer.from_pretrained(tmp_path)
    alone, batch = [classify([text])[0] for text in TEXTS], classify(TEXTS, batch_size=3)
    for text, one, of_many in zip(TEXTS, alone, batch, strict=True):
        with torch.no_grad():
            probabilities = classifier(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        for answers in (one, of_many):
            scores = {answer["label"]: answer["score"] for answer in answers}
            assert scores == pytest.approx({f"LABEL_{i}": p.item() for i, p in enumerate(probabilities)}, abs=1e-5)


def test_token_classification(folder, tmp_path):
    save_classifier(folder, tmp_path, FathomForTokenClassification)
    label = pipeline("token-classification", str(tmp_path))
    classifier, tokenizer = label.model, AutoTokenizer.from_pretrained(tmp_path)
    alone, batch = [label(text) for text in TEXTS], label(TEXTS, batch_size=3)
    for text, one, of_many in zip(TEXTS, alone, batch, strict=True):
        with torch.no_grad():
            probabilities = classifier(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
        for answers in (one, of_many):
            assert [answer["entity"] for answer in answers] == [f"LABEL_{i}" for i in probabilities.argmax(-1)]
            assert [answer["score"] for answer in answers] == pytest.approx(probabilities.amax(-1).tolist(), abs=1e-5)
            assert [text[answer["start"] : answer["end"]].strip() for answer in answers] == [
                tokenizer.decode([token]).strip() for token in tokenizer(text).input_ids
            ]

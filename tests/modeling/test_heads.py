"""Heads and the everyday interface: classifiers, recorded outputs, vocabulary, generation, pipeline."""

import logging

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import Dataset
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fathom import (
    FathomConfig,
    FathomForCausalLM,
    FathomForSequenceClassification,
    FathomForTokenClassification,
    FathomModel,
)

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 2,
}
CLASSIFIERS = [FathomForSequenceClassification, FathomForTokenClassification]


def config(**overrides) -> FathomConfig:
    return FathomConfig(**{**SHAPE, **overrides})


def model(**overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    return FathomForCausalLM(config(**overrides)).eval()


def tokens(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def test_sequence_classification():
    torch.manual_seed(0)
    classifier = FathomForSequenceClassification(config(num_labels=4)).eval()
    ids = tokens(3, 10)
    ids[1, 6:] = ids[2, 3:] = 2
    mask = (ids != 2).long()
    labels = torch.tensor([0, 3, 1])
    outputs = classifier(ids, attention_mask=mask, labels=labels)
    # The last real token of each row, also if the row is read alone and unpadded.
    for row, length in enumerate((10, 6, 3)):
        states = classifier.model(ids[row : row + 1, :length]).last_hidden_state[0, -1]
        torch.testing.assert_close(outputs.logits[row], classifier.score.weight @ states, atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))


def test_token_classification():
    torch.manual_seed(0)
    classifier = FathomForTokenClassification(config(num_labels=5)).eval()
    labels = torch.randint(0, 5, (2, 12))
    labels[0, :4] = -100
    outputs = classifier(tokens(), labels=labels)
    states = classifier.model(tokens()).last_hidden_state
    torch.testing.assert_close(outputs.logits, states @ classifier.score.weight.T + classifier.score.bias)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()))


def test_classifier_dropout():
    assert FathomForTokenClassification(config(classifier_dropout=0.0)).dropout.p == 0.0
    assert FathomForTokenClassification(config(classifier_dropout=0.3)).dropout.p == 0.3
    assert FathomForTokenClassification(config()).dropout.p == 0.1


@pytest.mark.parametrize("classifier_class", CLASSIFIERS)
@pytest.mark.parametrize("kinds", [None, ["dense", "moe", "moe", "moe", "moe"]], ids=["default", "listed"])
def test_classifier_from_a_language_model(tmp_path, caplog, monkeypatch, classifier_class, kinds):
    """Takes over the body; the head and the MTP layers, however many, are dropped without a word."""
    language_model = model(num_nextn_predict_layers=2, channel_mixers=kinds)
    language_model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        classifier, info = classifier_class.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"score"}
    assert "UNEXPECTED" not in caplog.text
    assert classifier.config.num_nextn_predict_layers == 0
    assert len(classifier.model.layers) == 3
    with torch.no_grad():
        expected = language_model.model(tokens()).last_hidden_state
        torch.testing.assert_close(classifier.eval().model(tokens()).last_hidden_state, expected, atol=1e-6, rtol=0)
    assert language_model.config.num_nextn_predict_layers == 2

    classifier.save_pretrained(tmp_path / "classifier")
    reread, info = classifier_class.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(reread(tokens()).logits, classifier(tokens()).logits)


@pytest.mark.parametrize("classifier_class", CLASSIFIERS)
def test_every_parameter_of_a_classifier_gets_a_gradient(classifier_class):
    torch.manual_seed(0)
    classifier = classifier_class(config(num_labels=3)).train()
    shape = (4,) if classifier_class is FathomForSequenceClassification else (4, 40)
    classifier(tokens(4, 40), labels=torch.randint(0, 3, shape)).loss.backward()
    assert [name for name, p in classifier.named_parameters() if p.grad is None or not p.grad.any()] == []


class Labelled(Dataset):
    def __init__(self, per_token: bool):
        self.per_token = per_token

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = tokens(8, 12)[index]
        return {"input_ids": row, "labels": row % 3 if self.per_token else row.sum() % 3}


@pytest.mark.parametrize("classifier_class", CLASSIFIERS)
def test_classifier_training_does_not_depend_on_accumulation(classifier_class, tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        classifier = classifier_class(config(num_labels=3, classifier_dropout=0.0))
        per_token = classifier_class is FathomForTokenClassification
        Trainer(classifier, arguments, train_dataset=Labelled(per_token)).train()
        results.append(classifier.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_recorded_outputs_equal_stock():
    """Hidden states, attention weights and router logits, layer by layer; MTP layers are not among them."""
    torch.manual_seed(0)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**SHAPE, attn_implementation="eager")).eval()
    ours = model(attn_implementation="eager")
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("model.layers.3.") for name in missing)
    ids = tokens()
    recorded = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        theirs = stock(ids, **recorded)
        mine = ours(ids, labels=ids, output_router_logits=True, **recorded)
    assert len(mine.hidden_states) == len(theirs.hidden_states) == 4
    assert len(mine.attentions) == len(theirs.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for got, expected in zip(mine[name], theirs[name], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert len(mine.router_logits) == 2
    for layer, logits in zip(ours.model.layers[1:3], mine.router_logits, strict=True):
        assert logits.shape == (24, 8)
        assert layer.mlp.gate.weight.shape == (8, 64)
    plain = ours(ids)
    assert plain.hidden_states is plain.attentions is plain.router_logits is None


def test_outputs_as_tuple():
    ours, ids = model(), tokens()
    loss, logits = ours(ids, labels=ids, use_cache=False, return_dict=False)[:2]
    named = ours(ids, labels=ids)
    torch.testing.assert_close(loss, named.loss)
    torch.testing.assert_close(logits, named.logits)


@pytest.mark.usefixtures("long_texts")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [110, 50])
def test_resizing_the_vocabulary(tmp_path, size, tied):
    ours = model(tie_word_embeddings=tied)
    ids = tokens() % 47 + 3
    with torch.no_grad():
        before = ours(ids, labels=ids)
        ours.resize_token_embeddings(size, mean_resizing=False)
        after = ours(ids, labels=ids)
    assert ours.config.vocab_size == size
    torch.testing.assert_close(after.logits[..., : min(size, 97)], before.logits[..., : min(size, 97)])
    assert after.mtp_loss.isfinite()
    ours.train()(ids, labels=ids).loss.backward()
    assert ours.model.embed_tokens.weight.grad.shape == (size, 64)
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(FathomForCausalLM.from_pretrained(tmp_path)(ids).logits, after.logits)


def test_tied_embeddings(tmp_path):
    ours = model(tie_word_embeddings=True)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    ours.save_pretrained(tmp_path)
    loaded = FathomForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, ours(tokens()).logits)


def test_base_model_gives_the_states_under_the_head():
    ours = model()
    with torch.no_grad():
        states = ours.model(tokens()).last_hidden_state
        torch.testing.assert_close(ours.lm_head(states), ours(tokens()).logits)
    assert isinstance(ours.get_decoder(), FathomModel)


def test_text_generation_pipeline():
    """The pipeline's text is the model's own greedy choice, token by token."""
    words = ["<bos>", "<eos>", "<pad>", *(f"w{i}" for i in range(94))]
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    ours, prompt = model(eos_token_id=None), "w1 w2 w3"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, ours(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    generate = pipeline("text-generation", ours, tokenizer=tokenizer, device="cpu")
    text = generate(prompt, max_new_tokens=6, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert text.split() == [words[i] for i in ids[0, 3:]]

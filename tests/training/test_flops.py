"""Work per token against torch's own count of what a forward and backward pass does."""

import math

import pytest
import torch
from tiny_runs import model
from torch.utils.flop_counter import FlopCounterMode

from fathom import FathomConfig, FathomForCausalLM, FathomForSequenceClassification
from fathom.training.flops import bf16_pays, keys_read, measured_throughput, training_flops_per_token

LENGTH = 16


def counted(language_model: FathomForCausalLM) -> float:
    """FLOPs per token forward and backward, as counted by torch from the shapes of all products but grouped ones.

    Nor does it count those that `modeling.products` gives to oneDNN.
    """
    ids = torch.randint(3, language_model.config.vocab_size, (2, LENGTH))
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        language_model(ids, labels=ids).loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("overrides", [{}, {"num_nextn_predict_layers": 2}, {"q_lora_rank": None}], ids=str)
def test_v3_equals_the_count(overrides):
    language_model = model(attn_implementation="eager", experts_implementation="eager", **overrides).train()
    check(language_model)


def test_classic_equals_the_count():
    config = FathomConfig.preset(
        "classic",
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=97,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    check(FathomForCausalLM(config).train())


def check(language_model: FathomForCausalLM) -> None:
    """Eager attention computes all T x T scores, of which the formula counts the causal half."""
    with_half = training_flops_per_token(language_model, LENGTH)
    without = training_flops_per_token(language_model, 0)
    assert with_half > without
    assert without + 2 * (with_half - without) == pytest.approx(counted(language_model), rel=0.01)


def test_v32_costs_its_indexers_more_than_v3_while_every_key_is_chosen():
    """By hand; counted although a text that short leaves nothing to choose. Frozen ones run forward only."""
    config = FathomConfig.preset("v3.2", hidden_size=64, num_hidden_layers=2, vocab_size=97, index_topk=LENGTH)
    sparse = FathomForCausalLM(config)
    dense = FathomForCausalLM(FathomConfig.preset("v3", hidden_size=64, num_hidden_layers=2, vocab_size=97))
    indexer = sparse.model.layers[0].self_attn.indexer
    heads, width, query_latent = 32, 32, config.q_lora_rank
    per_layer = 2 * (query_latent * heads * width + 64 * (width + heads)) + 2 * heads * width * LENGTH / 2
    assert indexer.wq_b.weight.numel() == query_latent * heads * width
    # Three indexers: two main layers and the MTP layer.
    difference = training_flops_per_token(sparse, LENGTH) - training_flops_per_token(dense, LENGTH)
    assert difference == pytest.approx(3 * 3 * per_layer)
    frozen = FathomForCausalLM(FathomConfig(**{**config.to_dict(), "indexer_loss_coef": 0.0}))
    difference = training_flops_per_token(frozen, LENGTH) - training_flops_per_token(dense, LENGTH)
    assert difference == pytest.approx(3 * per_layer)
    # While indexers warm up, the rest runs forward only.
    for name, parameter in sparse.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    warm_up = training_flops_per_token(sparse, LENGTH)
    assert warm_up == pytest.approx(training_flops_per_token(dense, LENGTH) / 3 + 3 * 3 * per_layer)


def test_frozen_matrices_behind_what_learns():
    """As beside adapters: gradients pass through all of them, and none has one."""
    language_model = model(attn_implementation="eager", experts_implementation="eager").train().requires_grad_(False)
    language_model.model.layers[0].input_layernorm.requires_grad_(True)
    check(language_model)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("mha", lambda t, most: t),
        ("dsa", lambda t, most: min(t, most)),
        ("swa", lambda t, most: min(t, 20)),
        ("csa", lambda t, most: min(t, 20) + min(t / 4, most)),
        ("hca", lambda t, most: min(t, 20) + t / 32),
    ],
)
@pytest.mark.parametrize("length", [16, 1000])
@pytest.mark.parametrize("dense", [False, True])
def test_keys_read_are_the_mean_over_the_text(kind, limits, length, dense):
    """Of a dense model an indexer chooses nothing."""
    config = FathomConfig.preset("v4", sliding_window=20, index_topk=30, index_dense=dense)
    steps, most = 20000, math.inf if dense else 30
    mean = sum(limits(length * (i + 0.5) / steps, most) for i in range(steps)) / steps
    assert keys_read(config, kind, length) == pytest.approx(mean, rel=1e-4)


def test_v4_is_near_the_count():
    """Torch counts masked scores and the sums over residual streams as well; at this length both are small."""
    shape = {"hidden_size": 256, "num_hidden_layers": 3, "vocab_size": 97}
    # Torch does not count grouped products.
    config = FathomConfig.preset("v4", experts_implementation="eager", **shape)
    language_model = FathomForCausalLM(config).train()
    assert training_flops_per_token(language_model, LENGTH) == pytest.approx(counted(language_model), rel=0.05)


def test_a_classifier_has_no_second_head():
    config = FathomConfig.preset("v3", hidden_size=64, num_hidden_layers=2, vocab_size=97)
    classifier = FathomForSequenceClassification(config)
    assert (
        0 < training_flops_per_token(classifier, LENGTH) < training_flops_per_token(FathomForCausalLM(config), LENGTH)
    )


def test_a_measurement_leaves_the_random_numbers_alone():
    """Else --precision auto would start from other weights than --precision fp32."""
    before = torch.get_rng_state()
    assert measured_throughput(torch.float32, torch.device("cpu"), size=64, seconds=0.01) > 1e6
    assert isinstance(bf16_pays(torch.device("cpu")), bool)
    assert torch.equal(torch.get_rng_state(), before)

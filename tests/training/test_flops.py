"""Work per token against torch's own count of what a forward and backward pass does."""

import pytest
import torch
from tiny_runs import model
from torch.utils.flop_counter import FlopCounterMode

from fathom import FathomConfig, FathomForCausalLM, FathomForSequenceClassification
from fathom.training.flops import bf16_pays, measured_throughput, training_flops_per_token

LENGTH = 16


def counted(language_model: FathomForCausalLM) -> tuple[float, float]:
    """FLOPs per token of (forward, forward and backward), as counted by torch from the shapes of all products."""
    ids = torch.randint(3, language_model.config.vocab_size, (2, LENGTH))
    with FlopCounterMode(display=False) as forward:
        loss = language_model(ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops() / ids.numel(), (
        forward.get_total_flops() + backward.get_total_flops()
    ) / ids.numel()


@pytest.mark.parametrize("overrides", [{}, {"num_nextn_predict_layers": 2}, {"q_lora_rank": None}], ids=str)
def test_v3_equals_the_count(overrides):
    language_model = model(attn_implementation="eager", **overrides).train()
    check(language_model)


def test_classic_equals_the_count():
    config = FathomConfig.preset(
        "classic", hidden_size=64, num_hidden_layers=2, vocab_size=97, attn_implementation="eager"
    )
    check(FathomForCausalLM(config).train())


def check(language_model: FathomForCausalLM) -> None:
    """Eager attention computes all T x T scores, of which the formula counts the causal half."""
    with_half = training_flops_per_token(language_model, LENGTH)
    without = training_flops_per_token(language_model, 0)
    assert with_half > without
    forward, both = counted(language_model)
    assert without + 2 * (with_half - without) == pytest.approx(3 * forward, rel=0.005)
    assert both == pytest.approx(3 * forward, rel=0.01)


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

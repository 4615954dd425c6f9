"""The loss and its gradients are those of all targets of a step: however the rows are cut, padded, ordered, shared out.

Rows of unequal length with unequal numbers of targets and an MTP layer; plain Trainer with the callback, FathomTrainer
and TRL's. SGD, so that a weight's change is its gradient; all weights within 1e-6, for rounding.
"""

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from sft_steps import KINDS, PLANS, ROWS, collate, first_experts, train, word_tokenizer
from tiny_runs import VOCABULARY, model, torchrun

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.experts import TopKRouter
from fathom.training.errors import UserError


def weights_and_losses(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    history = json.loads((folder / "history.json").read_text())
    return FathomForCausalLM.from_pretrained(folder).state_dict(), [
        entry["loss"] for entry in history if "loss" in entry
    ]


def assert_same(one: Path, other: Path) -> None:
    (ours, losses), (theirs, other_losses) = weights_and_losses(one), weights_and_losses(other)
    assert len(losses) == 3
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-6
    biases = [name for name in ours if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].any() for name in biases)
    start = model().state_dict()
    assert all((ours[name] - start[name]).abs().max() > 1e-5 for name in ours if "down_proj" in name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Plain Trainer, eight rows at once."""
    folder = tmp_path_factory.mktemp("alone")
    train("plain", folder, batch=8, accumulation=1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_trainer_change_nothing(kind, alone, tmp_path):
    train(kind, tmp_path, batch=2, accumulation=4)
    assert_same(alone, tmp_path)


def test_order_within_a_step_changes_nothing(alone, tmp_path):
    train("plain", tmp_path, batch=4, accumulation=2, order=lambda step: step[::-1])
    assert_same(alone, tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Two processes, two rows at a time on each, by every Trainer."""
    folder = tmp_path_factory.mktemp("shared")
    process = torchrun(str(Path(__file__).parents[1] / "sft_steps.py"), str(folder))
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_change_nothing(kind, alone, shared):
    assert_same(alone, shared / kind)


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> Path:
    """Two processes that have a part of the model each."""
    folder = tmp_path_factory.mktemp("cut")
    process = torchrun(str(Path(__file__).parents[1] / "sft_steps.py"), str(folder), "plans")
    assert process.returncode == 0, process.stderr[-5000:]
    return folder


@pytest.mark.parametrize("plan", PLANS)
def test_a_model_cut_by_transformers_trains_the_same_weights(plan, alone, cut):
    """Tensor parallelism, and experts of their own for each rank by both ways that tokens can reach them."""
    assert_same(alone, cut / plan)


@pytest.mark.parametrize("plan", PLANS)
def test_a_rank_whose_experts_get_no_token_neither_hangs_nor_errs(plan, cut, tmp_path):
    with mock.patch.object(TopKRouter, "choose", first_experts):
        train("plain", tmp_path, batch=8, accumulation=1)
    assert_same(tmp_path, cut / f"{plan}-of-rank-0")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("generation", ["moe", "v2", "v3", "v3.2", "v4"])
def test_padding_changes_nothing(generation, side):
    """Loss, gradients and routed tokens of rows of a batch are those of the rows alone, padded far or not at all."""
    # A batch's balance loss weighs as much as its share of the targets: rows alone would be weighed otherwise.
    small = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3}
    config = FathomConfig.preset(generation, **small, seq_aux_loss_coef=0.0, aux_loss_alpha=0.0)
    results = []
    for pad in (0, 9):
        torch.manual_seed(0)
        trained = FathomForCausalLM(config).train()
        together = [ROWS[:4]] if pad else [[row] for row in ROWS[:4]]
        batches = [collate(rows, pad=pad, side=side) for rows in together]
        targets = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        loss = sum(trained(**batch, num_items_in_batch=targets).loss for batch in batches)
        loss.backward()
        learning = {name: parameter for name, parameter in trained.named_parameters() if parameter.requires_grad}
        results.append(
            (loss, {name: parameter.grad for name, parameter in learning.items()}, trained.update_router_bias())
        )
    (ours, gradients, load), (padded, padded_gradients, padded_load) = results
    torch.testing.assert_close(padded, ours, rtol=1e-6, atol=0)
    assert torch.equal(load, padded_load)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[name], gradient, rtol=0, atol=1e-6, msg=name)


def test_only_our_trainer_of_trl_s_trains_everything(tmp_path):
    """What TRL's own leaves out, which is why there is `FathomSFTTrainer`."""
    train("trl itself", tmp_path, batch=2, accumulation=4)
    weights, _ = weights_and_losses(tmp_path)
    start = model().state_dict()
    assert torch.equal(weights["model.layers.2.eh_proj.weight"], start["model.layers.2.eh_proj.weight"])


@pytest.mark.parametrize("loss", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_another_loss_is_refused(loss, tmp_path):
    from trl import SFTConfig

    from fathom.training.trl import FathomSFTTrainer

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "use_cpu": True, "bf16": False, "report_to": []}
    with pytest.raises(UserError, match="trains by the model's own loss"):
        FathomSFTTrainer(
            model=model(),
            args=SFTConfig(str(tmp_path), **prepared, **loss),
            train_dataset=Dataset.from_list(ROWS),
            data_collator=collate,
            processing_class=word_tokenizer(),
        )

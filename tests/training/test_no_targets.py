"""Steps whose labels are all -100 under the Trainers: the loss is 0, the weights stay, and the run goes on."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from generations import GENERATIONS
from generations import model as of_generation
from no_targets_on_ranks import GENERATIONS as ON_RANKS
from no_targets_on_ranks import STEPS, train
from safetensors.torch import load_file
from tiny_runs import model, packed_rows, torchrun, trainer
from transformers import Trainer, TrainerCallback

from fathom import FathomTrainer
from fathom.training.guard import ENOUGH, StepGuard


def some_without(rows: Dataset, without: list[int]) -> Dataset:
    """Rows of which some ask for nothing."""

    def ignore(row: dict, index: int) -> dict:
        return {"labels": [-100] * len(row["labels"])} if index in without else row

    return rows.map(ignore, with_indices=True)


class Weights(TrainerCallback):
    """What the model is after every step."""

    def __init__(self) -> None:
        self.after: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.after.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", [Trainer, FathomTrainer])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_step_without_targets_changes_nothing(generation, kind, accumulation, tmp_path):
    """The second of three, by SGD with no decay; routing biases follow the load, which there is."""
    weights, rows = Weights(), packed_rows(6 * accumulation)
    without = list(range(2 * accumulation, 4 * accumulation))
    settings = {"optim": "sgd", "gradient_accumulation_steps": accumulation}
    made = trainer(
        tmp_path, of_generation(generation), some_without(rows, without), kind=kind, callbacks=[weights], **settings
    )
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(made.train_dataset)
    made.train()
    first, second, third = weights.after
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert third[name].isfinite().all(), name
        if not name.endswith("e_score_correction_bias"):
            assert torch.equal(second[name], value), name
    assert any((third[name] != value).any() for name, value in second.items())
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["loss"] > 0 for entry in history] == [True, False, True]
    assert history[1]["loss"] == history[1]["grad_norm"] == history[1].get("mtp_loss", 0) == 0
    assert all(math.isfinite(value) for entry in history for value in entry.values())


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_weight_stays_finite_by_the_defaults_of_the_trainer(generation, tmp_path):
    """AdamW, clipped gradients, and no row with a target at all."""
    trained = of_generation(generation)
    made = trainer(tmp_path, trained, some_without(packed_rows(6), list(range(6))), kind=Trainer)
    made.train()
    assert all(value.isfinite().all() for value in trained.state_dict().values())
    assert [entry["loss"] for entry in made.state.log_history if "loss" in entry] == [0, 0, 0]


@pytest.mark.parametrize("generation", ON_RANKS)
def test_a_micro_batch_without_targets_adds_nothing(generation, tmp_path):
    whole = train(tmp_path, generation, batch=4)
    cut = train(tmp_path, generation, batch=1, accumulation=4)
    assert whole["losses"][2] == cut["losses"][2] == 0
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=1e-5)


def test_on_one_of_two_ranks(tmp_path):
    """Gradients are reduced over both, so that zeros are waited for and NaNs would be everyone's."""
    process = torchrun(str(Path(__file__).parents[1] / "no_targets_on_ranks.py"), str(tmp_path), timeout=300)
    assert process.returncode == 0, process.stderr[-5000:]
    for generation in ON_RANKS:
        expected = train(tmp_path, generation, batch=4)
        for average in (True, False):
            one, other = (load_file(tmp_path / f"{generation}-{average}-{rank}.safetensors") for rank in (0, 1))
            assert len(one["losses"]) == STEPS
            assert one["losses"][2] == 0
            for name, value in one.items():
                assert value.isfinite().all(), name
                assert torch.equal(other[name], value), name
            if average:
                torch.testing.assert_close(one, expected, atol=1e-6, rtol=1e-5)


def test_smoothed_labels(tmp_path):
    rows = some_without(packed_rows(6), [2, 3])
    made = trainer(tmp_path, model(), rows, label_smoothing_factor=0.1)
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(made.train_dataset)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses[1] == 0
    assert min(losses[0], losses[2]) > 0


def test_bits_per_byte_of_nothing(tmp_path):
    """Figures of no targets say so, and are numbers."""
    heldout = some_without(packed_rows(3), [0, 1, 2])
    made = trainer(tmp_path, model(), packed_rows(2), heldout, token_bytes=[1] * 97)
    figures = made.evaluate()
    assert figures["eval_targets"] == 0
    assert figures["eval_loss"] == figures["eval_bits_per_byte"] == figures["eval_mtp_loss"] == 0
    assert all(math.isfinite(value) for value in figures.values())


def test_some_held_out_rows_without_targets_change_no_figure(tmp_path):
    rows = packed_rows(4)
    both = [
        trainer(tmp_path, model(), rows, heldout, token_bytes=[1] * 97, per_device_eval_batch_size=1).evaluate()
        for heldout in (rows.select([0, 2]), some_without(rows, [1, 3]))
    ]
    for name in ("eval_loss", "eval_bits_per_byte", "eval_mtp_loss", "eval_targets"):
        assert both[1][name] == pytest.approx(both[0][name], rel=1e-9)


def test_steps_without_targets_are_not_what_is_usual():
    """A loss of 2 is no spike because most steps before it had no loss."""
    guard = StepGuard(spike_factor=3.0)
    for loss in [2.0] * ENOUGH + [0.0] * 3 * ENOUGH:
        assert guard.objection(loss, 0.0) is None
        guard.remember(loss)
    assert guard.objection(2.1, 0.0) is None
    assert "median" in guard.objection(7.0, 0.0)

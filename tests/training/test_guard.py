"""A step that is not finite, or a spike, ends training before the weights take it, and says where it began."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import make_corpus_and_tokenizer, model, packed_rows, pretrain_words, trainer
from transformers import TrainerCallback

from fathom.scripts import cli
from fathom.training.errors import DivergedError
from fathom.training.guard import ENOUGH, StepGuard
from fathom.training.run import SampleCallback


class Spoil(TrainerCallback):
    """Runs `spoil` on the model before a step, and keeps the weights that the step began with."""

    def __init__(self, at_step: int, spoil):
        self.at_step, self.spoil = at_step, spoil

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.at_step - 1:
            self.spoil(model)
            self.before = {name: value.clone() for name, value in model.state_dict().items()}


def put_nan(language_model) -> None:
    language_model.model.layers[1].mlp.experts.down_proj.data[:, 0, 0] = math.nan


class NanBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def nan_backward(language_model) -> None:
    norm = language_model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda _, __, output: NanBackward.apply(output))


def infinite_vector(language_model) -> None:
    language_model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize(
    ("spoil", "reason", "origin", "max_grad_norm"),
    [
        (put_nan, "the loss is nan", "the output of model.layers.1.mlp.experts", 1.0),
        (nan_backward, "the gradient norm is nan", "the gradient of the output of model.layers.0.ffn_hc", 1.0),
        (infinite_vector, "the gradient norm is ", "the gradient of model.norm.weight", 0.0),
    ],
)
def test_what_is_not_finite_ends_training_with_its_origin(spoil, reason, origin, max_grad_norm, tmp_path):
    trained, spoiled, data = model(), Spoil(3, spoil), packed_rows(12)
    of_run = trainer(
        tmp_path,
        trained,
        data,
        max_steps=6,
        max_grad_norm=max_grad_norm,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=1,
        callbacks=[spoiled],
        seed=0,
    )
    with pytest.raises(DivergedError) as error:
        of_run.train()
    folder = tmp_path / "diverged-3"
    assert str(error.value).startswith(f"step 3: {reason}")
    assert str(error.value).endswith(
        f"; it began in {origin}; the step was not taken, report and batch are in {folder}"
    )
    after = trained.state_dict()
    assert all(torch.equal(value.nan_to_num(7), after[name].nan_to_num(7)) for name, value in spoiled.before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2", "diverged-3"]

    report = json.loads((folder / "report.json").read_text())
    assert (report["step"], report["origin"]) == (3, origin)
    saved = load_file(folder / "rank-0.safetensors")
    assert sorted(saved) == sorted(f"{n}.{name}" for n in (0, 1) for name in ("input_ids", "labels", "position_ids"))
    rows = [row["input_ids"] for row in data]
    kept = torch.cat([saved["0.input_ids"], saved["1.input_ids"]]).tolist()
    assert len(kept) == 4
    assert all(row in rows for row in kept)


def test_the_saved_batch_gives_the_trouble_again(tmp_path):
    """Token 6 is poison; four rows have it."""
    trained, data = model(), packed_rows(12)
    trained.model.embed_tokens.weight.data[6] = math.inf
    with pytest.raises(DivergedError, match=r"began in the output of model\.embed_tokens"):
        trainer(tmp_path, trained, data, max_steps=12, per_device_train_batch_size=1, learning_rate=0.0).train()
    (file,) = tmp_path.glob("diverged-*/rank-0.safetensors")
    batch = {name.removeprefix("0."): value for name, value in load_file(file).items()}
    assert (batch["input_ids"] == 6).any()
    assert not trained(**batch).loss.isfinite()


def test_a_spike_is_a_loss_above_the_median_of_enough_steps():
    guard = StepGuard(spike_factor=2.0)
    guard.recent.extend([3.0] * (ENOUGH - 1))
    assert guard.objection(100.0, 1.0) is None
    guard.recent.append(9.0)
    assert guard.objection(6.0, 1.0) is None
    assert guard.objection(6.1, 1.0) == "the loss 6.1 is above 2 x 3, the median of the last steps"
    assert StepGuard().objection(1e30, 1e30) is None
    assert StepGuard().objection(math.inf, 1.0) == "the loss is inf"


def test_a_spike_ends_training(tmp_path):
    def louder(language_model) -> None:
        language_model.lm_head.weight.data.normal_(std=3)

    of_run = trainer(tmp_path, model(), packed_rows(4), max_steps=60, callbacks=[Spoil(30, louder)], spike_factor=3.0)
    with pytest.raises(
        DivergedError, match=r"^step 30: the loss \S+ is above 3 x \S+, the median of the last steps; the"
    ):
        of_run.train()
    assert json.loads((tmp_path / "diverged-30" / "report.json").read_text())["origin"] is None


def test_a_run_that_diverges_ends_with_code_1_and_can_be_resumed(tmp_path, monkeypatch, capsys):
    make_corpus_and_tokenizer(tmp_path / "data")
    out = tmp_path / "run"

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            put_nan(model)

    monkeypatch.setattr(SampleCallback, "on_step_begin", on_step_begin)
    assert cli.main(["pretrain", *pretrain_words(tmp_path / "data", out)]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("fathom pretrain: error: step 3: the loss is nan; it began in the output of model.layers.1")
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    assert cli.main(["pretrain", *pretrain_words(tmp_path / "data", out, "--resume")]) == 0
    assert all(value.isfinite().all() for value in load_file(out / "model.safetensors").values())


def test_the_guard_looks_once_per_step_and_forgets(tmp_path):
    of_run = trainer(tmp_path, model(), packed_rows(16), gradient_accumulation_steps=2)
    of_run.train()
    assert len(of_run.guard.recent) == 3
    assert of_run.guard.batches == []
    losses = [entry["loss"] for entry in of_run.state.log_history if "loss" in entry]
    assert list(of_run.guard.recent) == pytest.approx(losses, rel=1e-4)

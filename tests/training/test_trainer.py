"""FathomTrainer: the same weights as the plain Trainer, and figures that a hand computation gives as well."""

import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from datasets import Dataset
from tiny_runs import LENGTH, VOCABULARY, model, trainer
from tiny_runs import packed_rows as rows
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from fathom import FathomConfig, FathomForCausalLM, FathomForSequenceClassification, FathomTrainer, RouterBiasCallback
from fathom.modeling.experts import TopKRouter
from fathom.training.diagnostics import load_ratio
from fathom.training.optimizers import MuonFactory
from fathom.training.packing import IGNORED, collate_rows
from fathom.training.trainer import InterruptCallback


def logged(fathom_trainer, name: str) -> list[float]:
    return [entry[name] for entry in fathom_trainer.state.log_history if name in entry]


class CountUpdates(TrainerCallback):
    """How many routing biases moved in each optimizer step, and how often in between."""

    def __init__(self, trained):
        self.routers = [module for module in trained.modules() if isinstance(module, TopKRouter)]
        self.seen = self.biases()
        self.moves: list[float] = []

    def biases(self) -> torch.Tensor:
        return torch.stack([router.e_score_correction_bias.clone() for router in self.routers])

    def on_step_end(self, args, state, control, **kwargs):
        self.moves.append((self.biases() - self.seen).abs().max().item())
        self.seen = self.biases()

    def on_substep_end(self, args, state, control, **kwargs):
        assert torch.equal(self.biases(), self.seen)

    def on_evaluate(self, args, state, control, **kwargs):
        assert torch.equal(self.biases(), self.seen)


def test_bias_moves_once_per_optimizer_step_and_never_in_evaluation(tmp_path):
    trained = model()
    count = CountUpdates(trained)
    trainer(
        tmp_path,
        trained,
        rows(64),
        rows(5, seed=1),
        callbacks=[count],
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    ).train()
    assert count.moves == pytest.approx([trained.config.router_bias_update_speed] * 3, rel=1e-3)


def test_the_plain_trainer_with_the_callback_trains_the_same_weights(tmp_path):
    results = []
    for kind, callbacks in ((FathomTrainer, []), (Trainer, [RouterBiasCallback()]), (Trainer, [])):
        trained = model()
        # The plain Trainer's loss is computed from whole logits, which rounds otherwise; AdamW would divide by it where
        # a gradient is next to nothing.
        settings = {"gradient_accumulation_steps": 4, "optim": "sgd"}
        trainer(tmp_path, trained, rows(32), kind=kind, callbacks=callbacks, **settings).train()
        results.append(trained.state_dict())
    ours, plain, without = results
    for name in ours:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-6, atol=1e-7)
    moved = [name for name in ours if "e_score_correction_bias" in name]
    assert moved
    assert all(torch.equal(ours[name], plain[name]) for name in moved)
    assert not any(torch.equal(ours[name], without[name]) for name in moved)


def test_accumulation_changes_neither_gradients_nor_figures(tmp_path):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trained = model(seq_aux_loss_coef=0.05)
        # SGD without clipping: the change of a weight is its gradient times the learning rate.
        of_run = trainer(
            tmp_path,
            trained,
            rows(24),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        )
        of_run.train()
        figures = [logged(of_run, name) for name in ("loss", "mtp_loss", "balance_loss", "expert_load")]
        # Gradients and first losses; a row's share of the balance loss depends on its micro-batch's targets.
        results.append((trained.state_dict(), figures))
    (weights, figures), (weights_accumulated, figures_accumulated) = results
    for ours, accumulated in zip(figures, figures_accumulated, strict=True):
        assert len(ours) == 3
        assert accumulated == pytest.approx(ours, rel=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(weights_accumulated[name], value, atol=2e-5, rtol=1e-3, msg=f"{name} differs")


def by_hand(language_model: FathomForCausalLM, heldout: Dataset, token_bytes: list[int]) -> dict[str, float]:
    """Evaluation row by row: every row alone, every target by itself."""
    nats = mtp_nats = 0.0
    targets = mtp_targets = size = 0
    first = language_model.config.num_hidden_layers
    caught = {}
    language_model.model.layers[first].register_forward_hook(lambda _, __, out: caught.update(mtp=out[0]))
    for row in heldout:
        batch = collate_rows([row])
        with torch.no_grad():
            logits = language_model(**batch).logits[0].double().log_softmax(-1)
            drafts = language_model.lm_head(caught["mtp"])[0].double().log_softmax(-1)
        labels, positions = row["labels"], row["position_ids"]
        for at in range(LENGTH - 1):
            if labels[at + 1] != IGNORED:
                nats -= logits[at, labels[at + 1]].item()
                targets += 1
                size += token_bytes[labels[at + 1]]
            inside = at + 2 < LENGTH and positions[at + 2] == positions[at] + 2
            if inside and labels[at + 2] != IGNORED:
                mtp_nats -= drafts[at, labels[at + 2]].item()
                mtp_targets += 1
    return {
        "eval_loss": nats / targets,
        "eval_targets": targets,
        "eval_perplexity": math.exp(nats / targets),
        "eval_bits_per_byte": nats / math.log(2) / size,
        "eval_mtp_loss": mtp_nats / mtp_targets,
    }


@pytest.mark.parametrize("batch", [1, 3, 4, 16])
def test_evaluation_equals_a_hand_computation_whatever_the_batch(batch, tmp_path):
    heldout, token_bytes = rows(11, seed=2), [id % 5 for id in range(VOCABULARY)]
    trained = model(initializer_range=0.1)
    metrics = trainer(
        tmp_path, trained, heldout=heldout, token_bytes=token_bytes, per_device_eval_batch_size=batch
    ).evaluate()
    expected = by_hand(trained.eval(), heldout, token_bytes)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 1 <= metrics["eval_expert_load"] <= metrics["eval_expert_load_worst_layer"]


def test_evaluation_of_classic_has_no_figures_of_experts(tmp_path):
    config = FathomConfig.preset("classic", hidden_size=64, num_hidden_layers=1, vocab_size=VOCABULARY)
    metrics = trainer(tmp_path, FathomForCausalLM(config), heldout=rows(3)).evaluate()
    assert {"eval_mtp_loss", "eval_expert_load", "eval_bits_per_byte"}.isdisjoint(metrics)
    assert metrics["eval_loss"] == pytest.approx(math.log(VOCABULARY), rel=0.1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_logged_means_equal_a_hand_computation(accumulation, tmp_path):
    """Learning rate 0, so that every forward is that of the initial weights; 7 rows, so that a step is cut short."""
    data = rows(7, seed=3)
    trained = model(seq_aux_loss_coef=0.05, router_bias_update_speed=0.0)
    of_run = trainer(
        tmp_path,
        trained,
        data,
        learning_rate=0.0,
        max_steps=-1,
        num_train_epochs=1,
        gradient_accumulation_steps=accumulation,
        logging_steps=100,
        logging_strategy="epoch",
    )
    of_run.train()
    reference, heldout_bytes = model(seq_aux_loss_coef=0.05), [1] * VOCABULARY
    assert logged(of_run, "mtp_loss") == pytest.approx(
        [by_hand(reference.eval(), data, heldout_bytes)["eval_mtp_loss"]], rel=1e-5
    )
    with torch.no_grad():
        balance = [reference.train()(**collate_rows([row])).balance_loss.item() for row in data]
    assert logged(of_run, "balance_loss") == pytest.approx([sum(balance) / 7], rel=1e-5)


def test_the_first_loss_is_the_sum_of_its_parts(tmp_path):
    data = rows(2)
    trained, reference = model(), model().train()
    of_run = trainer(tmp_path, trained, data, max_steps=1)
    of_run.train()
    with torch.no_grad():
        output = reference(**collate_rows(list(data)))
    labels = torch.tensor(data["labels"])
    next_token = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (loss,), (mtp,), (balance,) = (logged(of_run, name) for name in ("loss", "mtp_loss", "balance_loss"))
    # The Trainer divides the MTP sum by the targets of the next token, of which there are a few more.
    share = mtp_targets(data) / (labels[:, 1:] != IGNORED).sum().item()
    expected = next_token.item() + trained.config.mtp_loss_weight * mtp * share + balance
    assert loss == pytest.approx(expected, rel=1e-5)


def mtp_targets(data: Dataset) -> int:
    return sum(
        row["position_ids"][at + 2] == row["position_ids"][at] + 2 and row["labels"][at + 2] != IGNORED
        for row in data
        for at in range(LENGTH - 2)
    )


def test_weight_decay_is_of_matrices(tmp_path):
    trained = model()
    decayed = set(trainer(tmp_path, trained).get_decay_parameter_names(trained))
    parameters = dict(trained.named_parameters())
    assert decayed == {name for name, parameter in parameters.items() if parameter.dim() > 1}
    assert any("norm" in name for name in set(parameters) - decayed)
    assert any("gate_up_proj" in name for name in decayed)


def test_no_parameter_is_without_gradient_in_a_training_step(tmp_path):
    """So DDP needs no search for unused parameters."""

    class EveryGradient(TrainerCallback):
        without: list[str] | None = None

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.without = [name for name, parameter in model.named_parameters() if parameter.grad is None]

    check = EveryGradient()
    trainer(tmp_path, model(), rows(2), max_steps=1, callbacks=[check]).train()
    assert check.without == []


def test_best_model_reload_restores_experts_and_biases(tmp_path):
    """transformers' own reload skips fused experts (PLUGIN B1). The learning rate is ruinous, so step 1 is best."""
    trained = model()
    of_run = trainer(
        tmp_path,
        trained,
        rows(64),
        rows(4, seed=1),
        learning_rate=3.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        warmup_steps=2,
    )
    of_run.train()
    best = of_run.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    expected = FathomForCausalLM.from_pretrained(best).state_dict()
    last = FathomForCausalLM.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    restored = of_run.model.state_dict()
    assert all(torch.equal(restored[name], expected[name]) for name in expected)
    assert not torch.equal(
        restored["model.layers.1.mlp.experts.down_proj"], last["model.layers.1.mlp.experts.down_proj"]
    )


class SendSignal(TrainerCallback):
    def __init__(self, number: int, at_step: int, times: int = 1):
        self.number, self.at_step, self.times = number, at_step, times

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at_step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(number, tmp_path, capsys):
    before = signal.getsignal(number)
    of_run = trainer(tmp_path, model(), rows(16), max_steps=8, callbacks=[SendSignal(number, at_step=1)])
    of_run.train()
    assert of_run.interrupted
    assert of_run.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    assert signal.getsignal(number) is before
    assert "saving after this step" in capsys.readouterr().out


def test_a_second_signal_ends_it_at_once(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    of_run = trainer(tmp_path, model(), rows(16), callbacks=[SendSignal(signal.SIGINT, at_step=1, times=2)])
    with pytest.raises(KeyboardInterrupt):
        of_run.train()
    assert signal.getsignal(signal.SIGINT) is before
    assert not list(tmp_path.glob("checkpoint-*"))


def test_signals_reach_the_processes_at_different_times(monkeypatch):
    """One that comes when others have said so already is a process's first; one that comes meanwhile is not lost."""
    callback, args = InterruptCallback(), SimpleNamespace(device="cpu")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda anyone, op: anyone.fill_(1.0))
    control = TrainerControl()
    callback.on_step_end(args, TrainerState(), control)
    assert callback.interrupted
    assert control.should_save
    assert control.should_training_stop
    with callback.listening():
        callback.interrupted = True
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with callback.listening():
        monkeypatch.setattr(dist, "all_reduce", lambda anyone, op: signal.raise_signal(signal.SIGINT))
        callback.on_step_end(args, TrainerState(), TrainerControl())
        assert not callback.interrupted
        monkeypatch.setattr(dist, "all_reduce", lambda anyone, op: None)
        callback.on_step_end(args, TrainerState(), TrainerControl())
        assert callback.interrupted


def test_training_in_another_thread_leaves_signals_alone(tmp_path):
    of_run = trainer(tmp_path, model(), rows(4), max_steps=1)
    thread = threading.Thread(target=of_run.train)
    thread.start()
    thread.join()
    assert of_run.state.global_step == 1


def test_a_finished_run_is_not_trained_on_by_resuming_it(tmp_path):
    """The plain Trainer would take a step more."""
    settings = {"save_strategy": "steps", "save_steps": 3}
    done = trainer(tmp_path, model(), rows(16), **settings)
    done.train()
    again = trainer(tmp_path, model(seed=1), rows(16), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == 3
    expected = done.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_a_classifier_is_trained_and_evaluated_too(tmp_path):
    config = FathomConfig.preset("v3", hidden_size=64, num_hidden_layers=2, vocab_size=VOCABULARY, num_labels=3)
    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(rows(8))])
    of_run = trainer(tmp_path, FathomForSequenceClassification(config), data, data, max_steps=2)
    of_run.data_collator = lambda batch: {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
    of_run.train()
    assert logged(of_run, "mtp_loss") == []
    assert of_run.evaluate()["eval_loss"] == pytest.approx(math.log(3), rel=0.5)


def test_label_smoothing_goes_through(tmp_path):
    of_run = trainer(tmp_path, model(), rows(4), max_steps=1, label_smoothing_factor=0.1)
    of_run.train()
    assert math.isfinite(logged(of_run, "loss")[0])


def test_load_ratio():
    load = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert load_ratio(load).tolist() == [1.0, 4.0, 0.0]


def test_the_multistep_schedule_is_that_of_the_report(tmp_path):
    of_run = trainer(
        tmp_path, model(), rows(8), max_steps=20, warmup_steps=4, optim="sgd", learning_rate=1e-3, multistep=True
    )
    of_run.train()
    rates = [rate / 1e-3 for rate in logged(of_run, "learning_rate")]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, *[1] * 12, 0.316, 0.316, 0.1, 0.1])


def test_muon_trains_through_both_trainers(tmp_path):
    results = []
    for kind, callbacks in ((FathomTrainer, []), (Trainer, [RouterBiasCallback()])):
        trained = model()
        of_run = trainer(
            tmp_path,
            trained,
            rows(2),
            kind=kind,
            callbacks=callbacks,
            max_steps=30,
            optimizer_cls_and_kwargs=(MuonFactory, {"lr": 1e-2, "weight_decay": 0.1}),
        )
        of_run.train()
        losses = logged(of_run, "loss")
        assert losses[-1] < 0.7 * losses[0]
        results.append(losses)
    assert results[0] == pytest.approx(results[1], rel=1e-2)


def test_evaluation_reports_the_residual_streams(tmp_path):
    trained = model(hc_mult=2)
    of_run = trainer(tmp_path, trained, heldout=rows(5), per_device_eval_batch_size=2)
    names = ("amax_gain_forward", "amax_gain_backward", "off_diagonal_mass", "stream_similarity")
    assert all(f"eval_{name}" in of_run.evaluate() for name in names)
    assert not any("amax" in name for name in trainer(tmp_path, model(), heldout=rows(5)).evaluate())

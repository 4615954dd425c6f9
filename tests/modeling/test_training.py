"""Everything trains, also by the plain Trainer: gradients, first loss, overfitting, checkpointing, label smoothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.experts import TopKRouter

TINY = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": 97}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}


def model(generation: str = "v3", **overrides) -> FathomForCausalLM:
    torch.manual_seed(0)
    settings = {**TINY, **({} if generation == "classic" else EXPERTS), "index_topk": 8, **overrides}
    return FathomForCausalLM(FathomConfig.preset(generation, **settings)).train()


def tokens(batch: int = 4, length: int = 32, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


class Batch(Dataset):
    """The same rows, over and over."""

    def __init__(self, rows: torch.Tensor, repeats: int):
        self.rows, self.repeats = rows, repeats

    def __len__(self) -> int:
        return len(self.rows) * self.repeats

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[index % len(self.rows)]
        return {"input_ids": row, "labels": row}


class MoveRouterBias(TrainerCallback):
    """What the documentation tells users of the plain Trainer to add."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.update_router_bias()


def arguments(folder, **overrides) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**settings, **overrides})


@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3", "v3.2", "v4"])
def test_first_loss_is_that_of_guessing(generation):
    torch.manual_seed(0)
    config = FathomConfig.preset(generation)
    untrained = FathomForCausalLM(config).eval()
    ids = tokens(2, 64, config.vocab_size)
    with torch.no_grad():
        outputs = untrained(ids, labels=ids)
    assert outputs.loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)
    if config.num_nextn_predict_layers:
        assert outputs.mtp_loss.item() == pytest.approx(math.log(config.vocab_size), rel=0.05)


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_of_v3_gets_a_gradient(checkpointing, depths):
    trained = model(num_nextn_predict_layers=depths)
    if checkpointing:
        trained.activation_checkpointing_enable()
    trained(tokens(), labels=tokens()).loss.backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("overrides", [{}, {"q_lora_rank": None}], ids=str)
@pytest.mark.parametrize("generation", ["moe", "v2"])
def test_every_parameter_of_moe_and_v2_gets_a_gradient(generation, overrides):
    trained = model(generation, **overrides)
    trained(tokens(), labels=tokens()).loss.backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1}], ids=str)
def test_every_parameter_of_classic_gets_a_gradient(overrides):
    trained = model("classic", **overrides)
    trained(tokens(), labels=tokens()).loss.backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("generation", ["classic", "v3", "v4"])
def test_plain_trainer_overfits_one_batch(generation, bf16, tmp_path):
    """Random tokens can only be learned by heart. The routing bias moves with every step, and stays in fp32."""
    trained, ids, steps = model(generation, num_hidden_layers=2), tokens(2, 24), 50
    trainer = Trainer(
        trained,
        arguments(
            tmp_path,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            bf16=bf16,
        ),
        train_dataset=Batch(ids, steps),
        callbacks=[MoveRouterBias()],
    )
    trainer.train()
    with torch.no_grad():
        outputs = trained.eval()(ids, labels=ids)
    assert outputs.loss < 0.1
    if generation == "classic":
        return
    assert outputs.mtp_loss < 0.1
    for router in trained.modules():
        if isinstance(router, TopKRouter):
            bias = router.e_score_correction_bias
            moves = bias / trained.config.router_bias_update_speed
            assert bias.dtype == torch.float32
            assert 1 <= moves.abs().max() <= steps + 0.1
            torch.testing.assert_close(moves, moves.round(), atol=0.05, rtol=0)


def test_accumulation_in_the_trainer_changes_nothing(tmp_path):
    """One step on 8 rows at once, and on 4 micro-batches of 2: the same parameters and the same routing biases."""
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        # SGD: Adam would turn the rounding of a gradient near zero into a whole step.
        trainer = Trainer(
            model(),
            arguments(
                tmp_path,
                max_steps=2,
                learning_rate=0.1,
                optim="sgd",
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
                max_grad_norm=0.0,
            ),
            train_dataset=Batch(tokens(16), 1),
            callbacks=[MoveRouterBias()],
        )
        trainer.train()
        results.append(trainer.model.state_dict())
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_label_smoothing_shifts_labels(tmp_path):
    """Trainer shifts only for class names in its table; unshifted, a model would learn to copy its input."""
    trained, ids = model(), tokens()
    trainer = Trainer(trained, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=Batch(ids, 1))
    loss, outputs = trainer.compute_loss(trained, {"input_ids": ids, "labels": ids}, return_outputs=True)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)

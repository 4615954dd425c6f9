"""PEFT: LoRA on attention and on the fused experts of every generation, merged exactly, saved, loaded."""

from pathlib import Path

import pytest
import torch
from generations import GENERATIONS, config, model, tokens
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from fathom import FathomForCausalLM, FathomForSequenceClassification, FathomTrainer

peft = pytest.importorskip("peft")

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
NO_INDEXERS = r".*\.indexer\..*"
WITH_INDEXERS = ["v3.2", "v4"]
WITH_EXPERTS = [generation for generation in GENERATIONS if generation != "classic"]


def lora(generation: str, **overrides) -> "peft.LoraConfig":
    """Adapters on every linear map but the indexers', and on the experts; they start off 0, as if trained."""
    settings = {
        "r": 4,
        "target_modules": "all-linear",
        "exclude_modules": NO_INDEXERS if generation in WITH_INDEXERS else None,
        "target_parameters": EXPERTS if generation in WITH_EXPERTS else None,
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
    }
    return peft.LoraConfig(**{**settings, **overrides})


def adapted(generation: str, **overrides) -> "peft.PeftModel":
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model(generation), lora(generation, **overrides)).eval()


def logits(of: torch.nn.Module, ids: torch.Tensor, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return of(input_ids=ids, **inputs).logits


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_training_step_moves_all_adapters_and_nothing_else(generation):
    ours, ids = adapted(generation).train(), tokens()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in ours.parameters() if p.requires_grad), lr=0.1)
    ours(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = ours.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora_" in name}
    mixed = ["mlp.experts"] if generation in WITH_EXPERTS else ["mlp.up_proj"]
    for part in ["self_attn", *mixed]:
        assert any(part in name for name in moved), part


@pytest.mark.parametrize("generation", GENERATIONS)
def test_saved_loaded_and_merged(tmp_path, generation):
    """The adapter alone, through PEFT and through Auto classes, and merged into a checkpoint that needs no PEFT."""
    model(generation).save_pretrained(tmp_path / "base")
    ours, ids = adapted(generation), tokens()
    ours.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    expected = logits(ours, ids)
    assert (expected - logits(model(generation), ids)).abs().max() > 0.1
    rounding = 1e-5 * expected.abs().max().item()

    ours.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model(generation), tmp_path / "adapter"), ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"), ids), expected)

    merged = ours.merge_and_unload()
    assert type(merged) is FathomForCausalLM
    torch.testing.assert_close(logits(merged, ids), expected, atol=rounding, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reread, ids), logits(merged, ids))


@pytest.mark.parametrize("generation", WITH_INDEXERS)
def test_indexers_learn_by_adapters_or_stay_as_they_are(generation):
    """A frozen indexer has no loss in training. One with adapters has, and learns from attention with adapters."""
    ids = tokens()
    assert adapted(generation).train()(input_ids=ids, labels=ids).indexer_figures is None

    ours = adapted(generation, exclude_modules=None).train()
    ours(input_ids=ids, labels=ids).loss.backward()
    learning = {name: p for name, p in ours.named_parameters() if ".indexer." in name and p.requires_grad}
    assert all("lora_" in name for name in learning)
    assert learning
    assert [name for name, p in learning.items() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        expected = ours.eval()(input_ids=ids, labels=ids).indexer_figures
        merged = ours.merge_and_unload()(input_ids=ids, labels=ids).indexer_figures
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_decoding_sees_the_adapters(generation):
    """MLA decodes with `kv_b_proj` on the other side of the product, which an adapter cannot follow."""
    ours, ids = adapted(generation), tokens(length=24)
    whole = logits(ours, ids)
    cache = ours(input_ids=ids[:, :20]).cache
    steps = [logits(ours, ids[:, i : i + 1], cache=cache) for i in range(20, 24)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, 20:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("generation", WITH_EXPERTS)
def test_sorted_experts_are_adapted_like_the_reference(generation, training):
    """What runs experts on a CPU is not the readable loop: the same logits and gradients of the adapters."""
    ids, results = tokens(), []
    for reference in (False, True):
        ours = adapted(generation, target_modules=[], exclude_modules=None).train(training)
        if reference:
            ours.get_base_model().set_experts_implementation("eager")
        outputs = ours(input_ids=ids, labels=ids)
        outputs.loss.backward()
        gradients = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
        assert all(name.endswith("weight") and "experts" in name for name in gradients)
        results.append((outputs.logits, gradients))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_modules_trained_whole(tmp_path, generation):
    """Beside the adapters: new embeddings and a new head."""
    whole = ["embed_tokens", "lm_head"]
    ours, ids = adapted(generation, modules_to_save=whole).train(), tokens()
    ours(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, p in ours.named_parameters() if p.requires_grad and "lora_" not in name]
    assert [name.split(".")[-4] for name in trained] == whole
    for parameter in ours.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
    expected = logits(ours.eval(), ids)
    ours.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model(generation), tmp_path), ids), expected)
    torch.testing.assert_close(logits(ours.merge_and_unload(), ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_classifier(generation):
    """The score head is trained whole, as PEFT does for this task."""
    torch.manual_seed(0)
    classifier = FathomForSequenceClassification(config(generation, num_labels=3))
    ours, ids = peft.get_peft_model(classifier, lora(generation, task_type="SEQ_CLS")).train(), tokens(4)
    ours(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.any()] == []
    assert [name.split(".")[-4] for name in trained if "lora_" not in name] == ["score"]


@pytest.mark.parametrize("generation", WITH_EXPERTS)
def test_adapter_on_the_router(generation):
    ours, ids = (
        adapted(generation, target_modules=[], exclude_modules=None, target_parameters=["gate.weight"]),
        tokens(),
    )
    expected = logits(ours, ids)
    assert (expected - logits(model(generation), ids)).abs().max() > 0.01
    torch.testing.assert_close(logits(ours.merge_and_unload(), ids), expected, atol=1e-5, rtol=0)


def test_adapter_on_a_projection_in_groups():
    """V4's `o_a_proj` is no `nn.Linear` to PEFT, but a parameter like those of the experts."""
    ours, ids = adapted("v4", target_modules=[], exclude_modules=None, target_parameters=["o_a_proj.weight"]), tokens()
    expected = logits(ours, ids)
    assert (expected - logits(model("v4"), ids)).abs().max() > 0.1
    torch.testing.assert_close(logits(ours.merge_and_unload(), ids), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("generation", ["v3", "v3.2", "v4"])
def test_routing_biases_stay_beside_adapters(tmp_path, generation):
    """No adapter saves them. Where PEFT trains the router itself, the copy's bias moves, by the copy's own load."""
    ids = tokens()
    frozen = adapted(generation).train()
    before = {name: buffer.clone() for name, buffer in frozen.named_buffers()}
    frozen(input_ids=ids, labels=ids)
    load = frozen.update_router_bias()
    assert load.sum(dim=1).gt(0).all()
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())

    copied = adapted(generation, modules_to_save=["gate"]).train()
    copied(input_ids=ids, labels=ids)
    assert torch.equal(copied.update_router_bias(), load)
    biases = {name: bias for name, bias in copied.named_buffers() if name.endswith("e_score_correction_bias")}
    trained = [name for name in biases if ".modules_to_save.default." in name]
    assert len(biases) == 2 * len(trained) > 0
    for name in trained:
        assert not torch.equal(biases[name], biases[name.replace("modules_to_save.default", "original_module")])
    expected = logits(copied.eval(), ids)
    copied.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(model(generation), tmp_path), ids), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradient_checkpointing(generation, reentrant):
    ids, gradients = tokens(), []
    for checkpointing in (False, True):
        ours = adapted(generation).train()
        if checkpointing:
            ours.enable_input_require_grads()
            ours.activation_checkpointing_enable({"use_reentrant": reentrant})
        ours(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients)


class Rows(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": tokens(16)[index], "labels": tokens(16)[index]}


def train(generation: str, folder: Path, steps: int, resume: Path | None = None) -> FathomTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = FathomTrainer(adapted(generation), arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


@pytest.mark.parametrize("generation", ["moe", "v3", "v3.2", "v4"])
def test_trained_resumed_and_loaded(tmp_path, generation):
    """Checkpoints of a training run are adapters; the model they are loaded on is that of the run."""
    ids = tokens()
    whole = train(generation, tmp_path / "whole", 4).model.eval()
    train(generation, tmp_path / "half", 2)
    resumed = train(generation, tmp_path / "half", 4, resume=tmp_path / "half" / "checkpoint-2").model.eval()
    expected = logits(whole, ids)
    assert torch.equal(logits(resumed, ids), expected)
    loaded = peft.PeftModel.from_pretrained(model(generation), tmp_path / "half" / "checkpoint-4")
    assert torch.equal(logits(loaded, ids), expected)


@pytest.mark.parametrize("generation", ["v3.2", "v4"])
def test_evaluated_like_the_merged_model(tmp_path, generation):
    """Balance, streams and indexers are found behind adapters, too."""
    trainer = train(generation, tmp_path, 1)
    metrics = trainer.evaluate()
    trainer.model = trainer.model_wrapped = trainer.model.merge_and_unload()
    merged = trainer.evaluate()
    watched = ["eval_max_vio_layer_1", "eval_indexer_recall", *["eval_amax_gain_forward"] * (generation == "v4")]
    assert set(watched) <= set(metrics)
    timing = ("runtime", "per_second")
    names = {name for name in merged if not name.endswith(timing)}
    assert {name: metrics[name] for name in names} == pytest.approx({name: merged[name] for name in names}, rel=1e-3)

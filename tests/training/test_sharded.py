"""FSDP2 on two gloo processes ends where one process ends: losses, weights, routing, checkpoints, every generation.

Sharding changes where numbers are added up, not which. By SGD all weights agree within 1e-6; where AdamW divides a
gradient near zero by its own size, its rounding can become part of a step (as in `test_distributed`).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import prepare_multi_gpu_env
from safetensors.torch import load_file
from tiny_runs import make_corpus_and_tokenizer, pretrain_words, torchrun
from transformers import AutoModelForCausalLM

import fathom
from fathom.scripts import cli

CONFIGS = Path(fathom.__file__).parent / "scripts" / "accelerate"
ALONE, SHARED = ("--batch_size", "6"), ("--batch_size", "3")
DDP = {"ACCELERATE_USE_FSDP": "false"}
SGD = ("--trainer", "optim=sgd", "max_grad_norm=0", "--learning_rate", "0.1", "--accumulation", "2")


def of_config(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file scripts/accelerate/NAME` sets for its processes."""
    words = ["--config_file", str(CONFIGS / name), "--machine_rank", "0", "--main_process_ip", "localhost", "-m", "x"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


class Runs:
    """Runs that start from one corpus: alone in this process, or several by two processes, one after another."""

    def __init__(self, folder: Path):
        self.folder = folder
        make_corpus_and_tokenizer(folder)

    def words(self, name: str, *words: str) -> list[str]:
        return ["pretrain", *pretrain_words(self.folder, self.folder / name, *words)]

    def alone(self, name: str, *words: str) -> Path:
        assert cli.main(self.words(name, *ALONE, *words)) == 0
        return self.folder / name

    def sharded(self, *runs: dict[str, Any]) -> None:
        file = self.folder / "runs.json"
        file.write_text(json.dumps(runs))
        script = Path(__file__).parents[1] / "sharded_on_cpu.py"
        process = torchrun(str(script), str(file), timeout=300)
        assert process.returncode == 0, process.stderr[-5000:]


def job(runs: Runs, name: str, *words: str, config: str = "fsdp2.yaml", **further: Any) -> dict[str, Any]:
    return {"environment": of_config(config), "words": runs.words(name, *SHARED, *words), **further}


def differences(one: Path, other: Path) -> dict[str, float]:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def losses(folder: Path) -> list[float]:
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda found: int(found.name.split("-")[1]))
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


NAMES_OF_BIASES = ("e_score_correction_bias", "gate.bias")  # the second in files of V4


def biases(folder: Path) -> torch.Tensor:
    loaded = load_file(folder / "model.safetensors")
    return torch.stack([loaded[name] for name in sorted(loaded) if name.endswith(NAMES_OF_BIASES)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def first(runs: Runs) -> Path:
    """SGD; Muon with sharded checkpoints, in one go, and gone on with at step 2 and at its end; two that diverge."""

    def resumed(name: str, step: int) -> dict[str, Any]:
        copied = [str(runs.folder / folder / f"checkpoint-{step}") for folder in ("muon", name)]
        return job(runs, name, "--optimizer", "muon", "--resume", config="fsdp2-multinode.yaml", copy=copied)

    runs.sharded(
        job(runs, "sgd", *SGD),
        job(runs, "muon", "--optimizer", "muon", config="fsdp2-multinode.yaml"),
        resumed("resumed", step=2),
        resumed("finished", step=4),
        job(runs, "nan", "--accumulation", "2", nan_on_rank_1=True, code=1),
        job(runs, "nan-ddp", "--accumulation", "2", nan_on_rank_1=True, code=1, environment=DDP),
    )
    return runs.folder


def test_sharded_processes_train_what_one_does(runs: Runs, first: Path):
    alone = runs.alone("sgd-alone", *SGD)
    assert max(differences(alone, first / "sgd").values()) < 1e-6
    assert losses(first / "sgd") == pytest.approx(losses(alone), rel=1e-5)
    assert torch.equal(biases(alone), biases(first / "sgd"))
    assert biases(alone).any()
    ours, theirs = (record(folder)["evaluation"] for folder in (alone, first / "sgd"))
    for name in ("loss", "mtp_loss", "expert_load"):
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)
    assert record(first / "sgd")["world_size"] == 2


def test_muon_takes_the_same_steps_on_shards(runs: Runs, first: Path):
    """Given equal gradients its steps are equal (next test). Here gradients differ by rounding, and the iteration
    brings all singular values to 1, those of rounding included. All weights agree within a twentieth of one step.
    """
    alone = runs.alone("muon-alone", "--optimizer", "muon")
    assert max(differences(alone, first / "muon").values()) < 0.05 * 2e-3
    assert losses(first / "muon") == pytest.approx(losses(alone), rel=1e-5)


def test_muon_on_parameters_cut_in_all_ways(tmp_path):
    process = torchrun(str(Path(__file__).parents[1] / "muon_on_shards.py"), str(tmp_path))
    assert process.returncode == 0, process.stderr[-5000:]


@pytest.mark.parametrize("name", ["resumed", "finished"])
def test_sharded_checkpoints_resume_to_the_same_weights(name: str, first: Path):
    files = {file.name for file in (first / "muon" / "checkpoint-2").iterdir()}
    assert {"pytorch_model_fsdp_0", "optimizer_0", "config.json", "rng_state_1.pth"} <= files
    assert "model.safetensors" not in files
    assert max(differences(first / "muon", first / name).values()) == 0


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_what_is_saved_is_a_model_for_plain_transformers(name: str, first: Path):
    """Not a model of the class that torch makes of a sharded one, with torch's files for code."""
    assert type(AutoModelForCausalLM.from_pretrained(first / name)).__name__ == "FathomForCausalLM"
    config = json.loads((first / name / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_fathom.FathomForCausalLM"
    assert (first / name / "modeling_fathom.py").is_file()
    assert not list((first / name).glob("_fsdp*"))


@pytest.mark.parametrize("name", ["nan", "nan-ddp"])
def test_one_rank_s_nan_ends_all_ranks_with_its_origin(name: str, first: Path):
    folder = first / name / "diverged-1"
    report = json.loads((folder / "report.json").read_text())
    assert report["reason"] == "the loss is nan"
    assert report["origin"] == "the output of model.layers.1.mlp.experts"
    kept = [load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1)]
    assert all(batch["0.input_ids"].shape == batch["1.input_ids"].shape == (3, 32) for batch in kept)
    assert not torch.equal(kept[0]["0.input_ids"], kept[1]["0.input_ids"])


GENERATIONS = ("classic", "moe", "v2", "v3.2", "v4")


def of_generation(generation: str) -> list[str]:
    shape = ["hidden_size=64", "num_hidden_layers=3", "n_routed_experts=7", "n_group=1", "topk_group=1"]
    return ["--generation", generation, "--override", *shape]


@pytest.fixture(scope="module")
def second(runs: Runs) -> Path:
    whole, part = str(runs.folder / "adamw" / "checkpoint-2"), str(runs.folder / "adamw-resumed" / "checkpoint-2")
    runs.sharded(
        *(job(runs, generation, *of_generation(generation), *SGD) for generation in GENERATIONS),
        job(runs, "recomputed", "--gradient_checkpointing", *SGD),
        job(runs, "bf16", "--precision", "bf16"),
        job(runs, "v4-bf16", *of_generation("v4"), "--precision", "bf16"),
        job(runs, "adamw"),
        job(runs, "adamw-resumed", "--resume", copy=[whole, part]),
        job(runs, "few", *SGD, "--weight_decay", "0", few_experts=True),
        job(runs, "few-ddp", *SGD, "--weight_decay", "0", few_experts=True, environment=DDP),
    )
    return runs.folder


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_is_sharded(generation: str, runs: Runs, second: Path):
    """With 7 experts, which two ranks cannot share evenly."""
    alone = runs.alone(f"{generation}-alone", *of_generation(generation), *SGD)
    assert max(differences(alone, second / generation).values()) < 2e-6
    assert losses(second / generation) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_recomputing_layers_changes_nothing(first: Path, second: Path):
    assert max(differences(first / "sgd", second / "recomputed").values()) < 1e-7


@pytest.mark.slow
def test_bf16_keeps_routing_and_weights_in_fp32(runs: Runs, second: Path):
    """Biases are whole multiples of the speed, which bf16 cannot hold; losses are not rounded to its 8 bits."""
    for name in ("bf16", "v4-bf16"):
        steps = biases(second / name) / 0.01
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert any(torch.tensor(loss).bfloat16().item() != loss for loss in losses(second / name))
        weights = load_file(second / name / "model.safetensors")
        assert all(value.dtype == torch.float32 for value in weights.values() if value.is_floating_point())
    assert losses(second / "bf16") == pytest.approx(losses(runs.alone("fp32-alone")), rel=1e-2)


@pytest.mark.slow
def test_whole_checkpoints_resume_to_the_same_weights(second: Path):
    assert max(differences(second / "adamw", second / "adamw-resumed").values()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["few", "few-ddp"])
def test_experts_without_tokens_neither_hang_nor_move(name: str, runs: Runs, second: Path):
    """Rank 0 uses experts 0 and 1, rank 1 2 and 3, nobody the other four."""
    start = runs.alone(f"{name}-start", "--trainer", "optim=sgd", "--learning_rate", "1e-30", "--weight_decay", "0")
    moved = differences(start, second / name)
    for expert in range(8):
        of_expert = [value for parameter, value in moved.items() if f".experts.{expert}.down_proj" in parameter]
        assert len(of_expert) == 2
        assert all((value > 1e-6) == (expert < 4) for value in of_expert), expert

"""What --resume refuses, and what it takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_runs import model

from fathom.training.checkpoints import read_run, write_run
from fathom.training.errors import UserError
from fathom.training.options import RunOptions
from fathom.training.resuming import fingerprint, recipe_of, refuse_another_config, refuse_another_recipe
from fathom.training.trainer_arguments import training_arguments

CPU = torch.device("cpu")
OPTIONS = RunOptions(steps=10, batch_size=4, precision="fp32", trainer=["adam_epsilon=1e-9", "save_only_model=false"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arguments = training_arguments(tmp_path / "out", OPTIONS, CPU, None)
    write_run(tmp_path, {"precision": "fp32", "recipe": {**recipe_of(OPTIONS, arguments), "data": "3 rows, abc"}})
    return tmp_path


def resume(checkpoint: Path, **changes) -> None:
    training_arguments(checkpoint / "out", replace(OPTIONS, **changes), CPU, checkpoint)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"optimizer": "muon"}, "(optimizer 'adamw' -> 'muon')"),
        ({"schedule": "cosine"}, "(schedule 'wsd' -> 'cosine')"),
        ({"learning_rate": 1e-3, "seed": 1}, "(learning_rate 0.002 -> 0.001; seed 0 -> 1)"),
        ({"warmup_steps": 3}, "(warmup_steps 20 -> 3)"),
        ({"decay_share": 0.2}, "(decay_share 0.4 -> 0.2)"),
        ({"weight_decay": 0.0}, "(weight_decay 0.1 -> 0.0)"),
        ({"precision": "bf16"}, "(precision 'fp32' -> 'bf16')"),
        ({"batch_size": 2}, "(rows_per_step 4 -> 2)"),
        ({"accumulation": 2}, "(rows_per_step 4 -> 8)"),
        ({"trainer": ["adam_epsilon=1e-8"]}, "(trainer {'adam_epsilon': '1e-9'} -> {'adam_epsilon': '1e-8'})"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(changes, difference, checkpoint):
    with pytest.raises(UserError) as error:
        resume(checkpoint, **changes)
    assert str(error.value) == f"--resume: {checkpoint} has another configuration {difference}; use the same options"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": 2, "accumulation": 2},
        {"save_steps": 3, "eval_steps": 7, "log_steps": 1, "gradient_checkpointing": True, "precision": "auto"},
        {"trainer": ["adam_epsilon=1e-9", "dataloader_num_workers=0"]},
    ],
)
def test_what_changes_no_weights_is_taken(changes, checkpoint, capsys):
    resume(checkpoint, **changes)
    assert capsys.readouterr().out == ""


def test_another_number_of_steps_is_taken_and_said(checkpoint, capsys):
    resume(checkpoint, steps=2000)
    assert capsys.readouterr().out == "steps       10 -> 2,000; the learning rate follows the new number from here on\n"


def test_other_data_are_refused(checkpoint):
    refuse_another_recipe({"data": "3 rows, abc"}, checkpoint)
    with pytest.raises(UserError, match="data '3 rows, abc' -> '4 rows, abd'"):
        refuse_another_recipe({"data": "4 rows, abd"}, checkpoint)


def test_fingerprints_tell_rows_apart():
    rows = [{"input_ids": [n, n + 1], "labels": [-100, n]} for n in range(200)]
    same = fingerprint(Dataset.from_list(rows))
    assert same.startswith("200 rows, ")
    assert fingerprint(Dataset.from_list(rows)) == same
    others = [rows[:-1], rows[::-1], [{**row, "labels": [n, n]} for n, row in enumerate(rows)]]
    assert len({same, *(fingerprint(Dataset.from_list(other)) for other in others)}) == 4


def test_another_configuration_is_refused_with_the_differences(tmp_path):
    saved = model()
    saved.save_pretrained(tmp_path)
    refuse_another_config(model().config, tmp_path)
    refuse_another_config(model(num_hidden_layers=3).config, None)
    with pytest.raises(UserError) as error:
        refuse_another_config(model(num_hidden_layers=3, n_routed_experts=4).config, tmp_path)
    assert "num_hidden_layers 2 -> 3; n_routed_experts 8 -> 4" in str(error.value)


def test_run_file_round_trip(tmp_path):
    assert read_run(tmp_path) is None
    write_run(tmp_path, {"steps": 3})
    assert read_run(tmp_path) == json.loads((tmp_path / "run.json").read_text()) == {"steps": 3}

"""What a run derives from its options, and what it prints."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import model

from fathom.training import run, trainer_arguments
from fathom.training.errors import UserError
from fathom.training.heldout import Yardsticks
from fathom.training.options import RunOptions, pairs, typed

CPU = torch.device("cpu")
OPTIONS = RunOptions(steps=10, precision="fp32")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("True", True),
        ("None", None),
        ("null", None),
        ("no", "no"),
        ("mla", "mla"),
        ("[mla, mha]", ["mla", "mha"]),
        ('["a", 1]', ["a", 1]),
        ("{rope_type: default, factor: 2.0}", {"rope_type": "default", "factor": 2.0}),
        ("", ""),
    ],
)
def test_words_become_values(text, value):
    assert typed(text) == value
    assert type(typed(text)) is type(value)


def test_half_a_list_is_refused():
    with pytest.raises(UserError, match="is no list or map"):
        typed("[1, 2")


def test_pairs_split_at_the_first_equals_sign():
    assert pairs(["a=1", "b=x=y"], "override") == {"a": "1", "b": "x=y"}
    with pytest.raises(UserError, match="--override takes name=value, not 'a'"):
        pairs(["a"], "override")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0 must be at least 1"),
        ({"batch_size": -1}, "--batch_size -1 must be at least 1"),
        ({"precision": "fp8"}, "--precision fp8 is unknown; use auto, fp32 or bf16"),
        ({"learning_rate": 0.0}, "--learning_rate 0.0 must be above 0"),
        ({"learning_rate": float("nan")}, "--learning_rate nan must be above 0"),
        ({"decay_share": 1.5}, "--decay_share 1.5 must be between 0 and 1"),
        ({"seed": -1}, "--seed -1 must be between 0 and 4294967295"),
        ({"warmup_steps": -1}, "--warmup_steps -1 must be 0 or more"),
        ({"spike_factor": 0.5}, "--spike_factor 0.5 must be above 1, or 0: no limit"),
    ],
)
def test_options_that_no_run_can_have(changes, message):
    with pytest.raises(UserError) as error:
        replace(OPTIONS, **changes).check()
    assert str(error.value) == message


@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_learning_rate_warms_up_holds_and_decays_to_a_tenth(steps, tmp_path):
    from transformers import get_scheduler

    arguments = trainer_arguments.training_arguments(tmp_path, replace(OPTIONS, steps=steps), CPU, None)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, steps, arguments.lr_scheduler_kwargs
    )
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == pytest.approx(1.0)
    assert schedule.get_last_lr()[0] == pytest.approx(0.1)
    if steps == 400:
        assert rates[0] <= 0.1
        assert rates[20:240] == pytest.approx([1.0] * 220)
        assert rates[320] == pytest.approx(0.55, abs=0.01)


def test_further_arguments_have_the_types_that_the_trainer_wants():
    words = ["max_grad_norm=0.5", "load_best_model_at_end=true", "save_strategy=no", "adam_epsilon=1e-9"]
    assert trainer_arguments.further_arguments(words) == {
        "max_grad_norm": 0.5,
        "load_best_model_at_end": True,
        "save_strategy": "no",
        "adam_epsilon": 1e-9,
    }


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_grad_nrom=1", "--trainer max_grad_nrom: TrainingArguments has no such field; did you mean max_grad_norm"),
        ("max_grad_norm=much", "invalid float value: 'much'"),
        ("save_strategy=sometimes", "sometimes"),
        ("max_steps=3", "--trainer max_steps: use --steps instead"),
        ("output_dir=elsewhere", "--trainer output_dir: use --out instead"),
        ("max_grad_norm", "--trainer takes name=value, not 'max_grad_norm'"),
        ("load_best_model_at_end=true\neval_strategy=no", "these training options do not fit together: "),
    ],
)
def test_further_arguments_that_are_refused(word, message, tmp_path):
    with pytest.raises(UserError) as error:
        trainer_arguments.training_arguments(tmp_path / "out", replace(OPTIONS, trainer=word.split("\n")), CPU, None)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_measurement_decides_the_precision_once(tmp_path, monkeypatch):
    """A run that is resumed on a busier machine goes on in the precision it began in."""
    (tmp_path / "run.json").write_text('{"precision": "bf16"}')
    for measured in (True, False):
        monkeypatch.setattr(trainer_arguments, "bf16_pays", lambda device, measured=measured: measured)
        assert trainer_arguments.trains_in_bf16("auto", CPU, checkpoint=tmp_path)
        assert trainer_arguments.trains_in_bf16("auto", CPU, checkpoint=None) == measured
        assert not trainer_arguments.trains_in_bf16("fp32", CPU, checkpoint=tmp_path)
        assert trainer_arguments.trains_in_bf16("bf16", CPU, checkpoint=None)


def test_tensorboard_writes_into_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "elsewhere")
    arguments = trainer_arguments.training_arguments(tmp_path, replace(OPTIONS, tensorboard=True), CPU, None)
    assert arguments.report_to == ["tensorboard"]
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard")
    monkeypatch.setattr(trainer_arguments, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--tensorboard needs .* pip install 'fathom-lm\[track\]'"):
        trainer_arguments.training_arguments(tmp_path, replace(OPTIONS, tensorboard=True), CPU, None)


def test_out_that_holds_something(tmp_path):
    assert run.check_out(tmp_path / "new", OPTIONS) is None
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file; choose another folder"):
        run.check_out(file, OPTIONS)
    with pytest.raises(UserError, match="holds no complete checkpoint; start without --resume"):
        run.check_out(tmp_path, replace(OPTIONS, resume=True))
    model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="already holds a model; add --resume to continue it, --overwrite, or choose"):
        run.check_out(tmp_path, OPTIONS)
    assert run.check_out(tmp_path, replace(OPTIONS, overwrite=True)) is None

    checkpoint = tmp_path / "checkpoint-7"
    model().save_pretrained(checkpoint)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        run.check_out(tmp_path, replace(OPTIONS, resume=True))
    with pytest.raises(UserError, match=r"already holds checkpoint-7; add --resume"):
        run.check_out(tmp_path, OPTIONS)
    for name in ("scheduler.pt", "optimizer.pt"):
        torch.save({}, checkpoint / name)
    (checkpoint / "run.json").write_text("{}")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    assert run.check_out(tmp_path, replace(OPTIONS, resume=True)) == checkpoint
    with pytest.raises(UserError, match="already holds checkpoint-7"):
        run.check_out(tmp_path, OPTIONS)


def test_the_command_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert run.command_line("sft", ["--out", "my runs"]) == "fathom sft --out 'my runs'"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert run.command_line("sft", ["--steps", "3"]) == "torchrun --nproc_per_node 4 -m fathom.scripts.sft --steps 3"


def test_other_ranks_are_quiet(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", __import__("sys").stdout)
    run.start(OPTIONS)
    print("rank 0")
    monkeypatch.setenv("RANK", "1")
    run.start(OPTIONS)
    print("rank 1")
    assert capsys.readouterr().out == "rank 0\n"


def test_lines_fit_a_terminal_even_with_large_numbers():
    console = run.ConsoleCallback(3e9, 1e15, Yardsticks("held-out", {"gzip": 2.345, "xz": 2.123}))
    state = SimpleNamespace(global_step=90_000, max_steps=100_000, num_input_tokens_seen=0)
    console.restart(state)
    state.num_input_tokens_seen, state.global_step, console.seconds = 50_000_000, 90_010, 20.0
    logs = {"loss": 12.345, "mtp_loss": 10.234, "balance_loss": 0.1, "expert_load": 12.345, "learning_rate": 3e-3}
    line = console.training_line(logs, state, world_size=8)
    assert "2,500,000 tokens/s" in line
    assert f"{2.5e6 * 3e9 / 8e15:.0%} of peak" in line
    assert "333.0 min left" in line
    assert len(line) <= 120
    logs = {"bits_per_byte": 2.3, "perplexity": 1234.5, "targets": 12_345_678, "mtp_loss": 10.2, "expert_load": 12.3}
    line = console.evaluation_line({f"eval_{name}": value for name, value in logs.items()})
    assert "held-out (12,345,678 tokens): 2.300 bits per byte, gzip 2.345, xz 2.123; perplexity 1234.5" in line
    assert len(line) <= 120


def test_samples_are_broken_at_the_width_of_a_terminal(capsys):
    said = "x" * 300 + "\n"
    run.SampleCallback(lambda model: said).on_evaluate(None, SimpleNamespace(is_world_process_zero=True), None, None)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == 120
    assert "".join(line[10:] for line in lines) == repr(said)


@pytest.mark.parametrize("name", ["v3", "classic"])
def test_description_states_what_will_be_trained(name, capsys):
    """Numbers from the objects themselves: 3 rows x 2 accumulated x 4 processes x 32 tokens, 100 steps."""
    from fathom import FathomConfig, FathomForCausalLM

    described = FathomForCausalLM(FathomConfig.preset(name, hidden_size=64, num_hidden_layers=2, vocab_size=97))
    arguments = SimpleNamespace(
        train_batch_size=3,
        gradient_accumulation_steps=2,
        world_size=4,
        max_steps=100,
        device=CPU,
        bf16=False,
    )
    counts = described.parameter_counts()
    run.describe(described, arguments, counts, 2e6, 5e9, 32, 384, 7)
    output = capsys.readouterr().out
    assert f"{counts['total'] / 1e6:.2f} M total, {counts['active'] / 1e6:.2f} M active per token" in output
    assert "100 steps x 768 tokens = 0.08 M tokens, 6.2 passes over the data" in output
    assert "2.0 MFLOP per token, 0.2 TFLOP in all" in output
    assert "world size 4, cpu" in output
    assert ("MTP" in output) == (name == "v3")
    assert max(map(len, output.splitlines())) <= 120


def test_recipes_and_accelerate_configs_are_packaged():
    folder = Path(run.__file__).parents[1] / "scripts"
    assert sorted(file.name for file in (folder / "accelerate").iterdir()) == [
        "ddp.yaml",
        "fsdp2-multinode.yaml",
        "fsdp2.yaml",
    ]

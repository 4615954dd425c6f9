"""Two processes over gloo, started as a user starts them, end where one process ends on the same global batch.

Trained by SGD, whose steps are the gradients themselves: all weights within 1e-6, the rounding of sums that are added
in another order. In fine-tuning within 1e-5, because a micro-batch's balance loss weighs as much as its share of
the targets, and micro-batches are cut differently. By AdamW, which divides a gradient by its own size, the rounding of
a gradient near zero (the embedding of a rare token) can become a whole step; routing, losses and figures agree.
"""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import environment, make_corpus_and_tokenizer, pretrain_words, torchrun

from fathom.scripts import cli

# 3 rows on each of two ranks, or 6 on one; the held-out rows fill no whole number of such batches.
ALONE, SHARED = ("--batch_size", "6"), ("--batch_size", "3")
FIGURES = ("loss", "targets", "bits_per_byte", "perplexity", "mtp_loss", "expert_load", "expert_load_worst_layer")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def pretrained(data) -> Path:
    assert cli.main(["pretrain", *pretrain_words(data, data / "pretrain", steps=2)]) == 0
    return data / "pretrain"


def differences(one: Path, other: Path) -> torch.Tensor:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])


def biases(folder: Path) -> torch.Tensor:
    loaded = load_file(folder / "model.safetensors")
    return torch.stack([loaded[name] for name in sorted(loaded) if name.endswith("e_score_correction_bias")])


def record(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def evaluation(folder: Path) -> dict[str, float]:
    return {name: record(folder)["evaluation"][name] for name in FIGURES}


def training_log(folder: Path, step: int) -> list[dict[str, float]]:
    history = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    names = ("loss", "mtp_loss", "balance_loss", "expert_load", "num_input_tokens_seen")
    return [{name: entry[name] for name in names} for entry in history if "loss" in entry]


def check_output(process: subprocess.CompletedProcess[str], ranks: int = 2) -> None:
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("world size") == process.stdout.count(f"world size {ranks}, cpu") == 1
    assert process.stdout.count("step 1/") == process.stdout.count("written to") == 1
    assert "find_unused_parameters" not in process.stderr


def test_two_processes_pretrain_what_one_does(data):
    one, two = data / "one", data / "two"
    common = ("--trainer", "optim=sgd", "max_grad_norm=0", "--learning_rate", "0.3", "--accumulation", "2")
    assert cli.main(["pretrain", *pretrain_words(data, one, *ALONE, *common)]) == 0
    check_output(torchrun("-m", "fathom.scripts.pretrain", *pretrain_words(data, two, *SHARED, *common)))
    assert differences(one, two).max() < 1e-6
    assert torch.equal(biases(one), biases(two))
    assert biases(one).any()
    assert evaluation(two) == pytest.approx(evaluation(one), rel=1e-5)
    assert record(two)["tokens_seen"] == record(one)["tokens_seen"]
    assert (record(one)["world_size"], record(two)["world_size"]) == (1, 2)
    assert shlex.split(record(two)["command"])[:5] == [
        "torchrun",
        "--nproc_per_node",
        "2",
        "-m",
        "fathom.scripts.pretrain",
    ]
    for ours, theirs in zip(training_log(one, 4), training_log(two, 4), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)


def test_two_processes_fine_tune_what_one_does(data, pretrained):
    """Conversations of different lengths, so that the ranks have unequal numbers of targets."""
    file = data / "conversations.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"f{n}?"}, {"role": "assistant", "content": "x + 1 " * (1 + n % 5)}]}
        for n in range(40)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, two = data / "sft-one", data / "sft-two"
    words = [
        *("--model", str(pretrained), "--data", str(file), "--steps", "3", "--log_steps", "1", "--precision", "fp32"),
        *("--sequence_length", "64", "--learning_rate", "0.1", "--trainer", "optim=sgd", "max_grad_norm=0"),
    ]
    assert cli.main(["sft", *words, *ALONE, "--out", str(one)]) == 0
    check_output(torchrun("-m", "fathom.scripts.sft", *words, *SHARED, "--out", str(two)))
    assert differences(one, two).max() < 1e-5
    assert torch.equal(biases(one), biases(two))
    assert evaluation(two) == pytest.approx(evaluation(one), rel=1e-4)
    for ours, theirs in zip(training_log(one, 3), training_log(two, 3), strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)


@pytest.mark.slow
def test_adamw_gives_the_same_figures_too(data):
    one, two = data / "adamw-one", data / "adamw-two"
    assert cli.main(["pretrain", *pretrain_words(data, one, *ALONE)]) == 0
    check_output(torchrun("-m", "fathom.scripts.pretrain", *pretrain_words(data, two, *SHARED)))
    assert (differences(one, two) < 1e-6).float().mean() > 0.99
    assert torch.equal(biases(one), biases(two))
    assert evaluation(two) == pytest.approx(evaluation(one), rel=1e-4)


def test_a_signal_to_one_process_stops_all_at_the_same_step(data, tmp_path):
    """Else the others would wait for it for ever."""
    script = tmp_path / "signalled.py"
    script.write_text(
        "import os, signal, sys\n"
        "from fathom.scripts import cli\n"
        "from fathom.training.run import SampleCallback\n"
        "def on_step_begin(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 2 and os.environ['RANK'] == '1':\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "SampleCallback.on_step_begin = on_step_begin\n"
        "code = cli.main(['pretrain', *sys.argv[1:]])\n"
        "open(f'{sys.argv[6]}-{os.environ[\"RANK\"]}', 'w').write(str(code))\n"
    )
    out = tmp_path / "out"
    words = pretrain_words(data, out, steps=50)
    assert words[5] == str(out)
    process = torchrun(str(script), *words)
    assert process.returncode == 0, process.stderr
    assert [(tmp_path / f"out-{rank}").read_text() for rank in (0, 1)] == ["130", "130"]
    assert process.stdout.count("stopped after step 3, checkpoint saved; continue with") == 1
    assert f"torchrun --nproc_per_node 2 -m fathom.scripts.pretrain {shlex.join(words)} --resume" in process.stdout
    files = {file.name for file in (out / "checkpoint-3").iterdir()}
    assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= files


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_the_same_step_with_a_checkpoint(data):
    out = data / "stopped"
    words = pretrain_words(data, out, steps=2000)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "fathom.scripts.pretrain", *words),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-4" / "trainer_state.json").is_file():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    found = re.search(r"stopped after step (\d+), checkpoint saved; continue with", output)
    assert found, output + errors
    stopped = int(found[1])
    assert f"torchrun --nproc_per_node 2 -m fathom.scripts.pretrain {shlex.join(words)} --resume" in output
    checkpoint = out / f"checkpoint-{stopped}"
    assert {"trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {file.name for file in checkpoint.iterdir()}

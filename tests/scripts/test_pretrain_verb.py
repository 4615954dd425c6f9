"""`fathom pretrain` from its command line: what it leaves behind, resuming, interruption, full disks, bad input."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import OVERRIDES, environment, make_corpus_and_tokenizer, pretrain_words
from transformers import AutoModelForCausalLM, AutoTokenizer

from fathom.scripts import cli
from fathom.training import run
from fathom.training.corpus import load_corpus


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a corpus and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data) -> Path:
    """The run folder of six steps without a break, with a checkpoint every two."""
    out = data / "whole"
    assert cli.main(["pretrain", *pretrain_words(data, out, "--save_total_limit", "0", steps=6)]) == 0
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit for bit: weights with experts, MTP layer and routing biases, and the optimizer's state."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for part in ("mlp.experts.3.down_proj", "layers.2.eh_proj", "e_score_correction_bias"):
        assert any(part in name for name in ours), part
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert differing == []
    states = [torch.load(folder / "checkpoint-6" / "optimizer.pt") for folder in (one, other)]
    moments = [[value for entry in state["state"].values() for _, value in sorted(entry.items())] for state in states]
    assert len(moments[0]) == len(moments[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


def test_the_run_folder_holds_a_model_for_plain_transformers(whole):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole)
    assert type(loaded).__name__ == "FathomForCausalLM"
    assert loaded.config.vocab_size == len(tokenizer)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.generation_config.do_sample
    assert loaded.generation_config.max_new_tokens is None
    assert loaded.config.use_cache
    assert (whole / "chat_template.jinja").is_file()
    assert not list(whole.glob("*.bin"))
    assert not list(whole.glob(".*"))


def test_run_json_states_what_was_run_and_measured(data, whole):
    record = json.loads((whole / "run.json").read_text())
    assert shlex.split(record["command"]) == [
        "fathom",
        "pretrain",
        *(word.rsplit("/", 1)[-1] for word in pretrain_words(data, whole, "--save_total_limit", "0", steps=6)),
    ]
    assert (record["verb"], record["steps"], record["world_size"], record["precision"]) == ("pretrain", 6, 1, "fp32")
    assert record["tokens_seen"] == 6 * 2 * 32
    loaded = AutoModelForCausalLM.from_pretrained(whole)
    mtp = sum(p.numel() for name, p in loaded.named_parameters() if name.startswith("model.layers.2."))
    assert record["parameters_mtp"] == mtp > 0
    assert record["parameters_total"] == sum(p.numel() for p in loaded.parameters()) - mtp
    assert record["corpus"] == json.loads((data / "corpus" / "corpus.json").read_text())


def test_the_reported_bits_per_byte_are_those_of_the_saved_model(data, whole):
    """Each held-out document cut into the same rows, by plain transformers and arithmetic."""
    record = json.loads((whole / "run.json").read_text())["evaluation"]
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(whole).eval(), AutoTokenizer.from_pretrained(whole)
    stream = [
        (token, place)
        for text in load_corpus(data / "corpus")["heldout"]["text"]
        for place, token in enumerate([tokenizer.bos_token_id, *tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    ]
    nats, size, targets = 0.0, 0, 0
    for start in range(0, len(stream), 32):
        row = stream[start : start + 32]
        starts = [at for at, (_, place) in enumerate(row) if place == 0 or at == 0] + [len(row)]
        for first, end in pairwise(starts):
            ids = [token for token, _ in row[first:end]]
            if len(ids) < 2:
                continue
            with torch.no_grad():
                logits = loaded(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
            nats -= sum(logits[at, token].item() for at, token in enumerate(ids[1:]))
            size += sum(len(tokenizer.decode([token]).encode()) for token in ids[1:] if token != tokenizer.eos_token_id)
            targets += len(ids) - 1
    assert record["targets"] == targets
    assert record["loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_a_checkpoint_is_a_model_with_its_record_too(whole):
    checkpoint = whole / "checkpoint-2"
    record = json.loads((checkpoint / "run.json").read_text())
    assert (record["steps"], record["tokens_seen"]) == (2, 2 * 2 * 32)
    assert "evaluation" not in record
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_what_it_prints(data, tmp_path, capsys):
    out = tmp_path / "printed"
    words = pretrain_words(data, out, "--eval_steps", "2", "--eval_rows", "3", "--accumulation", "2", "--tensorboard")
    assert cli.main(["pretrain", *words]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines[:-1])) <= 120 + len(str(out))
    assert output.count("world size 1,") == 1
    assert "4 steps x 128 tokens" in output
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/4", "2/4", "3/4", "4/4"]
    evaluations = [line for line in lines if line.startswith("held-out")]
    record = json.loads((out / "run.json").read_text())
    # At 2, at 4, and of all rows at the end.
    assert len(evaluations) == 3
    assert evaluations[-1].startswith(
        f"held-out ({record['evaluation']['targets']:,} tokens): {record['evaluation']['bits_per_byte']:.3f} bits per "
        f"byte, gzip {record['corpus']['gzip_bits_per_byte']:.3f}, xz {record['corpus']['xz_bits_per_byte']:.3f};"
    )
    assert evaluations[0] != evaluations[-1]
    assert re.search(r"  sample: 'def ", output)
    assert lines[-1] == f"next: fathom sft --model {out} --out {tmp_path / 'sft'}"
    assert list((out / "tensorboard").rglob("events.out.tfevents.*"))


def test_resuming_gives_the_weights_of_an_uninterrupted_run(data, whole, tmp_path, monkeypatch, capsys):
    """The interruption comes from within, after three steps of which the third was no checkpoint yet."""
    out = tmp_path / "resumed"
    words = pretrain_words(data, out, steps=6)
    on_step_end = run.ConsoleCallback.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.ConsoleCallback, "on_step_end", interrupting)
    assert cli.main(["pretrain", *words]) == 130
    monkeypatch.undo()
    output = capsys.readouterr().out
    assert "stopped after step 3, checkpoint saved; continue with" in output
    command = shlex.split(output.splitlines()[-1])
    assert command == ["fathom", "pretrain", *words, "--resume"]
    assert not (out / "config.json").exists()

    assert cli.main(command[1:]) == 0
    assert f"resuming from {out / 'checkpoint-3'}" in capsys.readouterr().out
    assert_equal_runs(out, whole)
    records = [json.loads((folder / "run.json").read_text()) for folder in (out, whole)]
    assert records[0]["tokens_seen"] == records[1]["tokens_seen"]
    assert records[0]["evaluation"]["loss"] == records[1]["evaluation"]["loss"]


def wait_for(condition, process, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_a_process_that_is_stopped_can_be_resumed(number, data, tmp_path, capsys):
    """A real process. Killed, it goes on from its last checkpoint; interrupted, from the step it was in."""
    out = tmp_path / "stopped"
    words = pretrain_words(data, out, steps=2000)
    process = subprocess.Popen(
        [sys.executable, "-m", "fathom", "pretrain", *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for((out / "checkpoint-4" / "trainer_state.json").is_file, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130
        stopped = int(re.search(r"stopped after step (\d+), checkpoint saved; continue with", output)[1])
        assert shlex.split(output.splitlines()[-1]) == ["fathom", "pretrain", *words, "--resume"]
        assert (out / f"checkpoint-{stopped}" / "trainer_state.json").is_file()
    else:
        assert process.returncode == -signal.SIGKILL
        stopped = max(int(file.parent.name.split("-")[1]) for file in out.glob("checkpoint-*/trainer_state.json"))
    # With the steps that are done already and one more, so that the test ends.
    done = pretrain_words(data, out, "--resume", steps=stopped + 1)
    assert cli.main(["pretrain", *done]) == 0
    assert f"resuming from {out / f'checkpoint-{stopped}'}" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["steps"] == stopped + 1


def test_overwriting_removes_the_old_run_s_checkpoints(data, tmp_path):
    """Else the old checkpoint-4 would be newer, by its number, than the new run's checkpoint-2."""
    out = tmp_path / "again"
    assert cli.main(["pretrain", *pretrain_words(data, out)]) == 0
    assert cli.main(["pretrain", *pretrain_words(data, out, "--overwrite", "--seed", "1", steps=2)]) == 0
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_full_disk_keeps_the_checkpoint_before(data, tmp_path, monkeypatch, capsys):
    import fathom.training.trainer as trainer_module

    out = tmp_path / "full"
    save = trainer_module.Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("checkpoint-4"):
            Path(folder, "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(trainer_module.Trainer, "_save_optimizer_and_scheduler", full)
    assert cli.main(["pretrain", *pretrain_words(data, out)]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert error.startswith("fathom pretrain: error: disk full while saving")
    assert "checkpoint-2 is intact" in error
    assert [folder.name for folder in out.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    assert cli.main(["pretrain", *pretrain_words(data, out, "--resume")]) == 0


def test_a_full_disk_at_the_end_leaves_no_half_model(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "full"

    def full(folder, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_run", full)
    assert cli.main(["pretrain", *pretrain_words(data, out, "--trainer", "save_strategy=no")]) == 2
    assert "disk full while saving" in capsys.readouterr().err
    assert not list(out.glob("*.safetensors"))
    assert not list(tmp_path.glob(".*"))


def test_options_from_a_yaml_file(data, tmp_path):
    """The command line wins over the file; lists and numbers in exponent form pass."""
    words = pretrain_words(data, tmp_path / "yaml", steps=1)
    options = dict(zip(words[: words.index("--override")][::2], words[1::2], strict=False))
    lines = [f"{name.removeprefix('--')}: {value}" for name, value in options.items()]
    lines += [
        "learning_rate: 2e-3",
        "seed: 5",
        f"override: {json.dumps(OVERRIDES[1:])}",
        "trainer: [max_grad_norm=0.5]",
    ]
    file = tmp_path / "run.yaml"
    file.write_text("\n".join(lines) + "\n")
    assert cli.main(["pretrain", "--config", str(file), "--seed", "6"]) == 0
    record = json.loads((tmp_path / "yaml" / "run.json").read_text())
    assert (record["seed"], record["steps"]) == (6, 1)
    state = json.loads((tmp_path / "yaml" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["log_history"][0]["learning_rate"] == pytest.approx(2e-3)


def test_auto_precision_starts_from_the_same_weights(data, tmp_path):
    initial = []
    for precision in ("fp32", "auto"):
        out = tmp_path / precision
        words = pretrain_words(data, out, "--precision", precision, "--learning_rate", "1e-30", steps=1)
        assert cli.main(["pretrain", *words]) == 0
        initial.append(weights(out)["model.layers.1.mlp.experts.0.down_proj.weight"])
    assert torch.equal(*initial)


def bad(message: str, *words: str):
    return pytest.param(words, message, id=" ".join(words)[:40])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        bad("unknown preset 'v33'; did you mean v3", "--generation", "v33"),
        bad("unknown size 'nana' of v3; did you mean nano", "--size", "nana"),
        bad("FathomConfig has no field 'hidden_sise'; did you mean hidden_size", "--override", "hidden_sise=64"),
        bad("--override takes name=value, not 'hidden_size'", "--override", "hidden_size"),
        bad("hidden_size", "--override", "hidden_size=wide"),
        bad("is no list or map", "--override", "token_mixers=[mla"),
        bad("num_experts_per_tok", "--override", "n_routed_experts=2", "num_experts_per_tok=4"),
        bad("vocab_size=300 is less than the tokenizer's 320; leave it out", "--override", "vocab_size=300"),
        bad("--sequence_length 4096 must be between 8 and the model's context of 1024", "--sequence_length", "4096"),
        bad("--sequence_length 4 must be between 8", "--sequence_length", "4"),
        bad("--precision fp8 is unknown; use auto, fp32 or bf16", "--precision", "fp8"),
        bad("--trainer learning_rat: TrainingArguments has no such field", "--trainer", "learning_rat=1"),
        bad("--steps 0 must be at least 1", "--steps", "0"),
        bad("invalid int value: 'many'", "--steps", "many"),
        bad("unknown option --step", "--step", "3"),
        bad("is no corpus, it has no train.parquet; make one with: fathom corpus", "--corpus", "nowhere"),
        bad("nowhere", "--tokenizer", "nowhere"),
        bad("holds no complete checkpoint; start without --resume", "--resume"),
        bad("cannot read --config nowhere.yaml", "--config", "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(words, message, data, tmp_path, capfd):
    out = tmp_path / "out"
    places = ["--corpus", str(data / "corpus"), "--tokenizer", str(data / "tokenizer"), "--out", str(out)]
    capfd.readouterr()
    assert cli.main(["pretrain", *places, *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fathom pretrain: error: ")
    assert message in line
    assert not out.exists()


def test_an_out_that_holds_a_run_is_kept(data, whole, capsys):
    before = weights(whole)
    assert cli.main(["pretrain", *pretrain_words(data, whole)]) == 2
    assert "already holds checkpoint-6; add --resume to continue it, --overwrite" in capsys.readouterr().err
    assert cli.main(["pretrain", *pretrain_words(data, whole, "--resume", "--override", "hidden_size=128")]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-6 has another configuration (hidden_size 64 -> 128" in error
    assert all(torch.equal(value, before[name]) for name, value in weights(whole).items())


INDEXER = ["--override", "index_topk=4", "index_n_heads=8", "index_head_dim=16"]


def logged_recall(folder: Path, steps: int) -> list[float]:
    history = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_indexer_recall"] for entry in history if "eval_indexer_recall" in entry]


def test_a_v3_model_becomes_v32_in_two_stages(data, whole, capsys):
    """The warm-up moves indexers alone and finds more of what attention reads; the sparse stage moves everything."""
    warm, sparse = data / "warm", data / "sparse"
    stages = {
        warm: ["--init", str(whole), "--generation", "v3.2", "--stage", "warmup", "--learning_rate", "1e-2", *INDEXER],
        sparse: ["--init", str(warm), "--learning_rate", "1e-4"],
    }
    for out, words in stages.items():
        common = pretrain_words(data, out, "--generation", "v3.2", steps=20)
        words = [*common, *words, "--eval_steps", "20", "--save_steps", "20"]
        assert cli.main(["pretrain", *words]) == 0
    assert "indexers capture" in capsys.readouterr().out
    other = [*pretrain_words(data, warm, steps=20), *stages[warm], "--stage", "dense", "--resume"]
    assert cli.main(["pretrain", *other]) == 2
    assert "another configuration (trained_parameters" in capsys.readouterr().err

    before, warmed, trained = weights(whole), weights(warm), weights(sparse)
    assert {name for name in warmed if name not in before} == {name for name in warmed if ".indexer." in name}
    assert all(torch.equal(warmed[name], before[name]) for name in before)
    assert not any(torch.equal(trained[name], warmed[name]) for name in warmed if name.endswith("proj.weight"))
    config = json.loads((warm / "config.json").read_text())
    assert (config["generation"], config["token_mixers"], config["index_dense"]) == ("v3.2", "dsa", True)
    assert json.loads((sparse / "config.json").read_text())["index_dense"] is False
    first, *_, last = logged_recall(warm, 20)
    assert last > first


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--stage", "warm"], "--stage warm is unknown; did you mean warmup?"),
        (["--stage", "warmup"], "has none that learn; use --generation v3.2 or v4"),
        (["--init", "nowhere"], "nowhere"),
        (["--init", "WHOLE", "--generation", "v4"], "a v3 model and cannot become v4"),
        (["--init", "WHOLE", "--override", "hidden_size=32"], "do not fit"),
    ],
)
def test_stages_that_cannot_be(data, whole, words, says, capsys):
    words = [str(whole) if word == "WHOLE" else word for word in words]
    assert cli.main(["pretrain", *pretrain_words(data, data / "never"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (data / "never").exists()

"""`fathom sft` from its command line: what it learns, leaves behind and refuses."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import environment, make_corpus_and_tokenizer, pretrain_words
from transformers import AutoModelForCausalLM, AutoTokenizer

from fathom import FathomForCausalLM
from fathom.scripts import cli
from fathom.training import run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a pretrained model, and conversations of which one in ten is long."""
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    assert cli.main(["pretrain", *pretrain_words(folder, folder / "pretrain", steps=2)]) == 0
    lines = [conversation(f"f{n}?", "return x + " + str(n) * (40 if n % 10 == 0 else 1)) for n in range(40)]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def conversation(user: str, assistant: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def words(data: Path, out: Path, *more: str) -> list[str]:
    return [
        *("--model", str(data / "pretrain"), "--data", str(data / "conversations.jsonl"), "--out", str(out)),
        *("--steps", "3", "--batch_size", "4", "--sequence_length", "40", "--log_steps", "1", "--precision", "fp32"),
        *more,
    ]


@pytest.fixture(scope="module")
def whole(data) -> Path:
    assert cli.main(["sft", *words(data, data / "whole", "--save_steps", "1", "--save_total_limit", "0")]) == 0
    return data / "whole"


def test_the_run_folder_holds_a_model_that_chats(data, whole):
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(whole), AutoTokenizer.from_pretrained(whole)
    prompt = tokenizer.apply_chat_template(
        conversation("f1?", "")["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert loaded.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    assert not list(whole.glob("*.bin"))


def test_run_json_states_what_was_run_and_carries_its_parent(data, whole):
    record = json.loads((whole / "run.json").read_text())
    assert record["parent"] == json.loads((data / "pretrain" / "run.json").read_text())
    assert (record["verb"], record["generation"], record["steps"]) == ("sft", "v3", 3)
    assert record["data"] == "conversations.jsonl"
    assert shlex.split(record["command"])[:2] == ["fathom", "sft"]
    lengths = sorted(token_counts(data))
    # Twelve conversations were read, without padding.
    assert sum(lengths[:12]) <= record["tokens_seen"] <= sum(lengths[-12:])


def token_counts(data: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    lines = map(json.loads, (data / "conversations.jsonl").read_text().splitlines())
    lengths = [len(tokenizer.apply_chat_template(line["messages"])["input_ids"]) for line in lines]
    return [length for length in lengths if length <= 40]


def test_the_held_out_loss_is_that_of_the_assistant_s_words(data, whole):
    """By plain transformers: which conversation is held out is read off the only one that is not trained on."""
    from fathom.training.questions import load_conversations

    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(whole).eval(), AutoTokenizer.from_pretrained(whole)
    nats, targets = 0.0, 0
    for row in load_conversations(str(data / "conversations.jsonl"))["heldout"]:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(row["messages"][1]["content"] + tokenizer.eos_token)["input_ids"]
        if len(prompt + answer) > 40:
            continue
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt + answer]), use_cache=False).logits[0].double().log_softmax(-1)
        nats -= sum(logits[len(prompt) + at - 1, token].item() for at, token in enumerate(answer))
        targets += len(answer)
    evaluation = json.loads((whole / "run.json").read_text())["evaluation"]
    assert evaluation["targets"] == targets > 0
    assert evaluation["loss"] == pytest.approx(nats / targets, rel=1e-5)


def test_what_it_prints(data, tmp_path, capsys):
    assert cli.main(["sft", *words(data, tmp_path / "sft")]) == 0
    output = capsys.readouterr().out
    left_out = 40 - len(token_counts(data))
    assert left_out == 4
    assert sum(int(line.split()[2]) for line in output.splitlines() if line.startswith("left out")) == left_out
    assert "  sample: " in output
    assert " -> " in output
    assert output.splitlines()[-1] == f"next: fathom chat {tmp_path / 'sft'}"
    assert max(map(len, output.splitlines()[:-3])) <= 120


def test_interrupted_and_resumed_it_ends_in_the_same_weights(data, whole, tmp_path, monkeypatch, capsys):
    import signal

    on_step_end = run.ConsoleCallback.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(run.ConsoleCallback, "on_step_end", interrupting)
    assert cli.main(["sft", *words(data, tmp_path / "out")]) == 130
    monkeypatch.undo()
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert command[:2] == ["fathom", "sft"]
    assert cli.main(command[1:]) == 0
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "out"))
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_a_model_in_bf16_is_trained_in_fp32(data, tmp_path):
    half = tmp_path / "half"
    FathomForCausalLM.from_pretrained(data / "pretrain", dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(data / "pretrain").save_pretrained(half)
    assert cli.main(["sft", *words(data, tmp_path / "sft", "--model", str(half), "--steps", "1")]) == 0
    assert {value.dtype for value in load_file(tmp_path / "sft" / "model.safetensors").values()} == {torch.float32}


def test_options_from_a_yaml_file(data, tmp_path):
    lines = [
        *(f"model: {data / 'pretrain'}", f"data: {data / 'conversations.jsonl'}", f"out: {tmp_path / 'yaml'}"),
        *("steps: 2", "batch_size: 2", "precision: fp32", "sequence_length: 40", "gradient_checkpointing: true"),
    ]
    (tmp_path / "sft.yaml").write_text("\n".join(lines))
    assert cli.main(["sft", "--config", str(tmp_path / "sft.yaml"), "--steps", "1"]) == 0
    assert json.loads((tmp_path / "yaml" / "run.json").read_text())["steps"] == 1


def test_accelerate_launch(data, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    process = subprocess.run(
        [*command, "-m", "fathom.scripts.sft", *words(data, tmp_path / "out", "--steps", "1")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "world size 1, cpu" in process.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_conversations_that_end_with_the_user_and_bad_rows(data, tmp_path, capsys):
    rows = [conversation(f"f{n}?", f"return {n}") for n in range(12)]
    for row in rows:
        row["messages"].append({"role": "user", "content": "Thanks!"})
    lines = [*map(json.dumps, rows), '{"messages": ', json.dumps({"text": "no conversation"})]
    (tmp_path / "thanks.jsonl").write_text("\n".join(lines))
    more = ("--data", str(tmp_path / "thanks.jsonl"), "--steps", "1")
    # Before the model is loaded: there is none.
    assert cli.main(["sft", *words(data, tmp_path / "out", *more, "--model", str(data / "tokenizer"))]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "thanks.jsonl line 13 is no JSON" in line
    assert line.endswith("--skip_bad_rows")
    assert cli.main(["sft", *words(data, tmp_path / "out", *more, "--skip_bad_rows")]) == 0
    output = capsys.readouterr().out
    assert f"left out    2 bad rows: {tmp_path / 'thanks.jsonl'} line 13 is no JSON" in output
    assert "Thanks!" not in output


def test_control_tokens_that_are_asked_for_by_name(data, tmp_path, capsys):
    rows = [conversation(f"f{n}?", f"<think>x</think>{n}") for n in range(12)]
    (tmp_path / "think.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--data", str(tmp_path / "think.jsonl"), "--steps", "1")
    assert cli.main(["sft", *words(data, tmp_path / "a", *more)]) == 0
    assert cli.main(["sft", *words(data, tmp_path / "b", *more, "--allowed_special", "<think>", "</think>")]) == 0
    capsys.readouterr()
    seen = [json.loads((tmp_path / name / "run.json").read_text())["tokens_seen"] for name in "ab"]
    assert seen[0] - seen[1] >= 4 * 7, "two tokens where the characters are nine or more"
    assert cli.main(["sft", *words(data, tmp_path / "c", *more, "--allowed_special", "<thin>")]) == 2
    assert "'<thin>' is no control token of this tokenizer; known are <think>" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2-multinode"])
def test_shipped_accelerate_configs_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    file = Path(run.__file__).parents[1] / "scripts" / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert (config.distributed_type.value, config.use_cpu) == ("MULTI_GPU" if name == "ddp" else "FSDP", False)
    assert f"--config_file scripts/accelerate/{name}.yaml" in file.read_text()
    if name != "ddp":
        assert config.fsdp_config["fsdp_version"] == 2
        # Left out, the layers that are sharded one by one are those that the model names, whatever its generation.
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config


def bad(message: str, *words: str):
    return pytest.param(words, message, id=" ".join(words)[:40])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        bad("nowhere", "--model", "nowhere"),
        bad("is a checkpoint of model_type 'llama'; Fathom loads 'fathom'", "--model", "LLAMA"),
        bad("conversations in nowhere.jsonl", "--data", "nowhere.jsonl"),
        bad("broken.jsonl", "--data", "BROKEN"),
        bad("no conversation of", "--sequence_length", "5"),
        bad("--sequence_length 129 is more than the model's context of 128 tokens", "--sequence_length", "129"),
        bad("--steps 0 must be at least 1", "--steps", "0"),
        bad("--precision half is unknown", "--precision", "half"),
        bad("unknown option --epochs", "--epochs", "3"),
        bad("holds no complete checkpoint", "--resume"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(more, message, data, tmp_path, capfd):
    llama, broken = tmp_path / "llama", tmp_path / "broken.jsonl"
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(llama)
    (llama / "config.json").write_text('{"model_type": "llama"}')
    broken.write_text('{"messages": [{"role": "user", "content": "a"}]}\n{"messages": \n')
    more = [{"LLAMA": str(llama), "BROKEN": str(broken)}.get(word, word) for word in more]
    capfd.readouterr()
    assert cli.main(["sft", *words(data, tmp_path / "out", *more)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("fathom sft: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_resuming_with_another_model_is_refused(data, whole, tmp_path, capsys):
    other = tmp_path / "other"
    assert cli.main(["pretrain", *pretrain_words(data, other, "--override", "hidden_size=64", steps=1)]) == 0
    assert cli.main(["sft", *words(data, whole, "--model", str(other), "--resume")]) == 2
    assert "has another configuration (" in capsys.readouterr().err

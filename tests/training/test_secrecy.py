"""Secrets and absolute paths are nowhere in what a run writes and prints, and work for the run all the same."""

import copy
import json
import os
import pickle
import shlex
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import make_corpus_and_tokenizer, pretrain_words

from fathom.scripts import cli
from fathom.training import secrecy
from fathom.training.options import RunOptions
from fathom.training.run import SampleCallback
from fathom.training.secrecy import (
    REDACTED,
    is_secret_name,
    public,
    public_command,
    public_text,
    redacted_words,
    without_secrets,
)
from fathom.training.trainer_arguments import training_arguments

SECRET_NAMES = [
    "hub_token",
    "token",
    "api_key",
    "apiKey",
    "key",
    "password",
    "db_password",
    "client_secret",
    "HF_TOKEN",
]
SECRET_NAMES += ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "access-token", "credentials", "auth", "private_key_path"]
OTHER_NAMES = ["bos_token", "eos_token", "pad_token", "pad_token_id", "num_key_value_heads", "tokenizer", "tokens_seen"]
OTHER_NAMES += ["include_num_input_tokens_seen", "token_bytes", "max_grad_norm", "monkey", "keys", "sort_key", "seed"]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_names_of_secrets(name: str):
    assert is_secret_name(name)
    for command in (f"--trainer {name}=some-value", f"--{name} some-value", f"--{name}=some-value"):
        words = redacted_words(shlex.split(command))
        assert not any("some-value" in word for word in words)
        assert any(name in word for word in words)
    assert "some-value" not in json.dumps(public({"recipe": {"trainer": {name: "some-value"}}}))
    assert "some-value" not in without_secrets(f'settings={{"{name}": "some-value"}}, {name}=some-value')


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_other_things(name: str):
    assert not is_secret_name(name)
    assert public({name: "some-value"}) == {name: "some-value"}
    assert redacted_words([f"{name}=some-value"]) == [f"{name}=some-value"]


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 11,
        "hf_SECRET1",
        "hf_" + "x" * 34,
        "api_org_" + "x" * 30,
        "sk-" + "aB3" * 16,
        "sk-proj-abc123DEF456_-x",
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 30,
        "glpat-" + "a1" * 10,
        "AKIA" + "Q7" * 8,
        "xoxb-123456789012-abc",
        "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nx==\n-----END RSA PRIVATE KEY-----",
    ],
)
@pytest.mark.parametrize(
    "around", ["{}", "say {} to me", "run-{}", "a={},b=2", '["{}"]', "https://host/{}?x=1", "'{}'"]
)
def test_values_that_look_like_secrets(secret: str, around: str):
    text = around.format(secret)
    assert secret not in without_secrets(text)
    assert REDACTED in without_secrets(text)
    assert secret not in json.dumps(public({"facts": [{"run_name": text}]}))


@pytest.mark.parametrize(
    "text",
    [
        "runs/hf_baseline",
        "hf_hub",
        "hf_transfer",
        "sk-learn",
        "sklearn",
        "a key: value",
        "needs a token: run it",
        "1/2",
    ],
)
def test_values_that_do_not(text: str):
    assert public_text(text) == text


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("https://jane:pw123@host/x", "https://<redacted>@host/x"),
        ("https://mytoken@host/x", "https://<redacted>@host/x"),
        ("s3://host/x?token=abc&y=1", "s3://host/x?token=<redacted>&y=1"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
    ],
)
def test_urls_with_credentials(url: str, safe: str):
    assert public_text(url) == safe
    assert public({"data": [url]}) == {"data": [safe]}


def test_what_an_environment_variable_expands_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-words-only")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    assert without_secrets("run_name=x-plain-words-only-y") == f"run_name=x-{REDACTED}-y"
    assert without_secrets(f"--out {tmp_path}") == f"--out {tmp_path}"
    (tmp_path / "token").write_text("stored-by-hf-login\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    assert without_secrets("stored-by-hf-login") == REDACTED


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("/home/jane/runs/x", "x"),
        ("/home/jane doe/my runs", "my runs"),
        ("~/texts", "texts"),
        ("~jane/texts", "texts"),
        ("file:///home/jane/x.txt", "x.txt"),
        ("C:\\Users\\jane\\x.txt", "x.txt"),
        ("see /home/jane/x: gone", "see x: gone"),
        ("a=/home/jane/x,b=/home/jane/y", "a=x,b=y"),
        ("jane@host:/home/jane/x", "jane@host:x"),
        ("runs/x", "runs/x"),
        ("./x/y", "./x/y"),
        ("../x", "../x"),
        ("<think>x</think>", "<think>x</think>"),
        ("/", "/"),
    ],
)
def test_paths_keep_their_last_part(text: str, safe: str):
    assert public_text(text) == safe
    assert public({"sources": [text]}) == {"sources": [safe]}


def test_commands_are_read_as_a_shell_reads_them():
    command = (
        "fathom pretrain --out '/home/jane doe/x y' --corpus=/data/c --trainer hub_token=abc deepspeed=/etc/ds.json"
    )
    safe = "fathom pretrain --out 'x y' --corpus=c --trainer 'hub_token=<redacted>' deepspeed=ds.json"
    assert public_command(command) == safe
    assert public({"parent": {"command": command}}) == {"parent": {"command": safe}}
    assert "jane" not in public_command("fathom sft --out '/home/jane/x")  # a quote without its partner


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["hf_aB3aB3aB3", "/home/jane/x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "hub_token", "b/c"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(JSON)
def test_nothing_survives_at_any_depth_and_twice_is_once(value):
    safe = public(value)
    text = json.dumps(safe)
    assert "hf_aB3" not in text
    assert "jane" not in text
    assert public(safe) == safe


def test_arguments_tell_nothing_when_they_are_written_and_keep_everything_when_they_are_copied(tmp_path: Path):
    options = RunOptions(steps=2, precision="fp32", trainer=["hub_token=hf_sEcReT123", "run_name=hf_sEcReT123"])
    arguments = training_arguments(tmp_path / "out", options, torch.device("cpu"), None)
    assert arguments.hub_token == "hf_sEcReT123"
    torch.save(arguments, tmp_path / "training_args.bin")
    for written in (pickle.dumps(arguments), (tmp_path / "training_args.bin").read_bytes()):
        assert b"sEcReT" not in written
        assert str(tmp_path).encode() not in written
    for text in (arguments.to_json_string(), str(arguments.to_sanitized_dict())):
        assert "sEcReT" not in text
        assert str(tmp_path) not in text
    for copied in (copy.copy(arguments), copy.deepcopy(arguments)):
        assert copied.hub_token == "hf_sEcReT123"
        assert copied.output_dir == str(tmp_path / "out")


def test_no_file_and_no_line_of_a_run_tells_a_secret(tmp_path: Path, monkeypatch, capfd):
    """The token reaches the Trainer. Nothing in OUT has it, or a path; neither has what is printed, errors included."""
    data, out, token = tmp_path / "data", tmp_path / "jane-doe" / "run", "hf_sEcReTsEcReT7"
    make_corpus_and_tokenizer(data)
    seen = []
    on_step_begin = lambda self, args, *rest, **kwargs: seen.append(args.hub_token)  # noqa: E731
    monkeypatch.setattr(SampleCallback, "on_step_begin", on_step_begin, raising=False)
    words = pretrain_words(data, out, "--tensorboard", "--trainer", f"hub_token={token}", f"run_name={out}/x")
    best = ["load_best_model_at_end=true", "metric_for_best_model=loss", "eval_steps=2"]
    assert cli.main(["pretrain", *words, *best]) == 0
    assert cli.main(["sft", "--model", str(out), "--out", str(out), "--data", "docstrings"]) == 2
    assert cli.main(["pretrain", *words, *best, "--resume", "--learning_rate", "1"]) == 2
    assert set(seen) == {token}
    printed = "".join(capfd.readouterr())
    assert "sEcReT" not in printed
    written = [file for folder in (out, data / "corpus") for file in folder.rglob("*") if file.is_file()]
    assert {"run.json", "trainer_state.json", "corpus.json"} <= {file.name for file in written}
    assert not [file for file in written if file.name == "training_args.bin"]
    for file in written:
        content = file.read_bytes()
        assert b"sEcReT" not in content, file
        assert str(tmp_path).encode() not in content, file
    command = json.loads((out / "run.json").read_text())["command"]
    assert shlex.split(command)[:7] == ["fathom", "pretrain", "--corpus", "corpus", "--tokenizer", "tokenizer", "--out"]
    assert f"'hub_token={REDACTED}' run_name=x" in command
    assert {file.stat().st_mode & 0o777 for file in written} == {0o666 & ~current_umask()}


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_secret_that_was_given_once_is_one_in_every_text(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(secrecy, "_remembered", set())
    secrecy.remember("only-words-here")
    assert without_secrets("401 for only-words-here!") == f"401 for {REDACTED}!"

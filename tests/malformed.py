"""Folders with something wrong in them, and what `fathom inspect` and loading say of them.

Every folder is a whole one with one change. The two verdicts must be the same:

    `inspect` finds it whole    <=>  it loads, reads a prompt, decodes from its cache and answers, all numbers finite
    `inspect` finds problems    <=>  loading raises UserError; both in one line, and no other exception leaves either
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings

from fathom import FathomConfig, FathomForCausalLM
from fathom.demo.generation import chat_prompt, stream
from fathom.demo.sampling import Sampling
from fathom.demo.shelf import load_source
from fathom.tokenizer import train_tokenizer
from fathom.training.errors import UserError
from fathom.training.inspection import inspect_checkpoint

MANY = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
TEXTS = ["def double(x):\n    return 2 * x\n", "the quick brown fox jumps over the lazy dog. ", "0123456789 " * 3]
SMALL = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "n_routed_experts": 4}
SMALL |= {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 128}
KINDS = {
    "v3": {"intermediate_size": 48},
    "v4": {"num_hidden_layers": 4, "num_hash_layers": 1, "sliding_window": 8, "compress_rate_hca": 8, "o_groups": 2},
}
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_whole(root: Path) -> dict[str, Path]:
    """A folder per kind, with a tokenizer."""
    folders = {}
    for kind, shape in KINDS.items():
        folder = folders[kind] = root / kind
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            FathomForCausalLM(FathomConfig.preset(kind, **{**SMALL, **shape})).save_pretrained(folder)
        train_tokenizer(TEXTS * 4, 288, 128).save_pretrained(folder)
    return folders


@contextlib.contextmanager
def changed(source: Path, folder: Path, change: Callable[[Path], None]) -> Iterator[Path]:
    """A copy of a whole folder with one change, for as long as the block runs."""
    folder.mkdir()
    try:
        for name in (*MODEL_FILES, *TOKENIZER_FILES):
            shutil.copyfile(source / name, folder / name)
        change(folder)
        yield folder
    finally:
        shutil.rmtree(folder)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert text.isprintable(), text
    assert len(text) <= 1000
    return text


def inspected(folder: Path) -> str:
    """ "" if inspect recommends it for a chat, else what it says."""
    try:
        found = inspect_checkpoint(str(folder))
    except UserError as error:
        return one_line(error)
    json.loads(found.as_json())
    assert found.chats == (not found.problems), found
    return "; ".join(found.problems)


def loaded(folder: Path) -> str:
    """ "" if it loads and works as the verbs use it, else why not."""
    try:
        model, tokenizer = (found := load_source(str(folder))).model, found.tokenizer
        prompt = chat_prompt(tokenizer, [{"role": "user", "content": "the quick brown fox 0123"}])
    except UserError as error:
        return one_line(error)
    assert max(prompt) < model.config.vocab_size
    with torch.no_grad():
        output = model(torch.tensor([prompt]))
        assert output.logits.isfinite().all()
        assert model(torch.tensor([prompt[:1]]), cache=output.cache).logits.isfinite().all()
    if len(prompt) < model.config.max_position_embeddings:
        *_, last = stream(model, tokenizer, prompt, Sampling(max_new_tokens=2))
        assert 1 <= last.new_tokens <= 2
    return ""


def same_verdict(folder: Path) -> str:
    """The common verdict: "" or what loading says."""
    said, raised = inspected(folder), loaded(folder)
    assert bool(said) == bool(raised), f"inspect: {said or 'whole'} | loading: {raised or 'loads'}"
    return raised


def write_json(file: str, **values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return change

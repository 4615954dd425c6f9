"""Killed at any moment of training or saving, a run goes on from its last complete checkpoint to the same bits."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from killed import run_until
from safetensors.torch import load_file
from tiny_runs import make_corpus_and_tokenizer, pretrain_words

from fathom.scripts import cli
from fathom.training.resumable import latest_checkpoint

RECIPES = {
    "adamw": ["--accumulation", "2"],
    "muon": ["--optimizer", "muon", "--schedule", "multistep", "--learning_rate", "1e-2", "--save_total_limit", "1"],
}
STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus_and_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path) -> dict[str, Path]:
    """A run without a break by each recipe."""
    for name, words in RECIPES.items():
        assert cli.main(["pretrain", *pretrain_words(data, data / name, *words, steps=STEPS)]) == 0
    return {name: data / name for name in RECIPES}


def places(seed: int, count: int) -> Iterator[tuple[str, int]]:
    """Where to kill. Writing a checkpoint opens, makes, renames and removes some fifty files."""
    chosen = random.Random(seed)
    for number in range(count):
        yield ("step", chosen.randint(1, 3)) if number % 3 == 1 else ("file", chosen.randint(5, 130))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_killed_again_and_again_ends_with_the_same_bits(recipe, data, whole, tmp_path):
    """Each run is killed while it goes on from what the kill before it left."""
    out = tmp_path / "run"
    words = ["pretrain", *pretrain_words(data, out, *RECIPES[recipe], steps=STEPS)]
    kills, resumed_from = 0, set()
    for kind, count in [*places(seed=len(recipe), count=5), ("file", 10**9)]:
        last = latest_checkpoint(out)
        resumed_from.add(last and last.name)
        code = run_until([*words, "--resume" if last else "--overwrite"], out, kind, count)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert code == 0
    assert kills >= 3
    assert len(resumed_from) >= 2
    assert [path for folder in (tmp_path, out) for path in folder.glob(".*")] == []
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, whole[recipe]))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

"""What several tests share: a Hub on this machine, client processes, and a checkpoint small enough for any test."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Read once, when huggingface_hub is imported, so set before: no test reaches out of this machine.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
# A runner started by `nohup` hands on that SIGHUP is ignored, which verbs respect; tests send it.
if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# pytest's importlib mode puts no test folder on the path; `from hub_server import Hub` needs this one.
sys.path.insert(0, str(Path(__file__).parent))

from hub_server import Hub, running_hub

TEXTS = ["def double(x):\n    return 2 * x\n", "the quick brown fox jumps over the lazy dog. ", "0123456789 " * 3]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a fresh process that knows the Hub; `token=None` for one that is not signed in."""

    def run(code: str, *args: Any, token: str | None = "hf_test") -> subprocess.CompletedProcess[str]:
        # The developer's own tokens and caches stay outside; one cache per token, as on two machines.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = inherited | hub.environment(str(tmp_path / f"home-{token}"), token) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, *map(str, args)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A V3 model with random weights (MLA, experts, MTP) and its tokenizer, as a run saves them; read only."""
    import torch

    from fathom import FathomConfig, FathomForCausalLM
    from fathom.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    config = FathomConfig.preset(
        "v3",
        vocab_size=288,
        hidden_size=64,
        num_hidden_layers=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FathomForCausalLM(config).save_pretrained(folder)
    train_tokenizer(TEXTS * 4, config.vocab_size, config.max_position_embeddings).save_pretrained(folder)
    return folder

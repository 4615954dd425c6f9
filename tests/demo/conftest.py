"""A model that can talk for long, and the page with it in this process, so that tests can count its forward passes."""

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.training.checkpoints import load_model, load_tokenizer

CONTEXT = 4096


@pytest.fixture(scope="session")
def long_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a context of 4096 tokens, which takes some seconds to fill, and no greedy end.

    Zero logits for the end of the sentence and of the reasoning are never the largest ones of 288.
    """
    folder = tmp_path_factory.mktemp("runs") / "long"
    model, tokenizer = load_model(str(tiny_checkpoint)), load_tokenizer(str(tiny_checkpoint))
    model.config.max_position_embeddings = CONTEXT
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "</think>"])] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(long_checkpoint: Path) -> Any:
    return load_tokenizer(str(long_checkpoint))


@pytest.fixture(scope="session")
def model(long_checkpoint: Path) -> Any:
    return load_model(str(long_checkpoint))


@dataclass
class Page:
    """The running page."""

    url: str
    shelf: Any
    models_dir: Path
    checkpoint: str
    damaged: str
    feedback: Path

    @contextmanager
    def watched(self, pause: float = 0.01) -> Iterator[list[int]]:
        """A list that grows by every forward of the model, each longer by a pause: what is seen or stopped lasts."""
        seen: list[int] = []

        def count(*_: Any) -> None:
            seen.append(1)
            time.sleep(pause)

        hook = self.shelf.in_use().model.register_forward_hook(count)
        try:
            yield seen
        finally:
            hook.remove()


@pytest.fixture(scope="session")
def page_server(long_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    from fathom.demo.app import build_app, launch
    from fathom.demo.shelf import Shelf

    models_dir = long_checkpoint.parent
    damaged = models_dir / "damaged"
    shutil.copytree(long_checkpoint, damaged)
    (damaged / "tokenizer.json").write_text("{")
    shelf = Shelf(models_dir, [str(long_checkpoint)])
    shelf.load(str(long_checkpoint))
    feedback = models_dir / "feedback.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = build_app(shelf, feedback)
    url = launch(app, "127.0.0.1", port)
    yield Page(url, shelf, models_dir, str(long_checkpoint), str(damaged), feedback)
    app.close(verbose=False)

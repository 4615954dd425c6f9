"""The models a page may choose from, at most one of them in memory, which answers several users in one batch.

A source is a checkpoint folder, a Hub id, or `random:GENERATION`: a nano model with random weights, built in
seconds without any file, for looking at the machinery before something is trained.
"""

import argparse
import ast
import gc
import inspect
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling.configuration_fathom import FathomConfig
from ..modeling.modeling_fathom import FathomForCausalLM
from ..modeling.presets import GENERATIONS
from ..tokenizer import train_tokenizer
from ..training.checkpoints import find_checkpoints
from ..training.errors import UserError, did_you_mean
from ..training.loading import load_model, load_tokenizer

RANDOM = "random:"
UNTRAINED = tuple(RANDOM + generation for generation in reversed(GENERATIONS))  # newest first
UNTRAINED_VOCAB_SIZE = 1024
ANSWERS = 8  # that a model gives at a time


@dataclass(frozen=True)
class Loaded:
    """A model in memory, on its device and in eval mode."""

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def generation(self) -> str:
        return getattr(self.model.config, "generation", self.model.config.model_type)

    def parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token uses; MTP layers, which only draft, are in neither."""
        counts = getattr(self.model, "parameter_counts", None)
        if counts is None:
            return self.model.num_parameters(), self.model.num_parameters()
        return counts()["total"], counts()["active"]


def is_untrained(source: str) -> bool:
    return source.startswith(RANDOM)


def untrained(generation: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A nano model with the same random weights each time, and a tokenizer trained on a few standard-library files.

    Raises:
        UserError: unknown generation (with the nearest names).
    """
    if generation not in GENERATIONS:
        known = ", ".join(UNTRAINED)
        raise UserError(f"unknown model {RANDOM}{generation}{did_you_mean(generation, GENERATIONS)}; known: {known}")
    config = FathomConfig.preset(generation, size="nano", vocab_size=UNTRAINED_VOCAB_SIZE)
    texts = [inspect.getsource(module) for module in (textwrap, argparse, ast)]
    tokenizer = train_tokenizer(texts, UNTRAINED_VOCAB_SIZE, config.max_position_embeddings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FathomForCausalLM(config).eval(), tokenizer


def load_source(source: str, int8: bool = False) -> Loaded:
    """Loads a model and its tokenizer onto the accelerator, or the CPU where there is none.

    Args:
        int8: put its weights into int8.

    Raises:
        UserError: the source is none, or cannot be loaded.
    """
    if is_untrained(source):
        model, tokenizer = untrained(source.removeprefix(RANDOM))
    else:
        tokenizer = load_tokenizer(source)
        model = load_model(source)
        stored = model.generation_config
        # Of what a folder stores for `generate()` only its control tokens: the rest is said by page and command line.
        model.generation_config = GenerationConfig(
            bos_token_id=stored.bos_token_id, eos_token_id=stored.eos_token_id, pad_token_id=stored.pad_token_id
        )
    if int8:
        model.quantize_int8()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return Loaded(source, model, tokenizer)


def load_shared(source: str, int8: bool = False) -> Loaded:
    """As `load_source`; answers that a Fathom model gives at the same time share its forwards."""
    loaded = load_source(source, int8)
    if isinstance(loaded.model, FathomForCausalLM):
        loaded.model.share_batch(max_rows=ANSWERS)
    return loaded


class Shelf:
    """Finds the sources below a folder and holds the one that is in use."""

    def __init__(self, models_dir: Path, named: Sequence[str] = (), int8: bool = False) -> None:
        """Makes an empty shelf.

        Args:
            models_dir: checkpoints are looked for here, anew at each call of `sources()`.
            named: further sources, e.g. a Hub id; first in the list.
            int8: of every model that is loaded, put the weights into int8.
        """
        self.models_dir = models_dir
        self.named = tuple(named)
        self.int8 = int8
        self._current: Loaded | None = None
        self._answers = 0  # that the current model is giving
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # of whoever asks for a model: none overtakes those who wait for another one

    def sources(self) -> list[str]:
        """What may be loaded: the named ones, checkpoints (newest first), untrained models."""
        found = [str(path) for path in find_checkpoints(self.models_dir)] if self.models_dir.is_dir() else []
        return list(dict.fromkeys([*self.named, *found, *UNTRAINED]))

    def load(self, source: str) -> Loaded:
        """Gives the source's model; another one in memory is freed first, and put back if the new one fails.

        Waits for the answers that the other one is giving.

        Raises:
            UserError: not one of `sources()`, or it cannot be loaded.
        """
        with self._turn, self._changed:
            return self._load(source)

    @contextmanager
    def borrow(self, source: str) -> Iterator[Loaded]:
        """As `load`, for one answer: until its end the model stays. Up to `ANSWERS` of them share a batch."""
        with self._turn, self._changed:
            loaded = self._load(source)
            self._answers += 1
        try:
            yield loaded
        finally:
            with self._changed:
                self._answers -= 1
                self._changed.notify_all()

    def _load(self, source: str) -> Loaded:
        if self._current is not None and self._current.source == source:
            return self._current
        if source not in self.sources():
            raise UserError(f"no model {source!r} on offer; choose one of: {', '.join(self.sources())}")
        self._changed.wait_for(lambda: self._answers == 0)
        previous = self._current.source if self._current is not None else None
        self._free()
        try:
            self._current = load_shared(source, self.int8)
        except Exception:
            if previous is not None:
                self._current = load_shared(previous, self.int8)
            raise
        return self._current

    def in_use(self) -> Loaded:
        """The model in memory; waits while another one is being loaded.

        Raises:
            UserError: none was loaded, or the last one could not be put back.
        """
        with self._changed:
            if self._current is None:
                raise UserError("no model is loaded; choose one")
            return self._current

    def _free(self) -> None:
        if self._current is not None and (batch := getattr(self._current.model, "shared_batch", None)) is not None:
            batch.close()  # an answer that nobody waits for may still be in its last forward
            del batch
        self._current = None
        gc.collect()  # modules hold reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

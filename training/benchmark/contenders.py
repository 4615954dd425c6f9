"""Who runs in a benchmark: several models of the same weights.

    stock      the class of transformers itself, without any code of ours
    fathom     Fathom as `from_pretrained` loads it
    reference  Fathom with the readable definitions of attention and experts
    compiled   Fathom with a static cache and a compiled step
    int8       Fathom with its weights in int8
    draft      Fathom with its MTP layers, generating with `use_mtp=True`
    shared     Fathom answering all requests at once, in a shared batch

All are loaded from files. Fathom writes them; what stock loads is `fathom export --to transformers` of the same.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, StaticCache
from transformers.utils import logging

from ...modeling.configuration_fathom import FathomConfig
from ...modeling.modeling_fathom import FathomForCausalLM
from ..checkpoint_check import read_model_config
from ..checkpoint_files import read_config
from ..errors import UserError
from ..export import export_checkpoint

CONTENDERS = ("stock", "fathom", "reference", "compiled", "int8", "draft", "shared")
# Terms of the training loss that stock does not have. Without them both losses are the same number.
NO_EXTRA_LOSSES = {"seq_aux_loss_coef": 0.0, "aux_loss_alpha": 0.0, "indexer_loss_coef": 0.0}
# Tokens that are read at a time to fill a cache: with all of a long text at once, stock's masks need its square.
CHUNK = 1024


def random_checkpoint(folder: Path, generation: str, size: str, **overrides: Any) -> None:
    """Writes a model of a preset with random weights and, unless they are asked for, no MTP layers.

    Raises:
        UserError: fields that there are not, or that cannot work.
    """
    try:
        config = FathomConfig.preset(generation, size, **{"num_nextn_predict_layers": 0, **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        FathomForCausalLM(config).save_pretrained(folder)


def stock_checkpoint(source: Path, target: Path) -> str | None:
    """Writes `source` for transformers' own class. Returns why there is none; None if there is one."""
    if read_model_config(read_config(source), str(source)).generation == "moe":
        return "transformers has no class for DeepSeekMoE"
    try:
        export_checkpoint(source, target, "transformers")
    except UserError as error:
        return str(error)
    return None


class Contender:
    """A model, and how it reads texts.

    Args:
        name: one of `CONTENDERS`.
        folder: what Fathom loads; for `stock` what `stock_checkpoint` has written.
        experts: transformers' `experts_implementation`, or None for the model's own choice.
    """

    def __init__(self, name: str, folder: Path, dtype: torch.dtype, device: torch.device, experts: str | None = None):
        self.name = name
        self.device = device
        self.static = name == "compiled"
        settings: dict[str, Any] = {"dtype": dtype}
        if name == "reference":
            settings |= {"attn_implementation": "eager", "experts_implementation": "eager"}
        if experts is not None:
            settings["experts_implementation"] = experts
        self.model = self.load(folder, settings).to(device).eval()
        if name == "int8":
            self.model.quantize_int8()
        self.call: Callable = torch.compile(self.model.forward, fullgraph=True) if self.static else self.model

    def load(self, folder: Path, settings: dict[str, Any]) -> PreTrainedModel:
        # Stock says that it drops MTP layers; that is known.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            if self.name == "stock":
                return AutoModelForCausalLM.from_pretrained(folder, **settings)
            config = FathomConfig.from_pretrained(folder, **NO_EXTRA_LOSSES)
            if self.name != "draft":
                config.drop_mtp_layers()
            return FathomForCausalLM.from_pretrained(folder, config=config, **settings)
        finally:
            logging.set_verbosity(verbosity)

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """Reads a text [B, T] at once into a new cache, and returns the last token's logits [B, V]."""
        return self.model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]

    def generate(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """`count` tokens that follow the text [B, T], greedily."""
        settings = {"use_mtp": True} if self.name == "draft" else {}
        sequences = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
        return sequences[:, tokens.shape[1] :]

    def answer(self, requests: Sequence[torch.Tensor], count: int) -> torch.Tensor:
        """`count` tokens after each of B requests [1, T], [B, count]: one after another, or by `shared` at once."""
        if self.name != "shared":
            return torch.cat([self.generate(tokens, count) for tokens in requests])
        self.model.share_batch(max_rows=len(requests))
        with ThreadPoolExecutor(len(requests)) as users:
            return torch.cat(list(users.map(lambda tokens: self.generate(tokens, count), requests)))


class Decoding:
    """A text that a contender reads one token at a time, after a part of it that fills the cache.

    Args:
        tokens: [B, T], the whole text.
        context: number of tokens in the cache before the first step.
    """

    def __init__(self, contender: Contender, tokens: torch.Tensor, context: int):
        self.contender = contender
        self.tokens = tokens
        self.read = context
        config = contender.model.config
        self.cache: Cache | None = StaticCache(config, max_cache_len=tokens.shape[1]) if contender.static else None
        for start in range(0, context, CHUNK):
            chunk = tokens[:, start : min(start + CHUNK, context)]
            output = contender.model(chunk, cache=self.cache, use_cache=True, logits_to_keep=1)
            self.cache = output.cache

    def step(self) -> torch.Tensor:
        """Reads the next token, and returns its logits [B, V]."""
        start, self.read = self.read, self.read + 1
        if not self.contender.static:
            token = self.tokens[:, start : self.read]
            return self.contender.model(token, cache=self.cache, use_cache=True).logits[:, -1]
        text = self.tokens[:, : self.read]
        mask = torch.ones_like(text)
        inputs = self.contender.model.prepare_inputs_for_generation(
            text,
            next_sequence_length=1,
            cache=self.cache,
            attention_mask=mask,
            position_ids=mask.cumsum(dim=1) - 1,
        )
        return self.contender.call(**inputs).logits[:, -1]


class Training:
    """Steps of AdamW on one batch, weights in fp32 and products in `dtype`.

    The learning rate is 0: the work is that of any step, and all steps have the same weights.
    """

    def __init__(self, contender: Contender, tokens: torch.Tensor, dtype: torch.dtype):
        self.model = contender.model.train()
        self.tokens = tokens
        self.autocast = torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32)
        # What `FathomTrainer` does; stock has no such argument.
        self.settings = {} if contender.name == "stock" else {"skip_logits": True}
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=True)

    def step(self) -> torch.Tensor:
        """One forward, backward and update; returns the loss."""
        with self.autocast:
            loss = self.model(self.tokens, labels=self.tokens, use_cache=False, **self.settings).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def held_bytes(value: Any) -> int:
    """Bytes of memory behind all tensors that a cache, or anything else, holds: each once, room included."""
    sizes: dict[int, int] = {}
    seen: set[int] = set()

    def visit(each: Any) -> None:
        if id(each) in seen:
            return
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, dict):
            for item in each.values():
                visit(item)
        elif isinstance(each, list | tuple):
            for item in each:
                visit(item)
        elif hasattr(each, "__dict__"):
            visit(vars(each))

    visit(value)
    return sum(sizes.values())

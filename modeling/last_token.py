"""The last token of a prompt: of the last layer, its output alone is wanted.

`generate()` asks for the logits of a prompt's last token. No layer reads what the last layer makes of the tokens
before; so it only caches what later tokens need of them, and reads the last token as it will read the next one, by a
step of decoding. That leaves out the queries, the attention and the feed-forward network of one layer. Where MTP layers
or losses read every token's output, or anybody listens, all of it is computed.
"""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import output_capturing

from .cache import FathomDynamicCache

# Fewer tokens are read in one native call per layer, which is faster than two.
FEWEST_TOKENS = 64

# Arguments of a layer that are [B, T].
PER_TOKEN = ("input_ids", "token_mask", "places")


def reads_last_alone(model: nn.Module, hidden_states: torch.Tensor, cache: Cache | None, **inputs: Any) -> bool:
    """Whether the last layer of a `FathomModel` can be spared all of a text's tokens but the last.

    Args:
        hidden_states: [B, T, ...], what the layers are given.
        cache: where tokens are remembered.
        inputs: the other arguments of the layers.
    """
    if model.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if hidden_states.shape[1] < FEWEST_TOKENS or inputs.get("report_indexer"):
        return False
    # What has a fixed length is read under masks, which a prompt alone need not have.
    if not isinstance(cache, FathomDynamicCache) or cache.offloading:
        return False
    if model.config._attn_implementation not in ("eager", "sdpa"):
        return False
    last = model.layers[model.config.num_hidden_layers - 1]
    return not any(map(is_heard, (model, model.hc_head, model.norm, *last.modules())))


def is_heard(module: nn.Module) -> bool:
    """Whether anybody listens to a module's calls, or has put something in the place of its `forward`."""
    return "forward" in vars(module) or listens(module._forward_hooks) or listens(module._forward_pre_hooks)


def listens(hooks: dict) -> bool:
    """Whether any of a module's hooks does something: transformers leaves those that record outputs in place."""
    recording = bool(output_capturing._active_collector.get())
    return any(recording or hook.__module__ != output_capturing.__name__ for hook in hooks.values())


def of_last(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a layer is given with the last token, of what it is given with all of them."""

    def last(each: torch.Tensor | None) -> torch.Tensor | None:
        return None if each is None else each[:, -1:].contiguous()

    some = {name: last(inputs[name]) for name in PER_TOKEN if name in inputs}
    if inputs.get("position_embeddings") is not None:
        some["position_embeddings"] = tuple(map(last, inputs["position_embeddings"]))
    if inputs.get("attention_mask") is not None:
        some["attention_mask"] = inputs["attention_mask"][:, :, -1:]
    if "rotations" in inputs:
        some["rotations"] = {}
    return {**inputs, **some}

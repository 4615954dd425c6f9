"""Checkpoints: the names of tensors on disk and in memory, and what is read besides.

On disk every generation has its own, DeepSeek's, names; in memory all have transformers':

                      in memory                                  on disk
    before V4         model.layers.0.self_attn.q_a_proj.weight   the same
    V4                model.layers.0.self_attn.q_a_proj.weight   layers.0.attn.wq_a.weight
    experts           mlp.experts.gate_up_proj [E, 2 I, d]       mlp.experts.7.gate_proj.weight [I, d], ...
    MTP layer of V4   model.layers.{num_hidden_layers}.*         mtp.0.*

What is read: these names; the mixture of both that transformers' own V4 writes (its renamings are not undone
everywhere: `model.hc_head.hc_fn`, `attn.norm`); and quantised weights, dequantised one by one (`quantized_weights`).
What is written: the names above, whichever were read.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .quantized_weights import QuantizedSlice, open_tensors

logger = logging.get_logger(__name__)

# DeepSeek-V4's names and ours: beginnings of names, outside of the layers and inside of one; # is an expert's number.
V4_OUTSIDE = (
    ("embed.", "embed_tokens."),
    ("norm.", "norm."),
    ("head.", "lm_head."),
    ("hc_head_", "hc_head.hc_"),
)
V4_INSIDE = (
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn.wq_a.", "self_attn.q_a_proj."),
    ("attn.q_norm.", "self_attn.q_a_norm."),
    ("attn.wq_b.", "self_attn.q_b_proj."),
    ("attn.wkv.", "self_attn.kv_proj."),
    ("attn.kv_norm.", "self_attn.kv_norm."),
    ("attn.wo_a.", "self_attn.o_a_proj."),
    ("attn.wo_b.", "self_attn.o_b_proj."),
    ("attn.compressor.ape", "self_attn.compressor.position_bias"),
    ("attn.compressor.wkv.", "self_attn.compressor.kv_proj."),
    ("attn.compressor.wgate.", "self_attn.compressor.gate_proj."),
    ("attn.compressor.norm.", "self_attn.compressor.kv_norm."),
    ("attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"),
    ("attn.indexer.compressor.wkv.", "self_attn.compressor.indexer.kv_proj."),
    ("attn.indexer.compressor.wgate.", "self_attn.compressor.indexer.gate_proj."),
    ("attn.indexer.compressor.norm.", "self_attn.compressor.indexer.kv_norm."),
    ("attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."),
    ("attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."),
    ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("ffn.gate.", "mlp.gate."),
    ("ffn.experts.#.w1.", "mlp.experts.#.gate_proj."),
    ("ffn.experts.#.w2.", "mlp.experts.#.down_proj."),
    ("ffn.experts.#.w3.", "mlp.experts.#.up_proj."),
    ("ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."),
    ("ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."),
    ("ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."),
    # In MTP layers alone, the last two in some releases: copies of the embedding and the head.
    ("norm.", "shared_head.norm."),
    ("hc_head_", "hc_head.hc_"),
    ("emb.tok_emb.", "embed_tokens."),
    ("head.", "shared_head.head."),
)
# Written by transformers' V4 for `kv_norm`; DeepSeek's code has no such name.
V4_INSIDE_READ = (*V4_INSIDE, ("attn.norm.", "self_attn.kv_norm."))


def name_in_memory(name: str, config) -> str:
    """The name in memory of a tensor on disk, experts one by one, for any name that is read.

    Args:
        name: DeepSeek's name, transformers', or what transformers' V4 makes of the two.
        config: says whether the names are V4's, and where its MTP layers begin.
    """
    return v4_name_in_memory(name, config.num_hidden_layers) if config.compresses else name


def v4_name_in_memory(name: str, num_hidden_layers: int) -> str:
    """The same for a V4 of so many main layers. A name that is none of V4's stays as it is."""
    body = name.removeprefix("model.")
    first, _, rest = body.partition(".")
    number, _, inside = rest.partition(".")
    if first in ("layers", "mtp") and _is_number(number):
        layer = int(number) + (num_hidden_layers if first == "mtp" else 0)
        return f"model.layers.{layer}.{_replace_start(inside, V4_INSIDE_READ)}"
    replaced = _replace_start(body, V4_OUTSIDE)
    if replaced.startswith(("embed_tokens.", "norm.", "hc_head.")):
        return f"model.{replaced}"
    return name if replaced == body else replaced


def name_on_disk(name: str, config) -> str:
    """The name on disk of a tensor in memory, with experts already one by one."""
    if not config.compresses:
        return name
    body = name.removeprefix("model.")
    to_disk = {side: tuple((ours, theirs) for theirs, ours in side) for side in (V4_OUTSIDE, V4_INSIDE)}
    if not body.startswith("layers."):
        return _replace_start(body, to_disk[V4_OUTSIDE])
    _, number, inside = body.split(".", 2)
    inside = _replace_start(inside, to_disk[V4_INSIDE])
    depth = int(number) - config.num_hidden_layers
    return f"layers.{number}.{inside}" if depth < 0 else f"mtp.{depth}.{inside}"


def _replace_start(name: str, beginnings: Iterable[tuple[str, str]]) -> str:
    parts = name.split(".")
    if "#" in parts:  # which stands for a number here
        return name
    numbers = iter([part for part in parts if _is_number(part)])
    pattern = ".".join("#" if _is_number(part) else part for part in parts)
    for old, new in beginnings:
        if pattern.startswith(old):
            pattern = new + pattern.removeprefix(old)
            break
    return ".".join(next(numbers) if part == "#" else part for part in pattern.split("."))


def _is_number(part: str) -> bool:
    """Whether a part of a name numbers a layer or an expert. Files may hold any text as names."""
    return part.isascii() and part.isdecimal() and len(part) < 10


_LAYER = re.compile(r"(?:model\.)?(layers|mtp)\.(\d{1,9})\.(.*)", re.S)
# The projection of the next token's embedding, which MTP layers alone have.
_OF_MTP_LAYER = ("eh_proj.", "e_proj.")


def saved_layers(names: Iterable[str]) -> int | None:
    """The number of main layers of a checkpoint with tensors of these names, or None where it has no MTP layers."""
    matches = [match for match in map(_LAYER.fullmatch, names) if match is not None]
    if any(match[1] == "mtp" for match in matches):
        return 1 + max((int(match[2]) for match in matches if match[1] == "layers"), default=-1)
    return min((int(match[2]) for match in matches if match[3].startswith(_OF_MTP_LAYER)), default=None)


def first_layers(tensors: Mapping[str, Any], saved: int, num_hidden_layers: int) -> dict[str, Any]:
    """The tensors of so many main layers and of all MTP layers, these with the numbers that follow.

    Args:
        tensors: of a checkpoint, by name.
        saved: `saved_layers` of it.
        num_hidden_layers: main layers to keep.
    """
    kept: dict[str, Any] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is not None and match[1] == "layers":
            layer = int(match[2])
            if num_hidden_layers <= layer < saved:
                continue
            if layer >= saved:
                name = f"model.layers.{layer - saved + num_hidden_layers}.{match[3]}"
        kept[name] = tensor
    return kept


class OfficialNames(WeightRenaming):
    """The renaming above as transformers' loading and saving apply it. Theirs are regular expressions that know no
    config, and so not at which layer MTP begins."""

    __slots__ = ("config", "rename")

    def __init__(self, config, rename=name_in_memory):
        super().__init__("", "")
        self.config, self.rename = config, rename

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return self.rename(source_key, self.config), None

    def reverse_transform(self) -> "OfficialNames":
        return OfficialNames(self.config, name_on_disk if self.rename is name_in_memory else name_in_memory)


def fuse_experts(mlp: str = "mlp", matrices: tuple = ("gate_proj", "up_proj", "down_proj")) -> list[WeightConverter]:
    """One tensor per expert matrix on disk, of these names, from and to the fused parameters in memory."""
    gate, up, down = (f"{mlp}.experts.*.{matrix}.weight" for matrix in matrices)
    return [
        WeightConverter(
            [gate, up], "mlp.experts.gate_up_proj", operations=[MergeModulelist(dim=0), Concatenate(dim=1)]
        ),
        WeightConverter(down, "mlp.experts.down_proj", operations=[MergeModulelist(dim=0)]),
    ]


class OfficialCheckpoints(PreTrainedModel):
    """A model that reads and writes DeepSeek's checkpoints."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # Official checkpoints store copies of the embedding and the head with every MTP layer; they are shared here.
        self._keys_to_ignore_on_load_unexpected = [r"layers\.\d+\.(embed_tokens|shared_head\.head)\."]
        self.register_load_state_dict_pre_hook(_read_official_names)

    @property
    def _weight_conversions(self) -> list[WeightRenaming | WeightConverter]:
        """What transformers undoes when it saves: always the same, whichever layout a model was loaded from."""
        return [OfficialNames(self.config), *fuse_experts()]

    @_weight_conversions.setter
    def _weight_conversions(self, used_in_loading) -> None:
        """transformers notes here what loading has used."""

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        """As in transformers, which calls it with a model on the meta device; reads quantised weights too."""
        tensors, quantized, config = state_dict, False, model.config
        if state_dict is None and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            tensors = open_tensors(checkpoint_files)
            quantized = any(isinstance(tensor, QuantizedSlice) for tensor in tensors.values())
        if tensors and config.num_nextn_predict_layers:
            saved = saved_layers(tensors)
            if saved is None:
                model.drop_mtp_layers()
            elif saved != config.num_hidden_layers:
                logger.warning(
                    f"{config.name_or_path} has {saved} layers before its MTP layers, and num_hidden_layers="
                    f"{config.num_hidden_layers} are loaded"
                )
                state_dict = tensors = first_layers(tensors, saved, config.num_hidden_layers)
        mapping = [OfficialNames(model.config), *(load_config.weight_mapping or [])]
        load_config = replace(load_config, weight_mapping=mapping)
        load = PreTrainedModel._load_pretrained_model
        if not quantized:
            return load(model, state_dict, checkpoint_files, load_config, expected_keys)
        with _one_tensor_at_a_time():
            return load(model, tensors, None, load_config, expected_keys)

    def drop_mtp_layers(self) -> None:
        """Removes the MTP layers, of which a checkpoint has none.

        transformers' models drop MTP weights when they load, so what they save has none, and their config.json says
        the opposite. Layers with random weights would look like trained ones.
        """
        config = self.config
        logger.warning(
            f"{config.name_or_path} says num_nextn_predict_layers={config.num_nextn_predict_layers} but holds no "
            f"weights of MTP layers: the model is loaded without them"
        )
        del self.base_model.layers[config.num_hidden_layers :]
        config.drop_mtp_layers()


@contextmanager
def _one_tensor_at_a_time() -> Iterator[None]:
    """Keeps transformers from reading ahead in threads: dequantised experts would wait for their layer's others, and
    memory that one thread frees is not used by another. It doubles the peak."""
    switch = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before


def _read_official_names(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Lets `load_state_dict` read what is on disk, as Trainer does to resume and to reload the best model."""
    if prefix or not module.config.compresses:
        return
    inner = "model." if module.base_model is module else ""
    for name in list(state_dict):
        state_dict[name_in_memory(name, module.config).removeprefix(inner)] = state_dict.pop(name)


# Also where transformers looks for the layout of a model without having one, as PEFT's conversion of adapters does. It
# takes both names on disk, for it knows no config: patterns that only read, `_weight_conversions` are those that write.
register_checkpoint_conversion_mapping(
    "fathom",
    fuse_experts("(?:mlp|ffn)", ("(?:gate_proj|w1)", "(?:up_proj|w3)", "(?:down_proj|w2)")),
    overwrite=True,
)

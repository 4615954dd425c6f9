"""Tensors of a checkpoint under one set of names, whoever wrote it, and what is wrong with them.

    DeepSeek's V4 files       layers.3.attn.wq_a.weight            layers.3.ffn.experts.7.w1.weight
    transformers' V4 files    model.layers.3.attn.wq_a.weight      model.layers.3.ffn.experts.7.w1.weight
    all other DeepSeek files  model.layers.3.self_attn.q_a_proj.weight   model.layers.3.mlp.experts.7.gate_proj.weight
    in memory                 model.layers.3.self_attn.q_a_proj.weight   model.layers.3.mlp.experts.gate_up_proj

All become `layers.3.self_attn.q_a_proj.weight` and `layers.3.mlp.experts.7.gate_proj.weight`: no `model.` in front, one
matrix per expert. DeepSeek's names are those of its inference code (`model.py` of DeepSeek-V4, of V3 and V3.2).

Quantised weights have their scales beside them: `X.weight_scale_inv` or `X.scale` with `X.weight`. Two FP4 numbers
stand in one byte, so such a matrix has half the columns on disk.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ..modeling.conversion import v4_name_in_memory

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)$")
_SCALE = re.compile(r"(.*)\.(?:scale|weight_scale_inv)$")
# Copies of the embedding and the head: DeepSeek's in MTP layers, or a head that is tied; in memory they are shared.
_SHARED_COPY = re.compile(r"layers\.\d+\.(emb|embed_tokens|head|shared_head\.head)\.|lm_head\.")


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it."""

    name: str
    dtype: str  # safetensors' names: BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def from_header(cls, name: str, entry: dict[str, Any]) -> "StoredTensor":
        begin, end = entry["data_offsets"]
        return cls(name, entry["dtype"], tuple(entry["shape"]), end - begin)


class Layout(NamedTuple):
    """The tensors of a checkpoint held against those that its config asks for."""

    weights: list[StoredTensor]  # with the shapes that they have in memory
    scales: dict[str, StoredTensor]  # by the name of the weight they belong to
    problems: list[str]


def canonical_name(name: str, num_hidden_layers: int) -> str:
    """The name of the same tensor in the layout that this module's docstring describes."""
    return v4_name_in_memory(name, num_hidden_layers).removeprefix("model.")


def expected_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a whole checkpoint of `model` holds; works on the meta device."""
    layers = model.config.num_hidden_layers
    tied = getattr(model, "_tied_weights_keys", None) or {} if model.config.tie_word_embeddings else {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            expected.update(_matrices(canonical_name(name, layers), tuple(tensor.shape)))
    return expected


def compare(tensors: list[StoredTensor], model: nn.Module) -> Layout:
    """Holds what is stored against what `model` needs.

    Args:
        tensors: all of a checkpoint.
        model: built from its config, on the meta device.
    """
    layers = model.config.num_hidden_layers
    names = {tensor.name for tensor in tensors}
    weights, scales = [], {}
    for tensor in tensors:
        match = _SCALE.fullmatch(tensor.name)
        if match and f"{match[1]}.weight" in names:
            scales[f"{match[1]}.weight"] = tensor
        else:
            weights.append(tensor)
    weights = [_unpacked(tensor) if tensor.name in scales else tensor for tensor in weights]

    expected = expected_shapes(model)
    found: set[str] = set()
    unexpected, other_shape = [], []
    for tensor in weights:
        canonical = canonical_name(tensor.name, layers)
        for name, shape in _matrices(canonical, tensor.shape):
            if name in expected:
                found.add(name)
                if shape != expected[name]:
                    other_shape.append(f"{tensor.name} is {list(shape)}, should be {list(expected[name])}")
            elif not _SHARED_COPY.match(name):
                unexpected.append(tensor.name)
    missing = [name for name in expected if name not in found]
    problems = [
        *_listed(missing, "is", "are", "missing that the config expects"),
        *_listed(list(dict.fromkeys(unexpected)), "is", "are", "there that the config does not expect"),
        *_listed(other_shape, "does", "do", "not have the shape that the config says"),
    ]
    return Layout(weights, scales, problems)


def pattern_of(name: str) -> str:
    """The name with {layer} and {expert} in place of numbers."""
    name = re.sub(r"(^|\.)(layers|mtp)\.\d+\.", r"\1\2.{layer}.", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", name)


def is_packed(tensor: StoredTensor) -> bool:
    """Whether a weight with scales holds two FP4 numbers in a byte; all wider formats fill whole bytes each."""
    return tensor.dtype in ("I8", "U8", "F4")


def _unpacked(tensor: StoredTensor) -> StoredTensor:
    if is_packed(tensor) and math.prod(tensor.shape) == tensor.nbytes:
        return tensor._replace(shape=(*tensor.shape[:-1], 2 * tensor.shape[-1]))
    return tensor


def _matrices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensor itself, or the matrices of all experts where they are fused into one."""
    match = _FUSED.fullmatch(name)
    if match is None or len(shape) != 3:
        yield name, shape
        return
    experts, rows, columns = shape
    parts = ["down_proj"] if match[2] == "down_proj" else ["gate_proj", "up_proj"]
    for expert in range(experts):
        for part in parts:
            yield f"{match[1]}.{expert}.{part}.weight", (rows // len(parts), columns)


def _listed(names: list[str], singular: str, plural: str, what: str) -> list[str]:
    if not names:
        return []
    number = f"{len(names):,} tensors {plural}" if len(names) > 1 else f"1 tensor {singular}"
    return [f"{number} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"]

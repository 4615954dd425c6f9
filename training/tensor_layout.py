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

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from ..modeling.conversion import name_in_memory, v4_name_in_memory
from ..modeling.quantized_weights import QUANTIZED, SCALE_SUFFIXES, shape_of_quantized

_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,9})\.(gate_proj|up_proj|down_proj)\.weight", re.S)
_SCALE = re.compile(r"(.*)\.(?:scale|weight_scale_inv)", re.S)
# What a file may hold beyond the model: copies of the embedding and the head (DeepSeek's in MTP layers, or a head that
# is tied), which are shared in memory, and a buffer that old code saved.
_BEYOND = re.compile(
    r"layers\.\d+\.(emb|embed_tokens|head|shared_head\.head)\.|lm_head\.|(.*\.)?rotary_emb\.inv_freq$", re.S
)
_OF_BASE_MODEL = ("layers.", "embed_tokens.", "norm.", "hc_head.")
_FLOATS, _WHOLE_NUMBERS = ("F32", "BF16", "F16", "F64"), ("I64", "I32")


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
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in _state(model).items():
        expected.update(_matrices(name, shape))
    return expected


def compare(tensors: list[StoredTensor], model: nn.Module, may_lack: str | None = None) -> Layout:
    """Holds what is stored against what `model` needs. The time it takes is that of what is stored, not of the config.

    Args:
        tensors: all of a checkpoint.
        model: built from its config, on the meta device.
        may_lack: pattern of tensors that need not be there.
    """
    weights, scales, unreadable = _scaled(tensors)
    wanted = _Wanted(model, may_lack)
    for tensor in weights:
        wanted.take(tensor, quantized=tensor.name in scales)
    number, missing = wanted.missing()
    problems = [
        *_listed(missing, "is", "are", "missing that the config expects", number),
        *_listed(wanted.unexpected, "is", "are", "there that the config does not expect"),
        *_listed(wanted.other_shape, "does", "do", "not have the shape that the config says"),
        *_listed(wanted.repeated, "is", "are", "stored under two names"),
        *_listed([*unreadable, *wanted.other_dtype], "is", "are", "not stored as numbers that can be read"),
        *wanted.prefix_problem(),
    ]
    return Layout(weights, scales, problems)


class _Wanted:
    """The tensors that a model needs, and which of them were found.

    Experts are counted and not listed, since a config may ask for any number of them.
    """

    def __init__(self, model: nn.Module, may_lack: str | None):
        self.config = model.config
        self.may_lack = re.compile(may_lack) if may_lack else None
        self.whole_numbers = {
            canonical_name(name, self.config.num_hidden_layers)
            for name, tensor in model.state_dict().items()
            if not tensor.is_floating_point()
        }
        self.shapes: dict[str, tuple[int, ...]] = {}
        # By module and matrix, as layers.1.mlp.experts and up_proj: the shape of one expert's, and whose were found.
        self.experts: dict[tuple[str, str], tuple[int, ...]] = {}
        self.found_experts: dict[tuple[str, str], set[int]] = {}
        self.number_of_experts = 0
        for name, shape in _state(model).items():
            if (match := _FUSED.fullmatch(name)) is None or len(shape) != 3:
                self.shapes[name] = shape
                continue
            self.number_of_experts = shape[0]
            for part, one in _parts(match[2], shape):
                self.experts[match[1], part] = one
                self.found_experts[match[1], part] = set()
        self.found: set[str] = set()
        self.unexpected: list[str] = []
        self.other_shape: list[str] = []
        self.other_dtype: list[str] = []
        self.repeated: list[str] = []
        self.with_prefix: dict[bool, str] = {}  # a name that begins with `model.`, and one that does not

    def take(self, tensor: StoredTensor, quantized: bool) -> None:
        """Notes a stored tensor, and what is wrong with it."""
        in_memory = name_in_memory(tensor.name, self.config)
        name = in_memory.removeprefix("model.")
        if not self._found(name, tensor):
            if not _BEYOND.match(name):
                self.unexpected.append(tensor.name)
            return
        if name.startswith(_OF_BASE_MODEL):
            self.with_prefix.setdefault(name != in_memory, tensor.name)
        readable = _WHOLE_NUMBERS if name in self.whole_numbers else _FLOATS
        if not quantized and tensor.dtype not in readable:
            self.other_dtype.append(f"{tensor.name} is {tensor.dtype}, should be {' or '.join(readable)}")

    def _found(self, name: str, tensor: StoredTensor) -> bool:
        """Whether the model needs the tensor; its shape and whether it came before are noted."""
        shape = tensor.shape
        if name in self.shapes:
            self._note(tensor, shape, self.shapes[name], repeated=name in self.found)
            self.found.add(name)
            return True
        if match := _EXPERT.fullmatch(name):
            key, expert = (match[1], match[3]), int(match[2])
            if key not in self.experts or expert >= self.number_of_experts:
                return False
            self._note(tensor, shape, self.experts[key], repeated=expert in self.found_experts[key])
            self.found_experts[key].add(expert)
            return True
        match = _FUSED.fullmatch(name)
        keys = [(match[1], part) for part, _ in _parts(match[2], (1, 2, 1))] if match else []
        if not keys or keys[0] not in self.experts:
            return False
        rows, columns = self.experts[keys[0]]
        wanted = (self.number_of_experts, rows * len(keys), columns)
        self._note(tensor, shape, wanted, repeated=bool(self.found_experts[keys[0]]))
        for key in keys:
            self.found_experts[key] = set(range(self.number_of_experts))
        return True

    def _note(self, tensor: StoredTensor, shape: tuple[int, ...], wanted: tuple[int, ...], repeated: bool) -> None:
        if repeated:
            self.repeated.append(tensor.name)
        if shape != wanted:
            self.other_shape.append(f"{tensor.name} is {list(shape)}, should be {list(wanted)}")

    def missing(self) -> tuple[int, list[str]]:
        """The number of tensors that were not found, and the names of the first ones."""
        names = [name for name in self.shapes if name not in self.found and not self._may_lack(name)]
        number = len(names)
        for (module, part), found in self.experts_found():
            lacking = self.number_of_experts - len(found)
            number += lacking
            if lacking and len(names) < 3:
                absent = (expert for expert in range(self.number_of_experts) if expert not in found)
                names += [f"{module}.{expert}.{part}.weight" for expert in islice(absent, 3)]
        return number, names

    def experts_found(self) -> Iterator[tuple[tuple[str, str], set[int]]]:
        return (item for item in self.found_experts.items() if not self._may_lack(".".join(item[0])))

    def _may_lack(self, name: str) -> bool:
        return self.may_lack is not None and self.may_lack.search(name) is not None

    def prefix_problem(self) -> list[str]:
        if len(self.with_prefix) < 2:
            return []
        with_it, without = self.with_prefix[True], self.with_prefix[False]
        return [f"some names begin with `model.`, as {with_it}, and others do not, as {without}"]


def pattern_of(name: str) -> str:
    """The name with {layer} and {expert} in place of numbers."""
    name = re.sub(r"(^|\.)(layers|mtp)\.\d+\.", r"\1\2.{layer}.", name)
    return re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", name)


def is_packed(tensor: StoredTensor) -> bool:
    """Whether a weight with scales holds two FP4 numbers in a byte; all wider formats fill whole bytes each."""
    return tensor.dtype in ("I8", "U8", "F4")


def _scaled(tensors: list[StoredTensor]) -> tuple[list[StoredTensor], dict[str, StoredTensor], list[str]]:
    """Weights with their shapes in memory, scales by the names of their weights, and what cannot be read of them."""
    by_name = {tensor.name: tensor for tensor in tensors}
    scales, unreadable = {}, []
    for tensor in tensors:
        match = _SCALE.fullmatch(tensor.name)
        weight = by_name.get(f"{match[1]}.weight") if match else None
        if weight is not None and weight.dtype in QUANTIZED:
            scales[weight.name] = tensor
    belongs = {tensor.name for tensor in scales.values()}
    weights = []
    for tensor in tensors:
        if tensor.name in belongs:
            continue
        if (scale := scales.get(tensor.name)) is not None:
            try:
                shape = shape_of_quantized(tensor.name, tensor.shape, tensor.dtype, scale.shape, scale.dtype)
                tensor = tensor._replace(shape=tuple(shape))
            except ValueError as error:
                unreadable.append(str(error))
        elif tensor.dtype in QUANTIZED and tensor.name.endswith(".weight"):
            stem = tensor.name.removesuffix(".weight")
            unreadable.append(f"{tensor.name} is {tensor.dtype} without {stem}{' or '.join(SCALE_SUFFIXES)}")
        weights.append(tensor)
    return weights, scales, unreadable


def _state(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes in memory by canonical names, of what a checkpoint of the model holds."""
    layers = model.config.num_hidden_layers
    tied = getattr(model, "_tied_weights_keys", None) or {} if model.config.tie_word_embeddings else {}
    return {
        canonical_name(name, layers): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _parts(fused: str, shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of the matrices that one expert has in a fused parameter."""
    parts = ("down_proj",) if fused == "down_proj" else ("gate_proj", "up_proj")
    for part in parts:
        yield part, (shape[1] // len(parts), shape[2])


def _matrices(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensor itself, or the matrices of all experts where they are fused into one."""
    match = _FUSED.fullmatch(name)
    if match is None or len(shape) != 3:
        yield name, shape
        return
    for expert in range(shape[0]):
        for part, one in _parts(match[2], shape):
            yield f"{match[1]}.{expert}.{part}.weight", one


def _listed(names: list[str], singular: str, plural: str, what: str, number: int | None = None) -> list[str]:
    if not names:
        return []
    number = len(names) if number is None else number
    counted = f"{number:,} tensors {plural}" if number > 1 else f"1 tensor {singular}"
    return [f"{counted} {what}: {', '.join(names[:3])}{', ...' if number > 3 else ''}"]

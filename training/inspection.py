"""What a checkpoint is, from its config, its index and the headers of its weight files; no tensor is read.

    config.json            generation, kinds of layers, cache bytes
      -> meta device       parameters, expected tensors; a model without memory
    safetensors headers    names, shapes, dtypes and bytes of what is stored, held against the expected tensors

`inspect_checkpoint` takes a folder (Fathom's, transformers' or DeepSeek's own), a Hub id, of which only the headers are
fetched, or the name of a preset, which has no files.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError, StrictDataclassError

from ..modeling import modeling_fathom
from ..modeling.cache_size import cache_numbers, multi_head_cache_numbers, released_cache_bytes_per_token
from ..modeling.configuration_fathom import FathomConfig
from ..modeling.modeling_fathom import FathomForCausalLM, FathomPreTrainedModel
from ..modeling.presets import GENERATIONS, OFFICIAL, UNSAID
from .checkpoints import (
    CONFIG,
    MODEL_TYPE,
    WEIGHTS_INDEX,
    hub_errors,
    is_hub_id,
    read_config,
    read_header,
    weight_files,
)
from .errors import UserError, did_you_mean
from .tensor_layout import StoredTensor, compare, expected_shapes, is_packed, pattern_of

ADAMW_BYTES = 16  # fp32 weight, gradient and two moments
_FORMATS = {
    "F64": "fp64",
    "F32": "fp32",
    "F16": "fp16",
    "BF16": "bf16",
    "F8_E4M3": "FP8 e4m3",
    "F8_E5M2": "FP8 e5m2",
    "F8_E8M0": "ue8m0",
    "F4": "FP4 e2m1",
    "I64": "int64",
}
_ITEMSIZE = {"float64": 8, "float32": 4}  # of the cache; all other dtypes compute in two bytes


class LayerRun(NamedTuple):
    """Neighbouring layers of one kind, or of two kinds in turn."""

    first: int
    last: int
    token_mixers: tuple[str, ...]
    channel_mixer: str

    def __str__(self) -> str:
        layers = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        turn = " in turn" if len(self.token_mixers) > 1 else ""
        return f"{layers} {'/'.join(self.token_mixers)}{turn} + {self.channel_mixer}"


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in the number of their layer and expert."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    bytes: int


@dataclass(frozen=True)
class StorageFormat:
    """Weights that are stored in one number format."""

    format: str
    tensors: int
    numbers: int
    bytes: int
    scales: str  # "" where there are none
    scale_bytes: int


@dataclass
class Cache:
    """Bytes that the past of one sequence takes in the cache of all layers."""

    dtype: str
    bytes_per_token: float
    released_bytes_per_token: float  # in the number formats of DeepSeek's releases
    multi_head_bytes_per_token: int  # of plain multi-head attention of the same heads
    context: int
    bytes_at_context: float
    multi_head_bytes_at_context: int


@dataclass
class Memory:
    """Bytes of the weights, and of training without activations."""

    stored: int | None  # None where nothing is stored
    bf16: int
    fp32: int
    adamw: int


@dataclass
class Inspection:
    """Everything that `fathom inspect` prints."""

    source: str
    generation: str
    model_type: str
    dtype: str
    layers: list[str]
    mtp_layers: list[str]
    shape: dict[str, int]
    experts: dict[str, int]
    parameters: dict[str, int]
    cache: Cache
    memory: Memory
    formats: list[StorageFormat]
    tensors: list[TensorGroup]
    files: int
    problems: list[str]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


class _Contents(NamedTuple):
    """What lies on disk or on the Hub."""

    config: dict[str, Any]
    tensors: list[StoredTensor]
    files: int
    problems: list[str]


def inspect_checkpoint(source: str, context: int | None = None) -> Inspection:
    """Describes a checkpoint or a preset.

    Args:
        source: folder, preset (`v3-671b`, `v3` for its nano size, `v3-small`) or Hub id, in this order.
        context: tokens for which the cache is counted; the model's longest context by default.

    Raises:
        UserError: there is no such thing, it is no DeepSeek model, or its config describes no model. What is wrong with
            the weights is no error: it stands in `problems`.
    """
    if context is not None and context < 1:
        raise UserError(f"--context {context} must be at least 1 token")
    preset = None if Path(source).expanduser().exists() else _preset(source)
    if preset is not None:
        model = _on_meta(FathomForCausalLM, preset)
        tensors = [
            StoredTensor(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in expected_shapes(model).items()
        ]
        return _describe(source, model, "preset", "bfloat16", context, _Contents({}, tensors, 0, []))

    contents = _from_hub(source) if is_hub_id(source) else _from_folder(Path(source).expanduser())
    config, name = _read(contents.config, source), str((contents.config.get("architectures") or [""])[0])
    # A classifier or a bare model of ours; every other class is a language model of the same generation.
    kind = getattr(modeling_fathom, name) if name in modeling_fathom.__all__ else FathomForCausalLM
    dtype = str(contents.config.get("dtype") or contents.config.get("torch_dtype") or _common_dtype(contents.tensors))
    return _describe(source, _on_meta(kind, config), str(contents.config["model_type"]), dtype, context, contents)


def layer_runs(config: FathomConfig, layers: Iterable[int]) -> list[LayerRun]:
    """Neighbouring layers of the same kind taken together; two token mixers in turn for four layers or more as one."""
    kinds = [(i, config.token_mixer(i), config.channel_mixer(i)) for i in layers]
    runs = []
    while kinds:
        first, token_mixer, channel_mixer = kinds[0]
        same = _length(kinds, [token_mixer])
        turn = [token_mixer, kinds[1][1]] if same == 1 and len(kinds) > 1 else [token_mixer]
        length = _length(kinds, turn)
        if length < 4:
            turn, length = [token_mixer], same
        runs.append(LayerRun(first, kinds[length - 1][0], tuple(turn), channel_mixer))
        kinds = kinds[length:]
    return runs


def _length(kinds: list[tuple[int, str, str]], turn: list[str]) -> int:
    """For how many layers from the first on the token mixers follow `turn` and the channel mixer stays."""
    for n, (_, token_mixer, channel_mixer) in enumerate(kinds):
        if token_mixer != turn[n % len(turn)] or channel_mixer != kinds[0][2]:
            return n
    return len(kinds)


def _preset(name: str) -> FathomConfig | None:
    """The preset of that name, or None where it is not named like one."""
    if name in OFFICIAL or name in GENERATIONS:
        return FathomConfig.preset(name)
    generation, _, size = name.rpartition("-")
    if generation in GENERATIONS and "/" not in size:
        try:
            return FathomConfig.preset(generation, size)
        except ValueError as error:
            raise UserError(str(error)) from error
    if re.fullmatch(r"[\w.-]+", name) and (nearest := did_you_mean(name, [*OFFICIAL, *GENERATIONS])):
        raise UserError(f"there is no folder {name} and no preset of that name{nearest}")
    return None


def _from_folder(folder: Path) -> _Contents:
    config = read_config(folder)
    try:
        files = weight_files(folder)
    except UserError as error:
        return _Contents(config, [], 0, [str(error)])
    tensors, problems = [], []
    for file, listed in sorted(files.items()):
        if not file.is_file():
            problems.append(f"{file.name} is missing, with {len(listed):,} tensors of {WEIGHTS_INDEX}")
            continue
        try:
            header = read_header(file)
        except UserError as error:
            problems.append(str(error))
            continue
        if absent := sorted(listed - header.keys()):
            problems.append(f"{file.name} lacks {len(absent):,} of its tensors in {WEIGHTS_INDEX}, first {absent[0]}")
        tensors += [StoredTensor.from_header(name, entry) for name, entry in header.items()]
    return _Contents(config, tensors, len(files), problems)


def _from_hub(repo_id: str) -> _Contents:
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors(repo_id):
        try:
            config = read_config(Path(hf_hub_download(repo_id, CONFIG)).parent)
            files = HfApi().get_safetensors_metadata(repo_id).files_metadata
        except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
            raise UserError(f"the weights of {repo_id} cannot be read: {str(error).splitlines()[0]}") from error
    tensors = [
        StoredTensor(name, info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for file in files.values()
        for name, info in file.tensors.items()
    ]
    return _Contents(config, tensors, len(files), [])


def _read(config: dict[str, Any], source: str) -> FathomConfig:
    model_type = config.get("model_type")
    if model_type not in (MODEL_TYPE, *UNSAID):
        known = ", ".join((MODEL_TYPE, *UNSAID))
        raise UserError(f"{source} is a checkpoint of model_type {model_type!r}; Fathom knows {known}")
    try:
        return FathomConfig.from_dict(config)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{CONFIG} of {source} describes no model that can be built: {reason}") from error


def _on_meta(kind: type[FathomPreTrainedModel], config: FathomConfig) -> FathomPreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def _common_dtype(tensors: list[StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return {"F32": "float32", "F64": "float64", "F16": "float16"}.get(
        max(sizes, key=sizes.__getitem__, default=""), "bfloat16"
    )


def _describe(
    source: str,
    model: FathomPreTrainedModel,
    model_type: str,
    dtype: str,
    context: int | None,
    contents: _Contents,
) -> Inspection:
    config = model.config
    main, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    layout = compare(contents.tensors, model) if contents.tensors else None
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    routed = config.uses("moe") or config.uses("hash")
    return Inspection(
        source=source,
        generation=config.generation,
        model_type=model_type,
        dtype=dtype,
        layers=[str(run) for run in layer_runs(config, range(main))],
        mtp_layers=[str(run) for run in layer_runs(config, range(main, main + mtp))],
        shape={
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "hc_mult": config.hc_mult,
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_position_embeddings,
        },
        experts={
            name: getattr(config, name) for name in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
        }
        if routed
        else {},
        parameters=_parameters(model),
        cache=_cache(config, dtype, context or config.max_position_embeddings),
        memory=Memory(
            stored=sum(tensor.nbytes for tensor in contents.tensors) if contents.files else None,
            bf16=2 * numbers,
            fp32=4 * numbers,
            adamw=ADAMW_BYTES * trained + 4 * (numbers - trained),
        ),
        formats=_formats(layout.weights, layout.scales) if layout and contents.files else [],
        tensors=_groups(contents.tensors),
        files=contents.files,
        problems=contents.problems + (layout.problems if layout else []),
    )


def _parameters(model: FathomPreTrainedModel) -> dict[str, int]:
    """The model's counts, and the active parameters as DeepSeek prints them from V2 on: without the input embedding."""
    counts = model.parameter_counts()
    lookup = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return {**counts, "active_without_input_embedding": counts["active"] - lookup}


def _cache(config: FathomConfig, dtype: str, context: int) -> Cache:
    itemsize = _ITEMSIZE.get(dtype.removeprefix("torch."), 2)
    size, plain = cache_numbers(config), multi_head_cache_numbers(config)
    return Cache(
        dtype=dtype,
        bytes_per_token=float(size.per_token * itemsize),
        released_bytes_per_token=released_cache_bytes_per_token(config),
        multi_head_bytes_per_token=plain * itemsize,
        context=context,
        bytes_at_context=float((size.per_token * context + size.window) * itemsize),
        multi_head_bytes_at_context=plain * itemsize * context,
    )


def _formats(weights: list[StoredTensor], scales: dict[str, StoredTensor]) -> list[StorageFormat]:
    kinds: dict[tuple[str, str], list[StoredTensor]] = {}
    for tensor in weights:
        scale = scales.get(tensor.name)
        name = "FP4 e2m1, two in a byte" if scale and is_packed(tensor) else _FORMATS.get(tensor.dtype, tensor.dtype)
        kinds.setdefault((name, _blocks(tensor, scale) if scale else ""), []).append(tensor)
    formats = [
        StorageFormat(
            format=name,
            tensors=len(tensors),
            numbers=sum(math.prod(tensor.shape) for tensor in tensors),
            bytes=sum(tensor.nbytes for tensor in tensors),
            scales=blocks,
            scale_bytes=sum(scales[tensor.name].nbytes for tensor in tensors if tensor.name in scales),
        )
        for (name, blocks), tensors in kinds.items()
    ]
    return sorted(formats, key=lambda each: -each.bytes)


def _blocks(weight: StoredTensor, scale: StoredTensor) -> str:
    """How many numbers share a scale, e.g. `one fp32 per 128 x 128`; sides are powers of two, the last may be short."""
    sides = [
        1 << math.ceil(math.log2(size / blocks))
        for size, blocks in zip(weight.shape, scale.shape, strict=False)
        if size and blocks
    ]
    return f"one {_FORMATS.get(scale.dtype, scale.dtype)} per {' x '.join(map(str, sides))}"


def _groups(tensors: list[StoredTensor]) -> list[TensorGroup]:
    """Tensors grouped by what only differs in a number, in the order of their first appearance by layer."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in sorted(tensors, key=lambda each: [int(n) for n in re.findall(r"\d+", each.name)][:1]):
        count = groups.setdefault((pattern_of(tensor.name), tensor.shape, tensor.dtype), [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    return [TensorGroup(*key, *count) for key, count in groups.items()]

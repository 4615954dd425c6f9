"""What a checkpoint is, from its config, its index and the headers of its weight files.

    config.json            generation, kinds of layers, cache bytes
      -> meta device       parameters, expected tensors; a model without memory
    safetensors headers    names, shapes, dtypes and bytes of what is stored, held against the expected tensors
    values                 of weights up to 4 GB: whether they are finite

What is wrong with a folder is found by `checkpoint_check`, as by whatever loads it: a folder without problems loads.
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
from typing import NamedTuple

from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

from ..modeling.cache_size import cache_numbers, multi_head_cache_numbers, released_cache_bytes_per_token
from ..modeling.configuration_fathom import FathomConfig
from ..modeling.modeling_fathom import FathomForCausalLM, FathomPreTrainedModel
from ..modeling.presets import GENERATIONS, OFFICIAL
from ..modeling.quantized_weights import block_size
from .chat_templates import render_chat
from .checkpoint_check import (
    Checked,
    Contents,
    check_model,
    check_values,
    folder_contents,
    generation_problems,
    on_meta,
    read_model_config,
    stored_values,
)
from .checkpoint_files import CONFIG, MODEL_TYPE, read_config
from .errors import UserError, did_you_mean, reason
from .hub import hub_errors, is_hub_id
from .loading import load_tokenizer
from .tensor_layout import StoredTensor, expected_shapes, is_packed, pattern_of

VALUES_READ = 4_000_000_000  # bytes of weights of which every number is looked at; they are read in seconds
PRESET = "preset"  # in place of a model_type
GREETING = [{"role": "user", "content": "Hello"}]
NO_TOKENIZER = "none beside the weights: chat and generate need one"
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
    tokenizer: str = ""  # "" where there is no folder
    values_read: bool = False  # whether every number was looked at

    is_language_model: bool = True

    @property
    def chats(self) -> bool:
        """Whether `fathom chat` loads it."""
        whole = bool(self.files) and not self.problems
        return whole and self.model_type == MODEL_TYPE and self.is_language_model and self.tokenizer != NO_TOKENIZER

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


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
    try:
        preset = None if Path(source).expanduser().exists() else _preset(source)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{source!r} is no path of a folder: {reason(error)}") from error
    if preset is not None:
        model = on_meta(FathomForCausalLM, preset, source)
        tensors = [
            StoredTensor(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in expected_shapes(model).items()
        ]
        return _describe(source, Checked(model, None, []), PRESET, context, Contents({}, tensors, [], []))

    tokenizer, problems = "", list[str]()
    if on_hub := is_hub_id(source):
        contents = _from_hub(source)
    else:
        contents, tokenizer, problems = _from_folder(Path(source).expanduser())
    checked = check_model(contents, source)
    problems = [*checked.problems, *problems]
    values_read = False
    if not on_hub and not problems and contents.files:
        values_read, problems = _values(contents, checked.model)
    found = _describe(source, checked, str(contents.config["model_type"]), context, contents)
    found.problems, found.tokenizer, found.values_read = problems, tokenizer, values_read
    return found


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


def _from_folder(folder: Path) -> tuple[Contents, str, list[str]]:
    """What lies in a folder, what its tokenizer is, and what is wrong beyond names and shapes of the weights."""
    contents = folder_contents(folder)
    config = read_model_config(contents.config, str(folder))
    problems = generation_problems(folder, config)
    if not (folder / "tokenizer.json").is_file():
        return contents, NO_TOKENIZER, problems
    try:
        tokenizer = load_tokenizer(str(folder))
        if tokenizer.chat_template is not None:
            render_chat(tokenizer, GREETING, add_generation_prompt=True)
    except UserError as error:
        return contents, "", [*problems, str(error)]
    chat = "chat template" if tokenizer.chat_template is not None else "no chat template: it continues text"
    return contents, f"{len(tokenizer):,} tokens, {chat}", problems


def _from_hub(repo_id: str) -> Contents:
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
    return Contents(config, tensors, list(files), [])


def _values(contents: Contents, model: FathomPreTrainedModel) -> tuple[bool, list[str]]:
    """Whether every number was looked at, and what is wrong with them."""
    if sum(tensor.nbytes for tensor in contents.tensors) > VALUES_READ:
        return False, []
    try:
        check_values(stored_values(contents.files, model), model.config.n_routed_experts)
    except Exception as error:  # of a library, about files that passed all checks
        return True, [reason(error)]
    return True, []


def _common_dtype(tensors: list[StoredTensor]) -> str:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return {"F32": "float32", "F64": "float64", "F16": "float16"}.get(
        max(sizes, key=sizes.__getitem__, default=""), "bfloat16"
    )


def _describe(source: str, checked: Checked, model_type: str, context: int | None, contents: Contents) -> Inspection:
    model, layout, problems = checked
    config = model.config
    stored = contents.config.get("dtype") or contents.config.get("torch_dtype")
    dtype = "bfloat16" if model_type == PRESET else str(stored or _common_dtype(contents.tensors))
    main, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
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
        files=len(contents.files),
        problems=problems,
        is_language_model=isinstance(model, FathomForCausalLM),
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
        block_size(size, blocks) for size, blocks in zip(weight.shape, scale.shape, strict=False) if 0 < blocks <= size
    ]
    return f"one {_FORMATS.get(scale.dtype, scale.dtype)} per {' x '.join(map(str, sides))}"


def _groups(tensors: list[StoredTensor]) -> list[TensorGroup]:
    """Tensors grouped by what only differs in a number, in the order of their first appearance by layer."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for tensor in sorted(tensors, key=lambda each: [int(n) for n in re.findall(r"\d{1,9}", each.name)][:1]):
        count = groups.setdefault((pattern_of(tensor.name), tensor.shape, tensor.dtype), [0, 0])
        count[0] += 1
        count[1] += tensor.nbytes
    return [TensorGroup(*key, *count) for key, count in groups.items()]

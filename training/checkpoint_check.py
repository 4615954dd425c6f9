"""Whether a folder holds a model that can be loaded: one answer for `fathom inspect` and for whatever loads.

    config.json            numbers within their ranges      -> FathomConfig -> the model on the meta device
    weight headers         names, shapes and dtypes         == those of the model
    generation_config.json control tokens                   within the vocabulary
    values                 finite; expert numbers of hash layers are those of experts

Nothing is built from a config before its numbers are known to be sane, and no tensor is read but by `check_values`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..modeling import modeling_fathom
from ..modeling.configuration_fathom import FathomConfig
from ..modeling.conversion import saved_layers
from ..modeling.modeling_fathom import FathomForCausalLM, FathomPreTrainedModel
from ..modeling.presets import UNSAID
from ..modeling.quantized_weights import open_tensors
from .checkpoint_files import (
    ADAPTER,
    CONFIG,
    MODEL_TYPE,
    WEIGHTS_INDEX,
    read_config,
    read_header,
    read_json,
    weight_files,
)
from .errors import UserError, reason
from .tensor_layout import Layout, StoredTensor, compare

GENERATION_CONFIG = "generation_config.json"
PIECE = 2**24  # numbers that are looked at together
LARGEST_WEIGHT = 1e6  # far above any trained one; a flipped bit of an exponent makes 1e30 of it, and NaN of the logits
# Keys of a config.json by which transformers would read other files, or other number formats, than those checked here.
LEADS_AWAY = ("transformers_weights", "configuration_files", "quantization_config")


class Contents(NamedTuple):
    """What lies on disk or on the Hub."""

    config: dict[str, Any]
    tensors: list[StoredTensor]
    files: list[str]  # paths on this machine, or names on the Hub
    problems: list[str]


class Checked(NamedTuple):
    """A model on the meta device, and what is wrong with the files that it would be loaded from."""

    model: FathomPreTrainedModel
    layout: Layout | None
    problems: list[str]


def folder_contents(folder: Path) -> Contents:
    """Reads the config and the headers of a folder.

    Raises:
        UserError: there is no config that can be read. What is wrong with the weights is no error, but a problem.
    """
    config = read_config(folder)
    try:
        files = weight_files(folder)
    except UserError as error:
        return Contents(config, [], [], [str(error)])
    tensors: list[StoredTensor] = []
    problems = []
    if (folder / ADAPTER).is_file():
        problems.append(f"{ADAPTER} lies beside the model: merge the adapter (PEFT's merge_and_unload), or remove it")
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
        if listed and (beyond := sorted(header.keys() - listed)):
            problems.append(f"{file.name} has {len(beyond):,} tensors that {WEIGHTS_INDEX} lacks, first {beyond[0]}")
        tensors += [StoredTensor.from_header(name, entry) for name, entry in header.items()]
    return Contents(config, tensors, list(map(str, files)), problems)


def read_model_config(content: dict[str, Any], source: str, changes: dict[str, Any] | None = None) -> FathomConfig:
    """The config of a Fathom or DeepSeek model, with some fields changed.

    Raises:
        UserError: it is of another model, or describes none that can be built.
    """
    model_type = content.get("model_type")
    if model_type not in (MODEL_TYPE, *UNSAID):
        known = ", ".join((MODEL_TYPE, *UNSAID))
        raise UserError(f"{source} is a checkpoint of model_type {model_type!r}; Fathom knows {known}")
    try:
        config = FathomConfig.from_dict(content, name_or_path=source, **(changes or {}))
        for name in LEADS_AWAY:
            if getattr(config, name, None) is not None:
                raise ValueError(f"{name} is set, which Fathom does not follow; remove it")
        _check_rotary(config)
    except Exception as error:  # of a field that no check has foreseen, whatever it is
        raise UserError(f"{source}/{CONFIG} describes no model that can be built: {reason(error)}") from error
    return config


def check_model(
    contents: Contents,
    source: str,
    kind: type[FathomPreTrainedModel] | None = None,
    changes: dict[str, Any] | None = None,
    may_lack: str | None = None,
) -> Checked:
    """Builds the model on the meta device and holds the stored tensors against it.

    Args:
        contents: of the checkpoint.
        source: its name, for messages.
        kind: class to load; by default the one that the config names, or else the language model.
        changes: fields of the config to change.
        may_lack: pattern of tensors that need not be stored.

    Raises:
        UserError: the config describes no model.
    """
    config = read_model_config(contents.config, source, changes)
    if kind is None:
        name = next(iter(config.architectures or []), "")
        kind = getattr(modeling_fathom, name) if name in modeling_fathom.__all__ else FathomForCausalLM
    names = [tensor.name for tensor in contents.tensors]
    if not contents.problems:
        _check_depth(config, names, source)
    if names and config.num_nextn_predict_layers and saved_layers(names) is None:
        config.drop_mtp_layers()  # as loading does
    model = on_meta(kind, config, source)
    layout = compare(contents.tensors, model, may_lack) if contents.tensors else None
    return Checked(model, layout, contents.problems + (layout.problems if layout else []))


def whole_model(
    folder: Path,
    kind: type[FathomPreTrainedModel] = FathomForCausalLM,
    model_types: Sequence[str] = (MODEL_TYPE, *UNSAID),
    changes: dict[str, Any] | None = None,
    may_lack: str | None = None,
    read_values: bool = False,
) -> FathomPreTrainedModel:
    """The model in a folder, on the meta device, if it can be loaded.

    Args:
        folder: of a checkpoint.
        kind: class to load.
        model_types: what its config.json may say to be.
        changes: fields of the config to change.
        may_lack: pattern of tensors that need not be stored.
        read_values: look at every number, too.

    Raises:
        UserError: the first thing that is wrong with it.
    """
    contents = folder_contents(folder)
    if (model_type := contents.config.get("model_type")) not in model_types:
        known = ", ".join(map(repr, model_types))
        raise UserError(f"{folder} is a checkpoint of model_type {model_type!r}; Fathom loads {known}")
    checked = check_model(contents, str(folder), kind, changes, may_lack)
    if contents.problems:
        raise UserError(f"{folder} is not whole: {contents.problems[0]}")
    if checked.problems:
        raise UserError(f"the weights in {folder} do not fit its {CONFIG}: {checked.problems[0]}")
    if problems := generation_problems(folder, checked.model.config):
        raise UserError(problems[0])
    if read_values:
        try:
            check_values(stored_values(contents.files, checked.model), checked.model.config.n_routed_experts)
        except ValueError as error:
            raise UserError(damaged(folder, error)) from error
    return checked.model


def damaged(folder: Path, error: ValueError) -> str:
    """The message about a weight that `check_values` refuses."""
    return f"the weights in {folder} are damaged: {error}; save or download the model again"


def on_meta(kind: type[FathomPreTrainedModel], config: FathomConfig, source: str) -> FathomPreTrainedModel:
    """A model without memory.

    Raises:
        UserError: its config describes no model.
    """
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:
        raise UserError(f"{source}/{CONFIG} describes no model that can be built: {reason(error)}") from error


def generation_problems(folder: Path, config: FathomConfig) -> list[str]:
    """What is wrong with the generation_config.json of a folder, if it has one."""
    if not (folder / GENERATION_CONFIG).is_file():
        return []
    try:
        stored = GenerationConfig.from_dict(read_json(folder / GENERATION_CONFIG))
        stored.validate()
    except UserError as error:
        return [str(error)]
    except Exception as error:
        return [f"{folder / GENERATION_CONFIG} cannot be used: {reason(error)}; mend or remove it"]
    problems = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(stored, name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and 0 <= token < config.vocab_size):
                problems.append(
                    f"{folder / GENERATION_CONFIG} has {name}={value!r}; ids are whole numbers from 0 to "
                    f"{config.vocab_size - 1}, vocab_size less one"
                )
                break
    return problems


def check_values(tensors: Iterable[tuple[str, torch.Tensor]], experts: int) -> None:
    """Looks at every number.

    Args:
        tensors: with their names.
        experts: number of routed experts, which tables of whole numbers choose from.

    Raises:
        ValueError: a weight is not finite or absurdly large, or a table names an expert that does not exist.
    """
    for name, tensor in tensors:
        for piece in tensor.detach().flatten().split(PIECE):
            if not piece.numel():
                continue
            least, most = (end.item() for end in piece.aminmax())  # both NaN where one number is
            furthest = least if -least > most else most
            if not tensor.is_floating_point():
                if not 0 <= least <= most < experts:
                    raise ValueError(f"{name} names expert {furthest}; there are {experts}, numbered from 0")
            elif not math.isfinite(furthest):
                raise ValueError(f"{name} holds numbers that are not finite (NaN or infinite)")
            elif abs(furthest) > LARGEST_WEIGHT:
                raise ValueError(f"{name} holds {furthest:g}, and no weight is above {LARGEST_WEIGHT:g} in size")


def stored_values(files: list[str], model: FathomPreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of weight files as they would be in memory, read one by one."""
    dtype = model.config.dtype or torch.float32
    for name, stored in open_tensors(files).items():
        tensor = stored[...]
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def loaded_values(model: FathomPreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters, routing biases and tables of a model in memory."""
    yield from model.state_dict().items()


def _check_depth(config: FathomConfig, names: list[str], source: str) -> None:
    """Refuses a config of very many more layers than are stored, each of which would take its time to build.

    Raises:
        UserError: by the numbers alone.
    """
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    stored = {match[0] for match in (re.search(r"(?:layers|mtp)\.\d+\.", name) for name in names) if match is not None}
    if layers > 4 * len(stored) + 16:
        raise UserError(
            f"{source}/{CONFIG} says num_hidden_layers={config.num_hidden_layers} and num_nextn_predict_layers="
            f"{config.num_nextn_predict_layers}, and the weights hold {len(stored)} layers: mend these two fields"
        )


def _check_rotary(config: FathomConfig) -> None:
    """Computes the rotary frequencies as the model will."""
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if config.position_embedding_type != "rope" or kind == "default":
        return
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device="cpu")
    if not (bool(frequencies.isfinite().all()) and math.isfinite(scale)):
        raise ValueError(f"rope_type={kind!r} gives no finite frequencies with the rope_parameters {rope}")

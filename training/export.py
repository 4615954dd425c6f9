"""Checkpoints out of Fathom: written for code that knows nothing of it, tensor by tensor.

    transformers    what the class of the same generation in transformers loads without remote code, and with it what
                    is built on such folders (vLLM, SGLang, llama.cpp's converter)
    deepseek        a folder as DeepSeek releases it: its config.json, and with every MTP layer before V4 the copies of
                    embedding and head that its releases have

Tensors have the same names in both (see `modeling.conversion`), and those of a checkpoint of ours: what is exported
is copied from file to file, one file in memory at a time. The source may be any folder that Fathom loads, so that
DeepSeek's FP8 and FP4 weights are dequantised on the way.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion

from ..modeling.configuration_fathom import FathomConfig
from ..modeling.conversion import name_in_memory, name_on_disk
from ..modeling.modeling_fathom import FathomForCausalLM
from ..modeling.quantized_weights import QuantizedSlice, open_tensors
from .checkpoint_check import GENERATION_CONFIG, check_values, damaged, whole_model
from .checkpoint_files import CONFIG, WEIGHTS, WEIGHTS_INDEX, read_json, weight_files
from .checkpoints import staged_directory
from .errors import UserError, did_you_mean, reason
from .native_config import DIALECTS, native_config

# What lies beside the weights and is the same for everyone.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_CONFIG,
)
# Tensors that a folder may have beyond the model's: copies in MTP layers, and buffers that old code saved.
_BEYOND = re.compile(r"layers\.\d+\.(embed_tokens|shared_head\.head)\.|rotary_emb\.inv_freq$")


@dataclass
class Exported:
    """What was written."""

    model_type: str
    tensors: int
    bytes: int
    files: int
    mtp_layers: int


def export_checkpoint(source: Path, target: Path, to: str, max_shard_size: str = "5GB") -> Exported:
    """Writes the checkpoint in `source` to `target`, whole or not at all.

    Args:
        source: a folder that Fathom loads: ours, transformers' or DeepSeek's.
        target: made if it does not exist; other files in it stay.
        to: `transformers` or `deepseek`.
        max_shard_size: size of the weight files, as in `save_pretrained`. One of them is in memory at a time.

    Raises:
        UserError: the source is not whole, or the other code has no such model.
    """
    source, target = Path(source), Path(target)
    if to not in DIALECTS:
        raise UserError(f"cannot export to {to!r}{did_you_mean(to, DIALECTS)}; known: {', '.join(DIALECTS)}")
    config = whole_model(source).config
    if target.absolute() == source.absolute():
        raise UserError(f"{target} is the checkpoint itself; choose another folder to export to")
    try:
        tensors = open_tensors(map(str, weight_files(source)))
    except Exception as error:  # of safetensors, about files that passed all checks
        raise UserError(f"{source} cannot be read: {reason(error)}") from error
    tensors = {name_in_memory(name, config): tensor for name, tensor in tensors.items()}
    content = native_config(config, to)
    tensors = _in_order(source, config, tensors)
    if to == "deepseek" and not config.compresses:
        last = config.num_hidden_layers + config.num_nextn_predict_layers
        for layer in range(config.num_hidden_layers, last):
            tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
            head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
            tensors[f"model.layers.{layer}.shared_head.head.weight"] = head

    with staged_directory(target) as staging:
        files = _write_weights(staging, tensors, config, max_shard_size, source)
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, staging / name)
        _drop_lengths(staging / GENERATION_CONFIG)
        (staging / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    written = [target / name for name in files]
    return Exported(
        content["model_type"],
        len(tensors),
        sum(file.stat().st_size for file in written),
        len(written),
        config.num_nextn_predict_layers,
    )


def _in_order(source: Path, config: FathomConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors by their names on disk, exactly those of the model that `config` describes, in its order."""
    with torch.device("meta"):
        model = FathomForCausalLM(config)
    expected = revert_weight_conversion(model, model.state_dict())
    if config.tie_word_embeddings:
        del expected[name_on_disk("lm_head.weight", config)]
        tensors.pop("lm_head.weight", None)
    found = {name_on_disk(name, config): value for name, value in tensors.items() if not _BEYOND.search(name)}
    for what, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            raise UserError(
                f"{source} does not fit its {CONFIG}: it {what} {len(names)} tensors, first {min(names)}; "
                f"load it with FathomForCausalLM.from_pretrained, and save it again, to see more"
            )
    return {name: found[name] for name in expected}


def _dtype(config: FathomConfig) -> torch.dtype:
    """Of what is dequantised; everything else keeps the dtype that it has."""
    dtype = config.dtype or torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _drop_lengths(file: Path) -> None:
    """Takes the length of texts out of a generation_config.json: vLLM would take it as a limit for a whole server."""
    if file.is_file():
        content = read_json(file)
        kept = {name: value for name, value in content.items() if name not in ("max_new_tokens", "max_length")}
        if kept != content:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_weights(
    folder: Path, tensors: dict[str, Any], config: FathomConfig, max_shard_size: str, source: Path
) -> list[str]:
    """Writes the weight files and their index, and returns the names of the files.

    Raises:
        UserError: `max_shard_size` is no size, or the weights are damaged.
    """
    dtype = _dtype(config)

    def stored_as(tensor) -> torch.dtype:
        return dtype if isinstance(tensor, QuantizedSlice) else tensor[:0].dtype

    plan = {
        name: torch.empty(tensor.get_shape(), dtype=stored_as(tensor), device="meta")
        for name, tensor in tensors.items()
    }
    try:
        split = split_torch_state_dict_into_shards(plan, filename_pattern=_PATTERN, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"max_shard_size={max_shard_size!r} is no size such as 5GB or 200MB: {error}") from error
    for file, names in split.filename_to_tensors.items():
        # Copies, because the copies of embedding and head may not share memory with these.
        shard = {name: tensors[name][...].to(plan[name].dtype, copy=True) for name in names}
        try:
            check_values(shard.items(), config.n_routed_experts)
        except ValueError as error:
            raise UserError(damaged(source, error)) from error
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(split.filename_to_tensors)


_PATTERN = WEIGHTS.replace(".", "{suffix}.")

"""What lies in the folder of a model: config.json, the index and the headers of the weight files. No tensor is read.

`check_checkpoint` makes a truncated download, a missing shard or another architecture one clear line. A safetensors
file is

    8 bytes: header length n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | the tensors

(https://huggingface.co/docs/safetensors#format), where tensors follow each other without gaps, so that its size must
be 8 + n + the largest end offset. Whether the tensors are those of the config is asked in `checkpoint_check`.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean, reason

MODEL_TYPE = "fathom"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

MOST_JSON_BYTES = 200_000_000  # the index of a model with a million tensors has some hundred MB
MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Bits of one number, by safetensors' names.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
}

_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d{1,15})")
_AGAIN = "save or download the model again"


def check_checkpoint(folder: Path, model_types: Sequence[str] = (MODEL_TYPE,)) -> dict[str, Any]:
    """Checks that `folder` holds all files of a Fathom model, reading no more than the headers of its weights.

    Args:
        folder: folder of `config.json` and `model.safetensors`, or shards with their index.
        model_types: what its config.json may say to be.

    Returns:
        The content of `config.json`.

    Raises:
        UserError: the folder or a file of it is missing, truncated, damaged or of another architecture.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("model_type") not in model_types:
        known = ", ".join(map(repr, model_types))
        raise UserError(f"{folder} is a checkpoint of model_type {config.get('model_type')!r}; Fathom loads {known}")
    files = weight_files(folder)
    absent = sorted(file.name for file in files if not file.is_file())
    if absent:
        raise UserError(f"{folder} lacks {len(absent)} of {len(files)} weight files: {', '.join(absent)}")
    for file, names in files.items():
        missing = sorted(names - read_header(file).keys())
        if missing:
            raise UserError(
                f"{file} lacks {len(missing)} of the tensors that {WEIGHTS_INDEX} lists, first {missing[0]}: {_AGAIN}"
            )
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`, of whatever model.

    Raises:
        UserError: the folder or the file is missing, or is no JSON.
    """
    try:
        if not folder.is_dir():
            raise UserError(missing_folder(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no path of a folder: {reason(error)}") from error
    if not (folder / CONFIG).is_file():
        newest = newest_checkpoint(folder)
        if (folder / ADAPTER).is_file():
            raise UserError(
                f"{folder} holds an adapter and no model: merge it into its model (PEFT's merge_and_unload)"
            )
        raise UserError(f"{folder} has no {CONFIG}: {f'did you mean {newest}?' if newest else 'it holds no model'}")
    return read_json(folder / CONFIG)


def missing_folder(path: Path) -> str:
    """The message that there is no such folder, with the nearest names beside it."""
    parent = path.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return f"there is no folder {path}{did_you_mean(path.name, siblings)}"


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The `checkpoint-N` of a run with the largest N that has a config.json."""
    return next((folder for folder in checkpoint_folders(run_dir) if (folder / CONFIG).is_file()), None)


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, largest N first, whatever they hold."""
    numbered = [
        (int(match[1]), folder)
        for folder in (Path(run_dir).iterdir() if Path(run_dir).is_dir() else ())
        if folder.is_dir() and (match := _CHECKPOINT_FOLDER.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, is larger than any that is written, or holds something else.
    """
    try:
        if (size := file.stat().st_size) > MOST_JSON_BYTES:
            raise UserError(f"{file} has {size:,} bytes, more than the {MOST_JSON_BYTES:,} that are read: {_AGAIN}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # a UnicodeDecodeError or a JSONDecodeError
        raise UserError(f"{file} is no valid JSON ({error}): {_AGAIN}") from error
    except RecursionError as error:
        raise UserError(f"{file} nests too many objects or lists in each other: {_AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object, not a {type(content).__name__}")
    return content


def weight_files(folder: Path) -> dict[Path, set[str]]:
    """The weight files that a folder must have, in transformers' order of preference, each with its tensors' names.

    One file alone lists its tensors itself: its set is empty. Files of an index may be missing on disk.

    Raises:
        UserError: there is neither a weight file nor an index, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: set()}
    if not (folder / WEIGHTS_INDEX).is_file():
        raise UserError(f"{folder} has neither {WEIGHTS} nor {WEIGHTS_INDEX}: the weights are missing")
    index = read_json(folder / WEIGHTS_INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / WEIGHTS_INDEX} has no weight_map: {_AGAIN}")
    if not isinstance(index.get("metadata"), dict):
        raise UserError(f"{folder / WEIGHTS_INDEX} has no metadata, which transformers asks for: {_AGAIN}")
    shards: dict[Path, set[str]] = {}
    for tensor, shard in weight_map.items():
        # A file of this folder: an index from anywhere must not lead to other ones.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard, re.ASCII):
            raise UserError(f"{folder / WEIGHTS_INDEX} places {tensor} in {shard!r}, which is no weight file: {_AGAIN}")
        shards.setdefault(folder / shard, set()).add(tensor)
    return shards


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: `dtype`, `shape` and `data_offsets` of every tensor, by name.

    Raises:
        UserError: the file is not as long as its header promises, or is no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
            if len(start) < 8 or size < 8 + length:
                raise UserError(f"{file} is truncated: its header needs {8 + length} bytes, it has {size}; {_AGAIN}")
            if length > MOST_HEADER_BYTES:
                raise UserError(f"{file} has a header of {length:,} bytes, more than the {MOST_HEADER_BYTES:,} allowed")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    try:
        header, end = _parsed(text)
    except (ValueError, RecursionError) as error:
        why = f" ({error})" if type(error) is ValueError else ""
        raise UserError(f"{file} is damaged: its header is no safetensors header{why}; {_AGAIN}") from error
    if size != (expected := 8 + length + end):
        state = "truncated" if size < expected else "damaged"
        raise UserError(f"{file} is {state}: {expected} bytes expected, {size} found; {_AGAIN}")
    return header


def _parsed(text: bytes) -> tuple[dict[str, dict[str, Any]], int]:
    """The header's tensors, and where the last one ends.

    Raises:
        ValueError: it breaks a rule of the format.
    """
    if not text.startswith(b"{"):
        raise ValueError("it does not begin with a brace")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("its __metadata__ is no map of text to text")
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise ValueError(f"{name} begins at byte {begin}, where the tensor before it ends at {end}")
        end = stop
    return header, end


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """First byte, last byte and name of a tensor, if its entry is whole."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} has no entry")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    for field, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"{name} has the {field} {numbers!r}, which is no list of sizes")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * DTYPE_BITS[dtype]:
        raise ValueError(f"{name} has the data_offsets {offsets}; {shape} of {dtype} takes another number of bytes")
    return offsets[0], offsets[1], name


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it names something twice")
    for key, value in pairs:
        f"{key}{value}".encode()  # raises on half a surrogate pair, which JSON can spell and UTF-8 cannot
    return content

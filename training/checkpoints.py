"""Checkpoints in and out: saved whole or not at all, checked before they are loaded.

Out. A save that fails (full disk, Ctrl-C, a crash) never costs what was there before it: the old content stays until
the new one is complete on disk.

    staged_directory(target)    the model in a run folder, beside logs and `checkpoint-N` folders that must stay:
                                files are written to a hidden sibling folder, flushed, and then renamed into place
                                one by one, weights first and config.json last. A full disk thus shows itself while
                                the target is still untouched: renaming needs no room for data.

The `checkpoint-N` folders of a run, from which training goes on, are the matter of `resumable`.

In. `check_checkpoint` reads only the headers, so that a truncated download, a missing shard or another
architecture is one clear line instead of a traceback. A safetensors file is

    8 bytes: header length n, little endian | n bytes: JSON {name: {dtype, shape, data_offsets}} | the tensors

hence its size must be 8 + n + the largest end offset (https://huggingface.co/docs/safetensors#format).
"""

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)

from .errors import UserError, did_you_mean
from .manifest import flush, follow_umask
from .secrecy import public

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MODEL_TYPE = "fathom"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TRAINER_STATE = "trainer_state.json"
RUN_FILE = "run.json"

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_WEIGHT_FILE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")
# What a folder from the Hub is loaded from; its modeling code is not, the installed one is used.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]

NO_SPACE = "disk full"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Neither library hands the errno on: safetensors (Rust) prints it, torch.save reports only that its writer failed.
_NO_SPACE_TEXT = re.compile(
    rf"\(os error ({'|'.join(map(str, _NO_SPACE))})\)|PytorchStreamWriter failed|inline_container.*unexpected pos", re.S
)
_OF_FILES = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.EIO, errno.EBUSY, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ESTALE),
}
_FAILED_WRITE_TEXT = re.compile(r"\(os error \d+\)|Parent directory .* does not exist|cannot be opened", re.S)


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Gives an empty folder to write to and, when the block succeeds, moves its files into `target`.

    Files of `target` that were not written again stay, except weights: those of the old model would shadow the
    new ones where the number of shards has changed. In a distributed run, enter it on every process and write on
    one: an empty staging folder moves nothing.

    Args:
        target: folder to save to; made if it does not exist. The staging folder is its hidden sibling, so that
            both are on one file system.

    Raises:
        UserError: the disk, the quota or the file-size limit is full; `target` is as it was.
    """
    target = Path(target).absolute()
    # A random name: processes of several machines that share the file system may have the same id.
    staging = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with failures_are_clear(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"cannot save to {target}: it is a file; choose another folder")
        try:
            staging.mkdir(parents=True)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot save to {target}: {error.strerror}; choose another folder") from error
        try:
            yield staging
            _move_into(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move_into(staging: Path, target: Path) -> None:
    """Renames every file below `staging` to the same place below `target`, config.json last, flushed to disk."""
    names = sorted(file.relative_to(staging) for file in staging.rglob("*") if file.is_file())
    if not names:
        return
    follow_umask(staging)
    for name in names:
        flush(staging / name)
    names.sort(key=lambda name: (name.name == CONFIG, not _WEIGHT_FILE.fullmatch(name.name), name))
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    written = {str(name) for name in names}
    if any(_WEIGHT_FILE.fullmatch(name) for name in written):
        for old in target.iterdir():
            if _WEIGHT_FILE.fullmatch(old.name) and old.name not in written:
                old.unlink()
    flush(target)


@contextmanager
def failures_are_clear(target: Path) -> Iterator[None]:
    """Turns what can go wrong between the block, which saves `target`, and the disk into one line.

    Raises:
        UserError: the disk, the quota or the file-size limit is full, a folder is gone or read-only, the disk fails.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _reason(error, target.parent)) is None:
            raise
        kept = _kept(target)
        if reason is not NO_SPACE:
            mend = "make the folder writable or choose another"
            raise UserError(f"cannot save {target}: {reason}; {mend}{kept}") from error
        free = shutil.disk_usage(next(folder for folder in target.parents if folder.exists())).free
        raise UserError(
            f"disk full while saving {target} ({free / 1e6:.0f} MB free): make room or choose another folder{kept}"
        ) from error


def _kept(target: Path) -> str:
    """The end of the message: what is left to go on from."""
    previous = None
    with suppress(OSError):  # a folder that may not be read, or is none any more
        previous = target if (target / CONFIG).exists() else newest_folder(target.parent)
    return f"; the previous checkpoint {previous} is intact" if previous else ""


def _reason(error: BaseException | None, below: Path) -> str | None:
    """Why the disk took no file below a folder, `NO_SPACE` where it is full; None if the error is another one."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError):
            if error.errno in _NO_SPACE:
                return NO_SPACE
            if error.errno in _OF_FILES and error.filename is None:
                return str(error.strerror)
            if error.errno in _OF_FILES and Path(os.fsdecode(error.filename)).absolute().is_relative_to(below):
                return f"{os.fsdecode(error.filename)}: {error.strerror}"
        elif _NO_SPACE_TEXT.search(text):
            return NO_SPACE
        elif _FAILED_WRITE_TEXT.search(text):
            return " ".join(text.split())
        error = error.__cause__ or error.__context__
    return None


def check_checkpoint(folder: Path, model_types: Sequence[str] = (MODEL_TYPE,)) -> dict[str, Any]:
    """Checks that `folder` holds a whole Fathom model, reading no more than the headers of its weights.

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
                f"{file} lacks {len(missing)} of the tensors that {WEIGHTS_INDEX} lists, first {missing[0]}: save or "
                "download the model again"
            )
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's `config.json`, of whatever model.

    Raises:
        UserError: the folder or the file is missing, or is no JSON.
    """
    if not folder.is_dir():
        raise UserError(_missing(folder))
    if not (folder / CONFIG).is_file():
        newest = newest_folder(folder)
        raise UserError(f"{folder} has no {CONFIG}: {f'did you mean {newest}?' if newest else 'it holds no model'}")
    return _read_json(folder / CONFIG)


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Writes run.json: what was run and measured, without secrets and absolute paths."""
    (folder / RUN_FILE).write_text(json.dumps(public(record), indent=2) + "\n", encoding="utf-8")


def read_run(folder: Path) -> dict[str, Any] | None:
    """What `folder`'s run.json says, or None where there is none."""
    file = folder / RUN_FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def find_checkpoints(root: Path) -> list[Path]:
    """Folders at or below `root` that hold a whole Fathom model, newest first; hidden folders are left out."""
    found = []
    for name, folders, files in os.walk(root):
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        if CONFIG in files and _is_whole(Path(name)):
            found.append(Path(name))
    return sorted(found, key=lambda folder: ((folder / CONFIG).stat().st_mtime, str(folder)), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        check_checkpoint(folder)
    except UserError:
        return False
    return True


def newest_folder(run_dir: Path) -> Path | None:
    """The `checkpoint-N` folder of a run with the largest N that holds a config.json, if there is one."""
    return next((folder for folder in checkpoint_folders(run_dir) if (folder / CONFIG).is_file()), None)


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, largest N first, whatever they hold."""
    numbered = [
        (int(match[1]), folder)
        for folder in (Path(run_dir).iterdir() if Path(run_dir).is_dir() else ())
        if folder.is_dir() and (match := _CHECKPOINT_FOLDER.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(numbered, reverse=True)]


def _missing(path: Path) -> str:
    parent = path.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    return f"there is no folder {path}{did_you_mean(path.name, siblings)}"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # a UnicodeDecodeError or a JSONDecodeError
        raise UserError(f"{file} is no valid JSON ({error}): save or download the model again") from error
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
    weight_map = _read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / WEIGHTS_INDEX} has no weight_map: save or download the model again")
    shards: dict[Path, set[str]] = {}
    for tensor, shard in weight_map.items():
        shards.setdefault(folder / str(shard), set()).add(tensor)
    return shards


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file: `dtype`, `shape` and `data_offsets` of every tensor, by name.

    Raises:
        UserError: the file is not as long as its header promises, or is no safetensors file.
    """
    size = file.stat().st_size
    again = "save or download the model again"
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise UserError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
        end_of_header = 8 + int.from_bytes(start, "little")
        if len(start) < 8 or size < end_of_header:
            raise UserError(f"{file} is truncated: its header needs {end_of_header} bytes, it has {size}; {again}")
        try:
            header = json.loads(stream.read(end_of_header - 8))
            header.pop("__metadata__", None)
            # All three must be there: callers rely on them.
            entries = map(itemgetter("dtype", "shape", "data_offsets"), header.values())
            ends = [end for _, _, (_, end) in entries]
            expected = end_of_header + max(ends, default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{file} is damaged: its header is no safetensors header; {again}") from error
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise UserError(f"{file} is {state}: {expected} bytes expected, {size} found; {again}")
    return header


def load_model(
    path_or_id: str,
    dtype: "str | torch.dtype" = "auto",
    model_class: "type[PreTrainedModel] | None" = None,
    changes: dict[str, Any] | None = None,
    may_begin: str | None = None,
) -> "PreTrainedModel":
    """Loads a model for use, in eval mode, from a folder or the Hub.

    Args:
        path_or_id: folder, or `owner/name` on the Hub when there is no such folder.
        dtype: of the parameters in memory; `auto` keeps that of the file.
        model_class: `FathomForCausalLM` by default.
        changes: fields of the config to change.
        may_begin: pattern of parameters that the file may lack, and that then begin at random.

    Raises:
        UserError: the checkpoint cannot be found, is not whole, or does not fit its config.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    from ..modeling.modeling_fathom import FathomForCausalLM

    cls = model_class or FathomForCausalLM
    folder = local_folder(path_or_id)
    check_checkpoint(folder)
    try:
        config = cls.config_class.from_pretrained(folder, **(changes or {}))
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{folder / CONFIG} describes no model that can be built: {_first_line(error)}") from error
    # transformers would print a table and raise an error that points to it; the report says the same in data.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = cls.from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"the weights in {folder} do not fit its {CONFIG}: {_first_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}: {name} is {list(found)}, should be {list(wanted)}"
        )
    missing = sorted(report["missing_keys"])
    if may_begin is not None:
        missing = [name for name in missing if not re.search(may_begin, name)]
    if missing:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}: {len(missing)} tensors are missing, first {missing[0]}"
        )
    return model.eval()


def load_tokenizer(path_or_id: str) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer that lies beside a model, or alone in a folder.

    Raises:
        UserError: there is none, or its files are damaged.
    """
    # Not AutoTokenizer: it would look into config.json first and ask whether to run the code of a pushed model.
    from transformers import PreTrainedTokenizerFast

    folder = local_folder(path_or_id)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: save a tokenizer there (fathom tokenizer --out FOLDER)")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # `tokenizers` raises a bare Exception for a tokenizer.json it cannot use
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error


def local_folder(path_or_id: str) -> Path:
    """The folder itself, or the local copy of a Hub repository, downloaded when it is not there yet."""
    path = Path(path_or_id).expanduser()
    if not is_hub_id(path_or_id):
        return path
    from huggingface_hub import snapshot_download

    with hub_errors(path_or_id):
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_FILES))


def is_hub_id(path_or_id: str) -> bool:
    """Whether it names a repository on the Hub, being no folder here.

    Raises:
        UserError: it is neither.
    """
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return False
    if path.exists():
        raise UserError(f"{path} is a file; give the folder that holds {CONFIG} and the weights")
    # `runs/pretrian` is a Hub id by its form; where a folder `runs` exists it is a slip in a path.
    if path.parent.is_dir() or not _HUB_ID.fullmatch(str(path_or_id)):
        raise UserError(_missing(path))
    return True


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns what can go wrong between this machine and the Hub into one line each."""
    from huggingface_hub import constants

    hub = constants.ENDPOINT
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UserError(f"{hub} needs a token: run `hf auth login` or set HF_TOKEN") from error
    except GatedRepoError as error:
        raise UserError(f"{repo_id} is gated: ask for access at {hub}/{repo_id}, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"no repository {repo_id} on {hub} that you may see: check the name; if it is private, run `hf auth login` "
            "or set HF_TOKEN to a token that may read it"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise UserError(
                f"{hub} refuses the token for {repo_id} (HTTP {status}): run `hf auth login` or set HF_TOKEN to a "
                "token with the rights this needs"
            ) from error
        raise UserError(f"{hub} answers HTTP {status} for {repo_id}: {_first_line(error)}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(f"cannot reach {hub}, and {repo_id} is not in the local cache: check the network") from error
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name: {_first_line(error)}") from error
    except Exception as error:
        # By name: the HTTP library under huggingface_hub (httpx, httpx2) differs between its versions.
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            raise UserError(f"cannot reach {hub} ({_first_line(error)}): check the network") from error
        raise


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

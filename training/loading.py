"""Models and tokenizers for use; whatever is wrong with a folder is one line that names file, value and mend.

`checkpoint_check` decides, before anything is built, and `fathom inspect` prints what it decides; what still fails
afterwards, in a library, is put in one line as well.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_files import CONFIG, MODEL_TYPE, read_json
from .errors import UserError, reason
from .hub import local_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


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
        UserError: the checkpoint cannot be found, is not whole, does not fit its config or this machine's memory, or
            holds numbers that are not finite.
    """
    from ..modeling.modeling_fathom import FathomForCausalLM
    from .checkpoint_check import check_values, damaged, loaded_values, whole_model

    kind = model_class or FathomForCausalLM
    folder = local_folder(path_or_id)
    described = whole_model(folder, kind, (MODEL_TYPE,), changes, may_begin)
    check_memory(folder, described, dtype)
    with _transformers_is_silent(), _one_line(f"the model in {folder} cannot be loaded"):
        model = kind.from_pretrained(folder, config=described.config, dtype=dtype)
    try:
        check_values(loaded_values(model), model.config.n_routed_experts)
    except ValueError as error:
        raise UserError(damaged(folder, error)) from error
    # How long a text gets is said by whoever asks for it.
    stored = getattr(model, "generation_config", None)
    if stored is not None:
        stored.max_new_tokens = stored.max_length = None
    return model.eval()


def check_memory(folder: Path, model: "PreTrainedModel", dtype: "str | torch.dtype" = "auto") -> None:
    """Compares what a model takes with what the machine has.

    Args:
        folder: for the message.
        model: on the meta device.
        dtype: of the parameters in memory; `auto`: the config's.

    Raises:
        UserError: the weights alone are more than all memory.
    """
    import torch

    stored = model.config.dtype if dtype == "auto" else dtype
    itemsize = stored.itemsize if isinstance(stored, torch.dtype) else 4
    needed = itemsize * sum(tensor.numel() for tensor in model.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise UserError(
            f"the weights in {folder} take {needed / 1e9:,.1f} GB and this machine has {memory / 1e9:,.1f} GB; "
            f"load them in parts, by from_pretrained(device_map='auto')"
        )


def load_tokenizer(path_or_id: str) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer that lies beside a model, or alone in a folder.

    Raises:
        UserError: there is none, its files are damaged, or it has ids beyond the model's vocabulary.
    """
    # Not AutoTokenizer: it would look into config.json first and ask whether to run the code of a pushed model.
    from transformers import PreTrainedTokenizerFast

    folder = local_folder(path_or_id)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json: save a tokenizer there (fathom tokenizer --out FOLDER)")
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    with _transformers_is_silent(), _one_line(f"the tokenizer in {folder} cannot be loaded"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        tokenizer.decode(tokenizer.encode("A word, and 1 more."))
    vocab_size = read_json(folder / CONFIG).get("vocab_size") if (folder / CONFIG).is_file() else None
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if type(vocab_size) is int and highest >= vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has the id {highest}, but vocab_size in {CONFIG} is {vocab_size}: "
            f"put the tokenizer there that the model was trained with"
        )
    return tokenizer


@contextmanager
def _transformers_is_silent() -> Iterator[None]:
    """transformers would print a table and raise an error that points to it."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Puts whatever a library raises about a file into one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a panic of Rust code (tokenizers, safetensors) is no Exception
        raise UserError(f"{what}: {reason(error)}") from error

"""What a request may ask of a model, checked before anything is generated.

A request of `fathom serve` is one row of the model's shared batch. What cannot be one, or would take more than a row
has room for, is refused with 400; options that do not change texts (caches, drafts, what is returned beside the text)
are set to what a row needs.
"""

import inspect
from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

MAX_STOPS, MAX_STOP_LENGTH = 16, 256  # strings that end a text, and characters of each
PLAIN: dict[str, Any] = {
    "use_cache": True,
    "cache_implementation": None,
    "compile_config": None,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "use_mtp": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "token_healing": False,
}


def refused(message: str) -> HTTPException:
    return HTTPException(status_code=400, detail=message)


def check_body(body: dict) -> None:
    """Refuses template arguments that are no variables of the template, a template of the client's above all.

    Raises:
        HTTPException: 400.
    """
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, dict):
        raise refused("chat_template_kwargs must be an object")
    taken = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    if wrong := sorted(given.keys() & taken.keys()):
        raise refused(f"chat_template_kwargs may hold variables of the model's chat template, not {', '.join(wrong)}")


def check_length(body: dict, tokenizer: Any, context: int) -> None:
    """Refuses, before it is tokenized, a text of more characters than the context's tokens can have.

    Raises:
        HTTPException: 400.
    """
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    characters = count_characters(body)
    if characters > context * longest:
        raise refused(
            f"the request has {characters} characters, but the model's context holds {context} tokens of up to "
            f"{longest} characters; shorten it"
        )


def count_characters(value: Any) -> int:
    """In all strings of a JSON value."""
    total, rest = 0, [value]
    while rest:
        each = rest.pop()
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, list):
            rest += each
        elif isinstance(each, dict):
            rest += each.values()
    return total


def check_config(config: GenerationConfig) -> None:
    """Refuses what is not one text of a shared batch, and sets the options that do not change it.

    Raises:
        HTTPException: 400.
    """
    if config.max_new_tokens is None and config.max_length is not None:
        raise refused(f"max_length={config.max_length} is not served; give max_tokens, or max_new_tokens")
    config.max_length = None
    for name, value in PLAIN.items():
        setattr(config, name, value)
    for name in ("num_beams", "num_return_sequences"):
        if getattr(config, name) not in (None, 1):
            raise refused(f"{name}={getattr(config, name)} is not served; ask for one text that is sampled or greedy")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise refused(f"generation by {mode.value} is not served; ask for a text that is sampled or greedy")
    config.stop_strings = check_stops(config.stop_strings)


def check_stops(stops: Any) -> list[str] | None:
    """The strings that end a text, None without any.

    Raises:
        HTTPException: 400.
    """
    stops = [stops] if isinstance(stops, str) else list(stops or [])
    if len(stops) > MAX_STOPS or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise refused(f"stop may be a string, or hold up to {MAX_STOPS}, of 1 to {MAX_STOP_LENGTH} characters each")
    return stops or None


def fit_into_context(config: GenerationConfig, prompt_tokens: int, context: int) -> None:
    """Refuses a prompt that is empty or leaves no room, and clips the number of new tokens to the room there is.

    Raises:
        HTTPException: 400.
    """
    if prompt_tokens == 0:
        raise refused("the prompt is empty; write a text to start from")
    room = context - prompt_tokens
    if room < 1:
        raise refused(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {context} and the answer needs "
            f"room; shorten the prompt"
        )
    wanted = room if config.max_new_tokens is None else config.max_new_tokens
    if not isinstance(wanted, int) or wanted < 1:
        raise refused(f"max_tokens={wanted} must be at least 1")
    config.max_new_tokens = min(wanted, room)

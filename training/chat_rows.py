"""A row of a dataset as a conversation, in whichever of the usual forms it comes.

    messages             [{"role": "user", "content": ...}, ...]                         OpenAI, TRL
    conversations        [{"from": "human", "value": ...}, {"from": "gpt", ...}]         ShareGPT
    instruction          "...", with input, output, system, history                      Alpaca
    prompt, completion   two texts, or two lists of messages                             TRL

The names of ShareGPT are changed as TRL's `maybe_convert_to_chatml` does, which `tests` compare with, and its roles
too, which TRL leaves; to import TRL for that would take seconds and another package. As in TRL, a prompt's assistant
messages are no targets.

Arrow gives all structs of a column the same fields: from .parquet a call's arguments come with the arguments of all
other calls, which are null, in another order, and with 1.0 for 1 where another call has 1.5. So that a row is the same
conversation whatever file it comes from, nulls are taken out, keys are put in order, and whole numbers are written as
such.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")
_KEYS = ("role", "content", "reasoning_content", "tool_calls", "weight")
# How schemas are usually written: with this order the text that is learned looks like the prompts that are asked.
_SCHEMA_ORDER = ("type", "function", "name", "title", "description", "parameters", "enum", "items", "properties")


@dataclass(frozen=True)
class Conversation:
    """Messages as the chat template reads them, arguments of calls as JSON text; tools as JSON schemas."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def conversation(row: Mapping[str, Any]) -> Conversation:
    """The conversation in a row.

    Raises:
        ValueError: the row has none of the forms, or no answer to learn from.
    """
    messages = [_message(message, number) for number, message in enumerate(_messages(row), 1)]
    answers = [message for message in messages if message.get("role") == "assistant"]
    if not answers:
        raise ValueError("has no assistant message, so there is nothing to learn from it")
    if not any(message.get("weight", 1) for message in answers):
        raise ValueError("has weight 0 for every assistant message, so there is nothing to learn from it")
    return Conversation(messages, _tools(row))


def up_to_last_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without those after the last answer that is learned: from a closing "Thanks!" nothing is."""
    learned = [at for at, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]
    return messages[: learned[-1] + 1]


def _messages(row: Mapping[str, Any]) -> list[Any]:
    filled = {key: value for key, value in row.items() if value is not None}
    for key in ("messages", "conversations", "conversation"):
        if key in filled:
            return _list_of_messages(filled[key], key, filled)
    if "prompt" in filled and "completion" in filled:
        prompt = _turn(filled["prompt"], "prompt", "user")
        given = [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in prompt]
        return given + _turn(filled["completion"], "completion", "assistant")
    if "instruction" in filled and "output" in filled:
        return _alpaca(filled)
    raise ValueError(
        "has no 'messages', a list of {'role': ..., 'content': ...} objects, and none of the forms of ShareGPT "
        "('conversations'), Alpaca ('instruction', 'output') or 'prompt' with 'completion'; it has "
        f"{', '.join(map(repr, row)) or 'nothing'}"
    )


def _list_of_messages(value: Any, key: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    value = _parsed(value)
    if not isinstance(value, list) or not all(isinstance(_parsed(message), Mapping) for message in value):
        raise ValueError(f"has no list of {{'role': ..., 'content': ...}} objects in {key!r}")
    messages = [dict(_parsed(message)) for message in value]
    if any("from" in message for message in messages):
        messages = list(map(_from_sharegpt, messages))
    system = row.get("system")  # ShareGPT's rows may have it beside the turns
    if isinstance(system, str) and system and (not messages or messages[0].get("role") != "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _turn(value: Any, key: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _list_of_messages(value, key, {})


def _alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instruction and input are one question, with an empty line between them."""
    texts = [row.get("system", ""), row["instruction"], row.get("input", ""), row["output"]]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("has an 'instruction', 'input', 'output' or 'system' that is no text")
    system, instruction, given, output = texts
    turns = row.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        raise ValueError("has a 'history' that is no list of [question, answer]")
    pairs = [*turns, (f"{instruction}\n\n{given}" if given.strip() else instruction, output)]
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _from_sharegpt(message: Mapping[str, Any]) -> dict[str, Any]:
    """{"from": "gpt", "value": ...} as {"role": "assistant", "content": ...}."""
    said = dict(message)
    if "from" in said:
        said["role"] = said.pop("from")
    if "value" in said:
        said["content"] = said.pop("value")
    if said.get("role") in _CALL_ROLES:
        calls = _parsed(said.get("content"))
        return {
            **said,
            "role": "assistant",
            "content": None,
            "tool_calls": calls if isinstance(calls, list) else [calls],
        }
    return {**said, "role": ROLES.get(str(said.get("role")), said.get("role"))}


def _message(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message with the keys that the template reads and no others."""
    said = {key: value for key, value in message.items() if value is not None}
    for name in ("reasoning", "thinking"):
        said.setdefault("reasoning_content", said.get(name))
    if "function_call" in said:
        said.setdefault("tool_calls", [said["function_call"]])
    if said.get("role") == "function":
        said["role"] = "tool"
    if isinstance(said.get("content"), list):
        said["content"] = _joined(said["content"])
    plain = {key: said[key] for key in _KEYS if said.get(key) is not None}
    calls = _parsed(plain.pop("tool_calls", None))
    if calls:
        plain["tool_calls"] = [_call(call) for call in calls] if isinstance(calls, list) else calls
    if plain.get("weight", 1) not in (0, 1):
        raise ValueError(f"has weight {plain['weight']} in message {number}; it must be 0 (not learned) or 1")
    if "weight" in plain:
        plain["weight"] = int(plain["weight"])
    return plain


def _joined(parts: list[Any]) -> Any:
    """The text of a content that is given in parts; as it is where a part is no text (an image)."""
    of_text = [part for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    texts = [part["text"] for part in of_text if isinstance(part.get("text"), str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _call(call: Any) -> Any:
    call = _parsed(call)
    function = call.get("function") or call if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(without_nulls(arguments or {}), ensure_ascii=False)
    return {"type": "function", "function": {"name": function.get("name"), "arguments": arguments}}


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = _parsed(row.get("tools") if row.get("tools") is not None else row.get("functions"))
    tools = [] if tools is None else tools
    tools = list(map(_parsed, tools)) if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("has 'tools' that are no list of JSON schemas")
    return [without_nulls(tool) for tool in tools]


def _parsed(value: Any) -> Any:
    """What a text of JSON holds, where a column stores lists and objects as such; any other text as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def without_nulls(value: Any) -> Any:
    """A JSON value without what Arrow adds to or changes in it (see the top of this file)."""
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (_rank(key), str(key)))
        return {key: without_nulls(value[key]) for key in keys if value[key] is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def _rank(key: Any) -> int:
    return _SCHEMA_ORDER.index(key) if key in _SCHEMA_ORDER else len(_SCHEMA_ORDER)

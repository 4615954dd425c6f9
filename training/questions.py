"""Conversations to fine-tune on: from docstrings, from a file, or from a `datasets` name.

    def dedent(text):                              user       What does `textwrap.dedent(text)` do?
        \"\"\"Remove any common leading ...    ->      assistant  Remove any common leading ...

The answers are the first paragraphs of real docstrings of the standard library, read from its sources by `ast`;
no module is imported. Held-out questions are about modules that `training/corpus.py` holds out as well, so the
model has read neither the question nor the answer.
"""

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
from datasets import Dataset, DatasetDict
from transformers.utils.chat_template_utils import render_jinja_template

from ..tokenizer import chat_template, check_text
from .corpus import HELDOUT_FRACTION, heldout, is_dataset_name, json_rows, open_dataset, parquet_rows, stdlib_files
from .errors import UserError

MIN_ANSWER, MAX_ANSWER = 20, 300  # characters
_MAX_CALL = 72  # characters of `name(arguments)` in a question

# Seven of ten questions have the first wording of their kind: one form to learn, three more to understand.
_WORDINGS = {
    "function": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Explain `{name}`.",
        "Describe the function `{name}` of Python's standard library.",
    ),
    "class": (
        "What is the class `{name}`?",
        "What is `{name}` for?",
        "Explain `{name}`.",
        "Describe the class `{name}` of Python's standard library.",
    ),
    "property": (
        "What is the property `{name}`?",
        "What is `{name}` for?",
        "Explain `{name}`.",
        "Describe the property `{name}` of Python's standard library.",
    ),
}

_SIGNATURE = re.compile(r"[\w.]+\(.*\)( *(->|=).*)?")
_HELDOUT_SPLITS = ("heldout", "test", "validation")
_MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls")


def docstring_conversations() -> DatasetDict:
    """Question-answer pairs about the standard library of the running interpreter.

    A held-out answer that also occurs in the train split ("Return True if ...") is no test and is left out.

    Returns:
        Splits `train` and `heldout`, columns `messages` (a user and an assistant message) and `source` (the module).

    Raises:
        UserError: this interpreter came without sources.
    """
    train: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for file in stdlib_files():
        module = file.name.removeprefix("stdlib/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        split = rest if heldout(str(file.module), HELDOUT_FRACTION) else train
        for question, answer in _questions(_parsed(file.path), module):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            split.append({"messages": messages, "source": module})
    answers = {row["messages"][1]["content"] for row in train}
    rest = [row for row in rest if row["messages"][1]["content"] not in answers]
    return DatasetDict(train=Dataset.from_list(train), heldout=Dataset.from_list(rest))


def load_conversations(source: str = "docstrings") -> DatasetDict:
    """Loads conversations and checks every one of them against the chat template.

    Args:
        source: `docstrings`, a .jsonl or .parquet file of rows `{"messages": [{"role": ..., "content": ...}, ...]}`,
            or a `datasets` name `owner/name[:config]` with such a column. Other columns are not read. Messages may
            carry `reasoning_content` and `tool_calls`.

    Returns:
        Splits `train` and `heldout`, columns `messages` and `source`. A dataset's own test or validation split is
        held out; without one, `HELDOUT_FRACTION` of the conversations is, by hash of their content.

    Raises:
        UserError: no such source, or a row that is no conversation, with its place and what is wrong.
    """
    if source == "docstrings":
        return docstring_conversations()
    path = Path(source)
    if path.is_file() and path.suffix.lower() == ".jsonl":
        return _split(_checked(json_rows(path), source, "line"))
    if path.is_file() and path.suffix.lower() == ".parquet":
        return _split(_checked(parquet_rows(path), source, "row"))
    if path.exists():
        raise UserError(f"{source} is no .jsonl or .parquet file of conversations")
    if not is_dataset_name(source):
        raise UserError(
            f"no conversations in {source}: no such file; give docstrings, a .jsonl, a .parquet or owner/name"
        )

    splits = open_dataset(source)
    if "train" not in splits:
        raise UserError(f"the dataset {source} has no split train, only {', '.join(splits)}")
    own = next((name for name in _HELDOUT_SPLITS if name in splits), None)
    train = _checked(enumerate(splits["train"], 1), f"{source} train", "row")
    if own is None:
        return _split(train)
    rest = _checked(enumerate(splits[own], 1), f"{source} {own}", "row")
    return DatasetDict(train=Dataset.from_list(train), heldout=Dataset.from_list(rest))


def _checked(rows: Iterable[tuple[int, dict[str, Any] | None]], where: str, unit: str) -> list[dict[str, Any]]:
    """Takes the messages out of the rows; what the chat template would refuse is refused here, with its place."""
    template = chat_template()
    checked = []
    for number, row in rows:
        place = f"{where} {unit} {number}"
        if row is None:
            raise UserError(f"{place} is no UTF-8 text")
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{place} has no 'messages', a list of {{'role': ..., 'content': ...}} objects")
        messages = [_plain(message) for message in messages]
        if not any(message.get("role") == "assistant" for message in messages):
            raise UserError(f"{place} has no assistant message, so there is nothing to learn from it")
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template)
            check_text(text)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"{place}: {error}") from error
        checked.append({"messages": messages, "source": place})
    if not checked:
        raise UserError(f"{where} holds no conversations")
    return checked


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message of the keys the template reads; arguments as JSON text, as Arrow would give all calls the same keys."""
    plain = {key: message[key] for key in _MESSAGE_KEYS if message.get(key) is not None}
    if isinstance(plain.get("tool_calls"), list):
        plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
    return plain


def _plain_call(call: Any) -> Any:
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    arguments = function.get("arguments") or {}
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": function.get("name"), "arguments": text}}


def _split(rows: list[dict[str, Any]]) -> DatasetDict:
    digests = [hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode()).hexdigest() for row in rows]
    if len(set(digests)) < 2:
        raise UserError(f"{rows[0]['source']} is the only conversation; it takes one to learn and one to hold out")
    out = [heldout(digest, HELDOUT_FRACTION) for digest in digests]
    if not any(out) or all(out):  # few conversations: one of them, whichever the hash says
        out = [digest == min(digests) for digest in digests]
    whole = Dataset.from_list(rows)
    return DatasetDict(
        train=whole.select([at for at, held in enumerate(out) if not held]),
        heldout=whole.select([at for at, held in enumerate(out) if held]),
    )


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old sources
        return ast.parse(path.read_bytes())


def _questions(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    asked = set()
    for qualified_name, node, in_class in _definitions(tree.body):
        answer = _answer(ast.get_docstring(node) or "")
        name = f"{module}.{qualified_name}"
        if answer is None or name in asked:  # defined twice: under an `if`, or as a property and its setter
            continue
        asked.add(name)
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in node.decorator_list}
        if isinstance(node, ast.ClassDef):
            kind = "class"
        elif decorators & {"property", "cached_property", "abstractproperty"}:
            kind = "property"
        else:
            kind = "function"
        # The hash is of the name alone: a question keeps its wording from one Python version to the next.
        draw = hashlib.sha256(name.encode()).digest()[0] % 10
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and kind == "function":
            name += f"({_arguments(node.args, len(name), in_class and 'staticmethod' not in decorators)})"
        yield _WORDINGS[kind][max(0, draw - 6)].format(name=name), answer


def _definitions(
    body: Iterable[ast.AST], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, bool]]:
    """Yields (qualified name, node, whether in a class) of public functions, classes and methods, top down."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("_"):
                yield prefix + node.name, node, bool(prefix)
                if isinstance(node, ast.ClassDef):
                    yield from _definitions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _definitions(ast.iter_child_nodes(node), prefix)


def _arguments(arguments: ast.arguments, name_length: int, is_method: bool) -> str:
    """The arguments as one writes them in a call: no self, no annotations, defaults only where there is room."""
    positional = arguments.posonlyargs or arguments.args
    if is_method and positional:
        del positional[0]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    text = ast.unparse(arguments)
    if name_length + len(text) > _MAX_CALL:
        arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)
        text = ast.unparse(arguments)
    return text if name_length + len(text) <= _MAX_CALL else "..."


def _answer(docstring: str) -> str | None:
    """The first paragraph on one line, or None where that is no prose that can stand alone."""
    text = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    if not MIN_ANSWER <= len(text) <= MAX_ANSWER or len(text.split()) < 4 or not text[0].isalnum():
        return None
    if _SIGNATURE.fullmatch(text) or ">>>" in text or text.endswith(":") or "deprecated" in text.lower():
        return None
    return text

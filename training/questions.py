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
from .chat_rows import conversation, up_to_last_answer
from .corpus import HELDOUT_FRACTION, heldout
from .errors import UserError
from .row_files import ROW_KINDS, BadRow, is_saved_dataset, open_saved_dataset, read_rows, unit_of
from .sources import is_dataset_name, open_dataset, stdlib_files
from .text_files import COMPRESSIONS, kind_of, shown

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


def load_conversations(source: str = "docstrings", skipped: list[str] | None = None) -> DatasetDict:
    """Loads conversations and checks every one of them against the chat template.

    Args:
        source: `docstrings`, a file of rows (`row_files.ROW_KINDS`, also compressed), a folder that `datasets` saved,
            or a `datasets` name `owner/name[:config]`. `chat_rows` says which forms a row may have; other columns than
            those and `tools` are not read. Messages may carry `reasoning_content`, `tool_calls` and `weight`.
        skipped: where to write what is wrong with bad rows, which are then left out; None: a bad row is an error.

    Returns:
        Splits `train` and `heldout`, columns `messages` and `source`, and `tools` (JSON text) where a row has some. A
        dataset's own test or validation split is held out; without one, `HELDOUT_FRACTION` of the conversations is, by
        hash of their content.

    Raises:
        UserError: no such source, or a row that is no conversation, with its place and what is wrong.
    """
    if source == "docstrings":
        return docstring_conversations()
    path = Path(source)
    if path.is_file() and kind_of(path) in ROW_KINDS:
        return _split(_checked(read_rows(path), shown(source), unit_of(path), skipped))
    if path.is_dir() and is_saved_dataset(path):
        splits = open_saved_dataset(path)
    elif path.exists():
        raise UserError(
            f"{shown(source)} is no file of conversations ({' '.join(ROW_KINDS)}, also {' '.join(COMPRESSIONS)}) "
            "and no folder that datasets saved"
        )
    elif is_dataset_name(source):
        splits = open_dataset(source)
    else:
        raise UserError(
            f"no conversations in {shown(source)}: no such file; give docstrings, a .jsonl, a .parquet or owner/name"
        )
    if isinstance(splits, Dataset):
        return _split(_checked(enumerate(splits, 1), shown(source), "row", skipped))
    if "train" not in splits:
        raise UserError(f"the dataset {shown(source)} has no split train, only {', '.join(splits)}")
    own = next((name for name in _HELDOUT_SPLITS if name in splits), None)
    train = _checked(enumerate(splits["train"], 1), f"{shown(source)} train", "row", skipped)
    if own is None:
        return _split(train)
    rest = _checked(enumerate(splits[own], 1), f"{shown(source)} {own}", "row", skipped)
    return DatasetDict(train=_dataset(train), heldout=_dataset(rest))


def _checked(
    rows: Iterable[tuple[int, dict[str, Any] | BadRow]], where: str, unit: str, skipped: list[str] | None
) -> list[dict[str, Any]]:
    """The conversations in the rows; what the chat template would refuse is refused here, with its place."""
    template = chat_template()
    checked = []
    for number, row in rows:
        place = f"{where} {unit} {number}"
        try:
            checked.append({**_conversation(row, template), "source": place})
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())
            problem = f"{place} {reason}" if reason.startswith(("is ", "has ", "cannot ")) else f"{place}: {reason}"
            if skipped is None:
                raise UserError(f"{problem}; mend it, or leave out what is wrong with --skip_bad_rows") from error
            skipped.append(problem)
    if not checked:
        raise UserError(f"{where} holds no conversations" + (f"; the first row: {skipped[0]}" if skipped else ""))
    return checked


def _conversation(row: dict[str, Any] | BadRow, template: str) -> dict[str, Any]:
    if isinstance(row, BadRow):
        raise ValueError(row.problem)
    found = conversation(row)
    # All of it is checked, also what is not learned.
    (text,), _ = render_jinja_template([found.messages], tools=found.tools or None, chat_template=template)
    check_text(text)
    tools = {"tools": json.dumps(found.tools, ensure_ascii=False)} if found.tools else {}
    return {"messages": up_to_last_answer(found.messages), **tools}


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """As JSON text: Arrow would give all tools the fields of all others."""
    if any("tools" in row for row in rows):
        rows = [{"messages": row["messages"], "source": row["source"], "tools": row.get("tools", "")} for row in rows]
    return Dataset.from_list(rows)


def _split(rows: list[dict[str, Any]]) -> DatasetDict:
    digests = [hashlib.sha256(json.dumps(row["messages"], sort_keys=True).encode()).hexdigest() for row in rows]
    if len(set(digests)) < 2:
        raise UserError(f"{rows[0]['source']} is the only conversation; it takes one to learn and one to hold out")
    out = [heldout(digest, HELDOUT_FRACTION) for digest in digests]
    if not any(out) or all(out):  # few conversations: one of them, whichever the hash says
        out = [digest == min(digests) for digest in digests]
    whole = _dataset(rows)
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

"""Command lines from dataclasses (`HfArgumentParser`), with values from a YAML file under them.

    fathom pretrain --config run.yaml --learning_rate 1e-3

A YAML key is an option's name without the dashes. The file is read as if its keys stood before the command
line, so the command line wins and both pass through the same type checks.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from ..training.errors import UserError, did_you_mean


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def print_help(self, file=None) -> None:
        # argparse itself would not say that nobody could read it.
        print(self.format_help(), end="", file=file)


def parse(
    verb: str, description: str, dataclass_types: Sequence[type], argv: Sequence[str], positionals: Sequence[str] = ()
) -> tuple[Any, ...]:
    """Parses a verb's command line into one instance per dataclass.

    Args:
        verb: name of the verb, for the usage line.
        description: what `--help` says above the options.
        dataclass_types: one group of options each; `_argument_group_name` on the class titles the group.
        argv: the words after the verb.
        positionals: options that may also be given in this order without their name, before all other words.

    Raises:
        UserError: unknown option or key (with the nearest names), a value of the wrong type, an unreadable file.
    """
    parser = _Parser(dataclass_types, prog=f"fathom {verb}", description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with defaults for any of these options")
    known = {field.name for kind in dataclass_types for field in fields(kind) if field.init}

    words = list(argv)
    named: list[str] = []
    for name in positionals:
        if words and not words[0].startswith("-"):
            named += [f"--{name}", words.pop(0)]
    words = named + words
    for flag in ("--config", "-c"):
        if flag in words:
            at = words.index(flag)
            if at + 1 == len(words):
                raise UserError(f"{flag} needs a file name")
            words = _words_of(Path(words[at + 1]), known) + words[:at] + words[at + 2 :]

    *parsed, rest = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    unknown = [word for word in rest if word.startswith("--")] or rest
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        raise UserError(f"unknown option {unknown[0]}{did_you_mean(name, known)}")
    return tuple(part for part in parsed if type(part) in set(dataclass_types))


def _words_of(path: Path, known: set[str]) -> list[str]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read --config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold `option: value` lines")
    words: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise UserError(f"unknown key {key!r} in {path}{did_you_mean(str(key), known)}")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(str(item).lower() if isinstance(item, bool) else str(item) for item in items)]
    return words

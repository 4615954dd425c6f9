"""What files of a run may not say: tokens, keys, passwords, and where on the machine things lie.

A run's record (run.json), its checkpoints and the model card are copied and pushed. What is written there, and every
command line that is printed, goes through this file:

    without_secrets(text)      text in which each secret is `<redacted>`
    public(value)              the same for a JSON value, and every absolute path is only its last part

A secret is recognised by the name it is given to (hub_token, api_key, ...), by its form (hf_..., sk-..., a URL with a
password), and by its value: what stands in an environment variable of such a name, or was given to such an option
before (`remember`), is a secret wherever it appears.
"""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

REDACTED = "<redacted>"
# Shorter values of variables are words like `true`, which stand everywhere.
SHORTEST_VALUE = 8

_SECRET_WORDS = r"(token|key|password|passwd|passphrase|pwd|secrets?|credentials?|apikey|auth|authorization)"
_SECRET_NAME = re.compile(rf"(.*[\W_])?{_SECRET_WORDS}|.*(secret|password|api_?key|access_?key|private_?key).*", re.I)
# Tokens of a vocabulary and keys of attention, JSON or tables are no secrets.
_HARMLESS_NAME = re.compile(
    r"(.*_)?(bos|eos|pad|unk|sep|cls|mask|image|audio|video|start|end|stop|think|boi|eoi|prompt|next|last|first|"
    r"extra_special|additional_special|num|per|max|sort|column|row|label|text|primary|foreign)_(token|key)",
    re.I,
)
_FORMS = re.compile(
    "|".join(
        (
            # Hugging Face: a folder `hf_baseline` is none.
            r"\bhf_(?:[A-Za-z0-9]{16,}|(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{6,}|(?=[a-z]*\d)[a-z0-9]{10,})",
            r"\bapi_org_[A-Za-z0-9]{8,}",
            r"\bsk-(?:[a-z]+-)*(?=[A-Za-z_-]*\d|[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{8,}",
            r"\b(?:gh[pousr]_|github_pat_|glpat-|npm_|pypi-|xox[abpr]-)[A-Za-z0-9_-]{10,}",
            r"\bA(?:KI|SI)A[A-Z0-9]{12,}",
            r"\bAIza[A-Za-z0-9_-]{20,}",
            r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?",
            r"(?<=Bearer )[^\s'\",]+",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        )
    ),
    re.S,
)
_URL_LOGIN = re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")
_ASSIGNED = re.compile(r"""(?P<name>[A-Za-z][\w.-]*)(?P<is>["']?\s*=\s*["']?)(?P<value>[^\s"',;&}\])]+)""")
_ENTRY = re.compile(r"""(?P<name>[A-Za-z][\w.-]*)(?P<is>["']\s*:\s*["'])(?P<value>[^"']+)""")
# A path begins after a space, a quote, `=` and the like, not after a letter (runs/x), a dot (./x) or `:` (https://).
_PATH = re.compile(
    r"""(?<![\w.~/\\<:-])(?:file://)?(?:~[\w.-]*[/\\]|/(?=[^\s/'"])|[A-Za-z]:[\\/]|\\\\(?=\w))[^\s'",;:)\]}>|]*"""
    r"""|(?<=[\w"']:)/(?=[\w.])(?!/)[^\s'",;:)\]}>|]*"""
)

_remembered: set[str] = set()


def is_secret_name(name: str) -> bool:
    """Whether what is given to this option, field or variable is a secret, by its name."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # accessToken
    return bool(_SECRET_NAME.fullmatch(name)) and not _HARMLESS_NAME.fullmatch(name)


def remember(value: str) -> None:
    """From here on this value is a secret in every text."""
    if len(value) >= SHORTEST_VALUE:
        _remembered.add(value)


def without_secrets(text: str) -> str:
    """The text with `<redacted>` in place of every secret; a name that it is given to stays."""
    for value in sorted(_known_values(), key=len, reverse=True):
        text = text.replace(value, REDACTED)
    text = _URL_LOGIN.sub(REDACTED, text)
    for pattern in (_ASSIGNED, _ENTRY):
        text = pattern.sub(_assigned, text)
    return _FORMS.sub(REDACTED, text)


def redacted_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without secrets: in `name=value`, after `--name`, and by their form."""
    safe: list[str] = []
    follows_secret_option = False
    for word in words:
        name, equals, _ = word.partition("=")
        option = name.lstrip("-")
        if follows_secret_option and not word.startswith("--"):
            safe.append(REDACTED)
        elif equals and is_secret_name(option):
            safe.append(f"{name}={REDACTED}")
        else:
            safe.append(without_secrets(word))
        follows_secret_option = word.startswith("--") and not equals and is_secret_name(option)
    return safe


def public_words(words: Sequence[str]) -> list[str]:
    """The words of a command line without secrets and absolute paths; `--name=/a/b` and `name=/a/b` keep the name."""
    return [_public_word(word) for word in redacted_words(words)]


def public_command(command: str) -> str:
    """A command line, as a shell would read it, without secrets and absolute paths."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its partner
        return public_text(command)
    return shlex.join(public_words(words))


def public_text(text: str) -> str:
    """Any text without secrets and absolute paths."""
    text = without_secrets(text)
    return last_part(text) if _is_absolute(text) else _PATH.sub(lambda match: last_part(match[0]), text)


def public(value: Any) -> Any:
    """A JSON value without secrets and absolute paths, keys included.

    Args:
        value: dicts, lists, strings, numbers, paths. The string of a key `command` is read as a command line.
    """
    if isinstance(value, Enum):
        return value
    if isinstance(value, Mapping):
        return {public_text(str(key)): _public_entry(str(key), entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set):
        return [public(entry) for entry in value]
    if isinstance(value, str | os.PathLike):
        return public_text(os.fspath(value)) if isinstance(value, str) else public_text(str(value))
    return value


def last_part(path: str) -> str:
    """The last part of a path, by the rules of either kind of system; a root alone stays."""
    path = path.removeprefix("file://")
    kind = PureWindowsPath if re.match(r"[A-Za-z]:[\\/]|\\\\", path) else PurePosixPath
    return kind(path).name or path


def _public_entry(key: str, value: Any) -> Any:
    if is_secret_name(key) and isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return REDACTED
    if key == "command" and isinstance(value, str):
        return public_command(value)
    return public(value)


def _public_word(word: str) -> str:
    name, equals, value = word.partition("=")
    if equals and _is_absolute(value):
        return f"{name}={last_part(value)}"
    return last_part(word) if _is_absolute(word) else public_text(word)


def _is_absolute(text: str) -> bool:
    """Whether all of a text is one absolute path; it may have spaces, but only one line."""
    return bool(re.match(r"(file://)?(/[^\s/]|~[\w.-]*[/\\]|[A-Za-z]:[\\/]\S|\\\\\w)", text)) and "\n" not in text


def _assigned(match: re.Match[str]) -> str:
    return f"{match['name']}{match['is']}{REDACTED}" if is_secret_name(match["name"]) else match[0]


def _known_values() -> set[str]:
    """Values that are secrets for certain: remembered, the Hub's token, those of variables with such a name."""
    values = {
        value
        for name, value in os.environ.items()
        if is_secret_name(name) and len(value) >= SHORTEST_VALUE and not os.path.exists(value)
    }
    stored = Path(os.environ.get("HF_TOKEN_PATH") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface"), "token"))
    try:
        token = stored.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError):
        token = ""
    return values | _remembered | ({token} if len(token) >= SHORTEST_VALUE else set())

"""Chat templates from anywhere, rendered within bounds.

A template is a program (Jinja) that comes with a tokenizer. transformers runs it in a sandbox: it reaches no file and
no module, but it may loop for ever or make a text of gigabytes. So a template that is not the one of this package is
rendered in a process of its own, which the system ends after `MOST_SECONDS` or beyond `MOST_BYTES` of memory; what
comes through is rendered again by transformers, as every caller expects it.

    this process    template, messages, variables  --JSON line-->  template_process.py
                    length, or what was raised     <--JSON line--  (ends if it hangs)
"""

import atexit
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tokenizer import chat_template
from .errors import UserError, reason
from .template_process import MOST_BYTES, MOST_SECONDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that a template may write: what the messages have, some times over, and much for instructions of its own.
MOST_CHARACTERS, MOST_PER_CHARACTER = 1_000_000, 20


def render_chat(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], **options: Any) -> Any:
    """`tokenizer.apply_chat_template(messages, **options)`, whose template neither hangs nor fills the memory.

    Args:
        tokenizer: with a chat template.
        messages: a conversation.
        options: of `apply_chat_template`, template variables among them.

    Raises:
        UserError: there is no template, it refuses the conversation, renders nothing, or takes too much of time, text
            or memory.
    """
    check_template(tokenizer, messages, **options)
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:
        raise UserError(f"the chat template refuses this conversation: {reason(error)}") from error


def check_template(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], **options: Any) -> None:
    """Renders a conversation in another process, unless the template is this package's own.

    Args and errors as of `render_chat`.
    """
    if not tokenizer.chat_template:
        raise UserError("this checkpoint's tokenizer has no chat template; it can only continue raw text")
    try:
        template = tokenizer.get_chat_template(None, options.get("tools"))
        if template == chat_template():
            return
        request = json.dumps([template, list(messages), {**tokenizer.special_tokens_map, **_variables(options)}])
    except Exception as error:
        raise UserError(f"the chat template cannot be used: {reason(error)}") from error
    answer = _renderer.ask(request)
    if "error" in answer:
        raise UserError(f"the chat template refuses this conversation: {answer['error']}")
    if not answer["characters"]:
        raise UserError("the chat template renders nothing from this conversation; mend chat_template.jinja")
    most = MOST_CHARACTERS + MOST_PER_CHARACTER * len(request)
    if answer["characters"] > most:
        raise UserError(
            f"the chat template writes {answer['characters']:,} characters from this conversation, more than the "
            f"{most:,} allowed; mend chat_template.jinja"
        )


def _variables(options: dict[str, Any]) -> dict[str, Any]:
    """What reaches the template of the options of `apply_chat_template`."""
    of_tokenizing = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")
    of_masks = ("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "chat_template")
    return {name: value for name, value in options.items() if name not in (*of_tokenizing, *of_masks)}


class _Renderer:
    """The process that renders, started when it is needed first and again when a template has ended it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.turn = threading.Lock()

    def ask(self, request: str) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            UserError: the process ended over it.
        """
        with self.turn:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            process = self.process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            if not line:
                self.close()
                raise UserError(
                    f"the chat template takes more than {MOST_SECONDS} seconds or {MOST_BYTES / 1e9:.0f} GB of memory; "
                    f"mend chat_template.jinja"
                )
        return json.loads(line)

    @staticmethod
    def start() -> "subprocess.Popen[str]":
        # -P: files beside the script, as training/trl.py, must not stand for packages of the same name.
        command = [sys.executable, "-P", str(Path(__file__).with_name("template_process.py"))]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the caller, who closes it
        )

    def close(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


_renderer = _Renderer()
atexit.register(_renderer.close)

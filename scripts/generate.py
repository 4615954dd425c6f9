"""`fathom generate MODEL "PROMPT"`: continue one prompt, streaming to the terminal.

    fathom generate runs/pretrain "def fibonacci(n):"             continues plain text (--raw, the default)
    fathom generate runs/sft "What does `len(obj)` do?" --chat    answers it in the chat format
    fathom generate runs/sft --prompt - --chat < question.txt     reads the prompt from stdin

The text goes to stdout and the figures to stderr, so the answer alone can be piped on.
"""

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..demo.sampling import Sampling
from ..training.errors import UserError
from .arguments import parse
from .cli import run

if TYPE_CHECKING:
    from ..demo.generation import Progress


@dataclass
class GenerateOptions:
    """Which model continues what."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint folder, Hub id, random:v3 or random:classic."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Text to continue, or a question; - reads stdin."})
    chat: bool = field(default=False, metadata={"help": "Apply the chat template: the prompt is a user's message."})
    raw: bool = field(default=False, metadata={"help": "Continue the prompt as plain text after BOS; the default."})
    system: str | None = field(default=None, metadata={"help": "System prompt, with --chat."})
    thinking: bool = field(default=False, metadata={"help": "Let the model reason before it answers, with --chat."})
    draft: bool = field(default=False, metadata={"help": "Let the MTP layers draft: the same text in fewer steps."})
    int8: bool = field(default=False, metadata={"help": "Weights in int8: a quarter of fp32's bytes, half of bf16's."})
    seed: int | None = field(default=None, metadata={"help": "Makes sampling repeatable."})
    allowed_special: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Control tokens that are meant where the prompt holds them ('<｜fim▁hole｜>' ...); others are text."
        },
    )

    def __post_init__(self) -> None:
        if self.model is None:
            raise UserError('no model given; write: fathom generate MODEL "PROMPT"')
        if self.prompt is None:
            raise UserError('no prompt given; write: fathom generate MODEL "PROMPT", or --prompt - to read stdin')
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed} must be from 0 to {2**32 - 1}")
        if self.chat and self.raw:
            raise UserError("--chat and --raw exclude each other; choose one")
        if not self.chat and (self.thinking or self.system is not None):
            raise UserError("--system and --thinking belong to the chat format; add --chat")


def main(argv: Sequence[str]) -> int:
    options, sampling = parse(
        "generate",
        "Continue one prompt, streaming to the terminal.",
        [GenerateOptions, Sampling],
        argv,
        positionals=("model", "prompt"),
    )
    text = read_stdin() if options.prompt == "-" else options.prompt

    from transformers import set_seed

    from ..demo.generation import chat_prompt, raw_prompt, stream
    from ..demo.shelf import load_source

    loaded = load_source(options.model, options.int8)
    if options.chat:
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        messages = [*system, {"role": "user", "content": text}]
        prompt = chat_prompt(loaded.tokenizer, messages, options.thinking, options.allowed_special)
    else:
        prompt = raw_prompt(loaded.tokenizer, text, options.allowed_special)
    if options.seed is not None:
        set_seed(options.seed)

    written = 0
    with closing(stream(loaded.model, loaded.tokenizer, prompt, sampling, draft=options.draft)) as replies:
        for progress in replies:
            print(progress.text[written:], end="", flush=True)
            written = len(progress.text)
    print(flush=True)
    print(summary(progress, sampling), file=sys.stderr)
    print(f"next: fathom chat {shlex.quote(options.model)}", file=sys.stderr)
    return 0


def read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"stdin is no UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}") from error


def summary(progress: "Progress", sampling: Sampling) -> str:
    """The closing line: tokens, speed, and what ended the text."""
    speed = "" if progress.tokens_per_second is None else f", {progress.tokens_per_second:.1f} tokens/s"
    line = f"{progress.prompt_tokens} prompt tokens, {progress.new_tokens} new tokens{speed}"
    if progress.finish == "length" and progress.clipped:
        return f"{line}; cut at {progress.limit} instead of {sampling.max_new_tokens} tokens: the context is full"
    if progress.finish == "length":
        return f"{line}; cut at --max_new_tokens {progress.limit}"
    return line


if __name__ == "__main__":
    sys.exit(run("generate", main, sys.argv[1:]))

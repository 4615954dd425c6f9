"""`fathom quickstart`: corpus, tokenizer, pretrain, sft and chat in one go.

Every step is the verb of its name, called with the command that is printed. A step whose result is there is not run
again, and an interrupted one goes on from its last checkpoint: a second run opens the chat at once.
`OUT/quickstart.json` keeps the commands, so that results of other options are not taken for these.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from ..training.checkpoints import checkpoint_folders, staged_directory
from ..training.errors import UserError
from ..training.resumable import latest_checkpoint
from ..training.secrecy import public_command
from .arguments import parse
from .cli import run


@dataclass
class QuickstartOptions:
    """What the steps have in common; for more, call them one by one."""

    out: Path = field(default=Path("runs/quickstart"), metadata={"help": "folder for all results"})
    sources: list[str] = field(default_factory=lambda: ["stdlib"], metadata={"help": "text, as for `fathom corpus`"})
    generation: str = field(default="v3", metadata={"help": "classic, moe, v2, v3, v3.2 or v4"})
    vocab_size: int = field(default=2048, metadata={"help": "ids of the tokenizer"})
    pretrain_steps: int = field(default=1000, metadata={"help": "optimizer steps of pretraining"})
    sft_steps: int = field(default=300, metadata={"help": "optimizer steps of fine-tuning"})
    batch_size: int = field(default=8, metadata={"help": "rows of 256 tokens per pretraining step"})
    port: int = field(default=7860, metadata={"help": "port of the chat, on 127.0.0.1"})
    chat: bool = field(default=True, metadata={"help": "open the chat at the end"})


def main(argv: Sequence[str]) -> int:
    (options,) = parse("quickstart", str(__doc__), [QuickstartOptions], argv)
    record = options.out / "quickstart.json"
    done = commands_done(record)
    for verb, result, arguments in steps(options):
        command = shlex.join(["fathom", verb, *arguments])
        if result.exists():
            made_by = done.get(verb)
            if made_by is not None and made_by["sha256"] != digest(command):
                raise UserError(
                    f"{result.parent} was made by `{made_by['command']}`, not by `{command}`; choose another --out"
                )
            print(f"\n== {verb}: {result.parent} is there")
            continue
        if checkpoint_folders(result.parent):
            # Where none of them is whole, there is nothing to go on from.
            arguments = [*arguments, "--resume" if latest_checkpoint(result.parent) else "--overwrite"]
        print(f"\n== {shlex.join(['fathom', verb, *arguments])}", flush=True)
        code = import_module(f".{verb}", __package__).main(arguments)
        if code:
            return code
        # What is written tells no path and no secret; the digest tells commands apart all the same.
        done[verb] = {"command": public_command(command), "sha256": digest(command)}
        with staged_directory(options.out) as staging:
            (staging / record.name).write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    final = options.out / "sft"
    if not options.chat:
        print(f"\nnext: fathom chat {final}")
        return 0
    print(f"\n== fathom chat {final}", flush=True)
    return import_module(".chat", __package__).main(
        [str(final), "--models_dir", str(options.out), "--port", str(options.port)]
    )


def commands_done(record: Path) -> dict[str, dict[str, str]]:
    """The `command` and its `sha256` that made each result, by verb; earlier versions wrote the command alone.

    Raises:
        UserError: the file is damaged.
    """
    if not record.is_file():
        return {}
    try:
        entries = json.loads(record.read_text(encoding="utf-8")).items()
        return {
            verb: {"command": entry, "sha256": digest(entry)}
            if isinstance(entry, str)
            else {name: str(entry[name]) for name in ("command", "sha256")}
            for verb, entry in entries
        }
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{record} is damaged ({error}); remove it, or choose another --out") from error


def digest(command: str) -> str:
    return hashlib.sha256(command.encode("utf-8", "surrogateescape")).hexdigest()


def steps(options: QuickstartOptions) -> list[tuple[str, Path, list[str]]]:
    """(verb, the file that is there when it is done, its arguments) of all steps before the chat."""
    corpus, tokenizer, pretrain, sft = (options.out / name for name in ("corpus", "tokenizer", "pretrain", "sft"))
    return [
        ("corpus", corpus / "corpus.json", ["--sources", *options.sources, "--out", str(corpus)]),
        (
            "tokenizer",
            tokenizer / "tokenizer.json",
            ["--corpus", str(corpus), "--vocab_size", str(options.vocab_size), "--out", str(tokenizer)],
        ),
        (
            "pretrain",
            pretrain / "run.json",
            [
                *("--corpus", str(corpus), "--tokenizer", str(tokenizer), "--generation", options.generation),
                *("--steps", str(options.pretrain_steps), "--batch_size", str(options.batch_size)),
                *("--out", str(pretrain)),
            ],
        ),
        ("sft", sft / "run.json", ["--model", str(pretrain), "--steps", str(options.sft_steps), "--out", str(sft)]),
    ]


if __name__ == "__main__":
    sys.exit(run("quickstart", main, sys.argv[1:]))

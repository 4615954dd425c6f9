"""`fathom VERB ...`: one verb per file of this folder, imported only when it is called.

A verb module offers `main(argv) -> int`. `run` gives every verb the same manners, whichever way it is started
(`fathom VERB`, `python -m fathom.scripts.VERB`, `torchrun -m fathom.scripts.VERB`): bad input ends in one line
on stderr and exit code 2. So does everything that the machine refuses (memory, files, output): in one line and exit
code 1, a mistake of ours alone in a traceback. SIGINT, SIGTERM and SIGHUP end a verb with exit code 128 + their number,
a reader of its output that has gone with 141, as they do other programs.
"""

import atexit
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from traceback import clear_frames

from ..training.errors import DivergedError, SignalError, UserError, did_you_mean
from ..training.output import Output, watched_output
from ..training.secrecy import without_secrets
from .refusals import machine_refusal, signals_raise

VERBS = {
    "quickstart": "corpus, tokenizer, pretrain, sft and chat in one go, on this machine's own text",
    "corpus": "collect text, drop duplicates, split it, write parquet",
    "tokenizer": "train a byte-level BPE vocabulary on a corpus",
    "pretrain": "train a model from nothing on a corpus",
    "sft": "teach a pretrained model to answer questions",
    "generate": "continue one prompt, streaming to the terminal",
    "chat": "talk to a model in the browser",
    "inspect": "say what a checkpoint is, and whether it can be loaded",
    "bench": "measure speed, memory and cache beside transformers' own classes",
    "serve": "an OpenAI-compatible API for a model",
    "export": "write a model as transformers' own DeepSeek classes or DeepSeek's releases have it",
    "ablate": "small matched experiments over seeds, with a table and plots",
    "push": "upload model, tokenizer, code and a model card to the Hub",
}


RESERVE = 4_000_000  # bytes


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return f"usage: fathom VERB [options]\n\nverbs:\n{verbs}\n\n`fathom VERB --help` lists the options of a verb.\n"


def run(verb: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Calls a verb and turns its exceptions into exit codes: 0 done, 1 diverged or refused by the machine, 2 bad input.

    A signal gives 128 + its number, output that nobody reads 141.
    """
    with watched_output() as output:
        code = _run(verb, main, argv, output)
        with suppress(OSError):
            output.flush()
    if code >= 128:
        return code
    if output.lost is not None:
        # Its reader has simply had enough, or it cannot be written at all.
        if isinstance(output.lost, BrokenPipeError):
            return 141
        say(verb, f"error: cannot write to standard output: {output.lost.strerror or output.lost}")
        return code or 1
    # At the exit, for who called may go on with the group. Not after a crash, which the other processes have not seen.
    atexit.unregister(end_process_group)
    atexit.register(end_process_group)
    return code


def say(verb: str, text: str) -> None:
    """One line on stderr, without secrets that the words of the command may have brought into it."""
    with suppress(OSError, ValueError, AttributeError):  # stderr may be gone, too
        print(f"{f'fathom {verb}'.strip()}: {without_secrets(text)}", file=sys.stderr)


def _run(verb: str, main: Callable[[Sequence[str]], int], argv: Sequence[str], output: Output) -> int:
    # Let go of when memory runs out, so that there is enough to say so.
    reserve = bytearray(RESERVE)
    try:
        with signals_raise():
            return main(argv)
    except SystemExit as error:  # --help
        return error.code if isinstance(error.code, int) else 0
    except UserError as error:
        say(verb, f"error: {error}")
        return 2
    except DivergedError as error:
        say(verb, f"error: {error}")
        return 1
    except SignalError as error:
        plain = "interrupted" if error.number == signal.SIGINT else f"ended by {signal.Signals(error.number).name}"
        say(verb, error.note or plain)
        return 128 + error.number
    except KeyboardInterrupt:
        say(verb, "interrupted")
        return 130
    except Exception as error:
        del reserve
        clear_frames(error.__traceback__)
        if output.lost is not None:
            return 0
        if (refusal := machine_refusal(error)) is None:
            raise
        say(verb, f"error: {refusal}")
        return 1


def end_process_group() -> None:
    """Of a verb that torchrun has started on several processes.

    gloo's threads give back the tensors of the last collective when they come to it, and abort the process if Python
    has ended by then (pytorch issue 190489).
    """
    distributed = sys.modules.get("torch.distributed")  # most verbs need none of it
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return run("", lambda words: shown(usage()), argv)
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        return run("", lambda words: shown(f"fathom {__version__}\n"), argv)
    verb, *rest = argv
    if verb not in VERBS:
        return run("", lambda words: unknown(verb), rest)
    return run(verb, lambda words: called(verb, words), rest)


def called(verb: str, words: Sequence[str]) -> int:
    """Imports a verb, which can fail and be interrupted as the verb itself, and calls it."""
    if not sys.stderr.isatty():
        # Read when the libraries are imported: in a file or a pipe every step of a progress bar would be a line.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return import_module(f".{verb}", __package__).main(words)


def unknown(verb: str) -> int:
    raise UserError(f"unknown verb {verb!r}{did_you_mean(verb, VERBS)} (see fathom --help)")


def shown(text: str) -> int:
    print(text, end="")
    return 0


def entry_point() -> None:
    """What the command `fathom` calls."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Outside of `run` Ctrl-C ends the process without a word, as it does programs that are not written in Python.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main(sys.argv[1:]))

"""`fathom VERB ...`: one verb per file of this folder, imported only when it is called.

A verb module offers `main(argv) -> int`. `run` gives every verb the same manners, whichever way it is started
(`fathom VERB`, `python -m fathom.scripts.VERB`, `torchrun -m fathom.scripts.VERB`): bad input ends in one line
on stderr and exit code 2, training that diverges in one and exit code 1, Ctrl-C in exit code 130.
"""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..training.errors import DivergedError, UserError, did_you_mean

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


def usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items())
    return f"usage: fathom VERB [options]\n\nverbs:\n{verbs}\n\n`fathom VERB --help` lists the options of a verb.\n"


def run(verb: str, main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Calls a verb and turns its exceptions into exit codes: 0 done, 1 diverged, 2 bad input, 130 interrupted."""
    try:
        code = main(argv)
    except (UserError, DivergedError) as error:
        print(f"fathom {verb}: error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"fathom {verb}: interrupted", file=sys.stderr)
        return 130
    # At the exit, for who called may go on with the group. Not after a crash, which the other processes have not seen.
    atexit.unregister(end_process_group)
    atexit.register(end_process_group)
    return code


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
        print(usage(), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(f"fathom {__version__}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        print(f"fathom: error: unknown verb {verb!r}{did_you_mean(verb, VERBS)} (see fathom --help)", file=sys.stderr)
        return 2
    if not sys.stderr.isatty():
        # Read when the libraries are imported: in a file or a pipe every step of a progress bar would be a line.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return run(verb, import_module(f".{verb}", __package__).main, rest)


def entry_point() -> None:
    sys.exit(main(sys.argv[1:]))

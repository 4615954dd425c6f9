"""Verbs in processes that are killed at a place chosen beforehand."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

from fathom.scripts import cli

CHANGES = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")


def run_until(words: list[str], out: Path, kind: str, count: int) -> int:
    """Runs a verb in a process of its own and kills it by SIGKILL.

    Args:
        words: of the verb.
        out: its --out.
        kind: `file`: before the `count`-th time that it opens, makes, renames or removes something in or beside `out`;
            `step`: in the `count`-th backward pass.

    Returns:
        Exit code of the process: -SIGKILL, or the verb's own if it ended before.
    """
    # A server that has torch imported already, and forks: a process takes a second, not ten.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fathom.scripts.pretrain", "fathom.training.run", "fathom.modeling.modeling_fathom"]
    )
    process = context.Process(target=_run_killed, args=(words, str(out), kind, count))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _run_killed(words: list[str], out: str, kind: str, count: int) -> None:
    import torch

    torch.set_num_threads(1)
    left = count

    def one_less() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if kind == "file":
        folder, name = os.path.split(out)

        def look(event: str, arguments: tuple) -> None:
            if (
                event in CHANGES
                and isinstance(arguments[0], str)
                and arguments[0].startswith((out, f"{folder}/.{name}"))
            ):
                one_less()

        sys.addaudithook(look)
    else:
        backward = torch.Tensor.backward

        def counted(self, *args, **kwargs):
            one_less()
            return backward(self, *args, **kwargs)

        torch.Tensor.backward = counted  # type: ignore[method-assign]
    sys.exit(cli.main(words))

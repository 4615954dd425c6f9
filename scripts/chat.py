"""`fathom chat [MODEL]`: talk to a model in the browser.

fathom chat runs/sft          a checkpoint of one's own
fathom chat owner/name        one from the Hub
fathom chat random:v3         an untrained nano model, without any file
fathom chat                   the newest checkpoint below --models_dir, or else random:v3
"""

import errno
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from ..training.errors import UserError
from .arguments import parse
from .cli import run

PORTS_TO_TRY = 100
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ChatOptions:
    """Which model, and where the page is served."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint folder, Hub id, or random:v3; default: the newest in models_dir, else random:v3."
        },
    )
    models_dir: str = field(default="runs", metadata={"help": "Folder whose checkpoints the page offers."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve on; 0.0.0.0 opens it to the network."})
    port: int = field(default=7860, metadata={"help": "Port to serve on; the next free one is taken if it is in use."})
    int8: bool = field(default=False, metadata={"help": "Weights in int8: a quarter of fp32's bytes, half of bf16's."})
    mcp: bool = field(default=False, metadata={"help": "Also serve the API to MCP clients (needs fathom-lm[mcp])."})


def main(argv: Sequence[str]) -> int:
    (options,) = parse("chat", "Talk to a model in the browser.", [ChatOptions], argv, positionals=("model",))
    port = free_port(options.host, options.port)
    if options.mcp and find_spec("mcp") is None:
        raise UserError("--mcp needs a package that is not installed; run: pip install 'fathom-lm[mcp]'")

    from ..demo.app import build_app, launch
    from ..demo.shelf import Shelf

    models_dir = Path(options.models_dir)
    shelf = Shelf(models_dir, [options.model] if options.model else [], int8=options.int8)
    source = shelf.sources()[0]
    print(f"model   {source}", flush=True)
    loaded = shelf.load(source)
    total, active = loaded.parameters()
    print(f"        generation {loaded.generation}, {total:,} parameters, {active:,} active per token")

    app = build_app(shelf, feedback=models_dir / "feedback.jsonl")
    url = launch(app, options.host, port, mcp=options.mcp)
    if port != options.port:
        print(f"port    {options.port} is taken, using {port}")
    if options.host not in LOOPBACK:
        print(f"note    anyone who reaches {options.host} can use this page")
    # Not by KeyboardInterrupt, which is lost where it is raised in a destructor.
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    print(f"chat    {url}  (Ctrl-C ends it)", flush=True)
    ended.wait()
    app.close()
    return 0


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nothing listens on.

    Raises:
        UserError: `host` is no address of this machine, `first` is no port, or all ports tried are taken.
    """
    if not 1 <= first <= 65535:
        raise UserError(f"port={first} must be between 1 and 65535")
    try:
        family, kind, protocol, _, _ = socket.getaddrinfo(host, first, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host={host!r} is no address of this machine: {error.strerror}") from error
    last = min(first + PORTS_TO_TRY, 65536) - 1
    for port in range(first, last + 1):
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise UserError(f"host={host!r} cannot be served on: {error.strerror}") from error
                continue
            return port
    raise UserError(f"no port from {first} to {last} is free on {host}; choose another --port")


if __name__ == "__main__":
    sys.exit(run("chat", main, sys.argv[1:]))

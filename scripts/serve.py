"""`fathom serve [MODEL]`: an OpenAI-compatible API for a model, by transformers' own server and in shared batches.

    fathom serve runs/sft     this model
    fathom serve              whatever model a request names, loaded when it does

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "runs/sft", "messages": [{"role": "user", "content": "What does len(obj) do?"}]}'

`transformers serve` looks a model's class up in transformers itself, whatever `--trust-remote-code` says
(cli/serving/model_manager.py, `_load_model`); this verb puts Fathom's there and starts the same server, whose requests
to a model share its forwards (`serving`, `modeling/continuous_batching`). SIGINT and SIGTERM end it within seconds
(`serving/server`).
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..training.errors import UserError
from .arguments import parse
from .chat import free_port
from .cli import run


@dataclass
class ServeOptions:
    """Which model, and where the API is served."""

    model: str | None = field(
        default=None, metadata={"help": "Checkpoint folder or Hub id; default: what requests name."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to serve on; 0.0.0.0 opens it to the network."})
    port: int = field(default=8000, metadata={"help": "Port to serve on; the next free one is taken if it is in use."})
    max_rows: int = field(default=8, metadata={"help": "Most requests that a model answers at a time; others wait."})
    max_cached_tokens: int = field(
        default=65536, metadata={"help": "Most tokens of the cache in all rows, with the padding of shorter ones."}
    )
    max_waiting: int = field(
        default=64, metadata={"help": "Most requests that wait beside those; further ones are answered with 429."}
    )
    max_body: int = field(
        default=2**22, metadata={"help": "Most bytes of a request; larger ones are answered with 413."}
    )

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_cached_tokens", "max_waiting", "max_body"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1")


def main(argv: Sequence[str]) -> int:
    """Serves until a signal comes, and then ends the process itself."""
    (options,) = parse("serve", "Serve a model as an API.", [ServeOptions], argv, positionals=("model",))
    port = free_port(options.host, options.port)

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UserError("serving needs packages that are not installed; run: pip install 'fathom-lm[serve]'")

    from transformers.cli.serving import model_manager

    from ..modeling.modeling_fathom import FathomForCausalLM
    from ..training.checkpoint_check import whole_model
    from ..training.checkpoint_files import MODEL_TYPE
    from ..training.loading import load_tokenizer
    from .serving import build_service
    from .serving.server import GRACE, Server

    if options.model is not None:
        load_tokenizer(options.model)
        if Path(options.model).is_dir():
            whole_model(Path(options.model), model_types=(MODEL_TYPE,), read_values=True)
    model_manager.transformers.FathomForCausalLM = FathomForCausalLM
    if port != options.port:
        print(f"port    {options.port} is taken, using {port}")
    print(f"serve   http://{options.host}:{port}/v1  (Ctrl-C ends it)", flush=True)
    limits = {name: getattr(options, name) for name in ("max_rows", "max_cached_tokens", "max_waiting")}
    service = build_service(options.model, limits, options.max_body)
    with suppress(KeyboardInterrupt):
        Server(service, options.host, port).run()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the end is a matter of seconds from here on
    service.close(GRACE)
    sys.stdout.flush()
    sys.stderr.flush()
    # Python's own end takes seconds more, and aborts where a thread is still in native code.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(run("serve", main, sys.argv[1:]))

"""How long the kernels of routed experts take, by number of tokens: the table that `modeling/experts.py` chooses by.

    python -m fathom.training.benchmark.experts --size nano --dtype bf16

Processor time of one thread, which other work on the machine changes least: the shortest of several runs, of the
forward pass alone and with the backward pass.
"""

import argparse
import time
from collections.abc import Callable
from unittest import mock

import torch

from ...modeling import experts as kernels
from ...modeling.configuration_fathom import FathomConfig

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Every chosen expert of every token is a copy of that expert's weights.
MOST_TOKENS = {"batched_mm": 16}


def shortest(run: Callable[[], object], seconds: float = 0.2) -> float:
    """Milliseconds of the shortest of two runs, or of as many as there is time for."""
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < seconds:
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return 1e3 * min(times)


def measure(size: str, dtype: torch.dtype, tokens: int) -> dict[str, tuple[float, float]]:
    """Milliseconds forward, and forward and backward, by kernel."""
    config = FathomConfig.preset("v3", size)
    module = kernels.RoutedExperts(config).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=config.initializer_range)
    chosen = [torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in range(tokens)]
    indices, weights = torch.stack(chosen), torch.rand(tokens, config.num_experts_per_tok, dtype=dtype)
    hidden = torch.randn(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    learning = [hidden, *module.parameters()]
    found = {}
    for name in ("sorted_mm", "grouped_mm", "eager", "batched_mm"):
        if tokens > MOST_TOKENS.get(name, tokens):
            continue
        module.config._experts_implementation = name
        # Sorted products themselves, whatever the table says.
        with mock.patch.object(kernels, "GROUPED_ROWS", 0):
            with torch.no_grad():
                forward = shortest(lambda: module(hidden, indices, weights))
            both = shortest(lambda: torch.autograd.grad(module(hidden, indices, weights).sum(), learning))
        found[name] = forward, both
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="nano", help="nano, micro or small")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for tokens in options.tokens:
        found = measure(options.size, DTYPES[options.dtype], tokens)
        each = (f"{name} {forward:.2f} / {both:.2f} ms" for name, (forward, both) in found.items())
        print(f"{tokens} tokens:", ", ".join(each), flush=True)


if __name__ == "__main__":
    main()

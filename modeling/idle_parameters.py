"""Parameters that a loss does not reach still take part in the backward pass, without a gradient.

DistributedDataParallel waits in every step for all trainable parameters, unless it searches the graph for those that
are missing. A trainer that runs the layers alone and computes its own loss (TRL's) reaches neither the MTP layers nor
the indexers, and the next step ends in "Expected to have finished reduction in the prior iteration".

    output = take_part(output, idle)     the output itself, whose backward pass also visits the idle parameters

A parameter that the loss reaches on another path gets that gradient, as if this were not here.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


class _TakePart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: torch.Tensor, *idle: torch.Tensor) -> torch.Tensor:
        ctx.idle = len(idle)
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        return (gradient, *[None] * ctx.idle)


def take_part(output: torch.Tensor, idle: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Ties parameters to an output, so that a backward pass through it tells DistributedDataParallel of them.

    Args:
        output: any tensor that the loss is computed from.
        idle: parameters that may get no gradient; frozen and sharded ones (FSDP waits for none) are left out.

    Returns:
        `output` with the same values; `output` itself without a process group or without gradient.
    """
    # Also in one process: started by torchrun, its model is wrapped all the same.
    if not (output.requires_grad and dist.is_available() and dist.is_initialized()):
        return output
    waiting = [parameter for parameter in idle if parameter.requires_grad and not isinstance(parameter, DTensor)]
    return _TakePart.apply(output, *waiting) if waiting else output

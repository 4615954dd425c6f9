"""Muon, with AdamW for what is no matrix: DeepSeek-V4's optimizer (its report, section 2.4, algorithm 1).

    M <- mu M + G,   O = NS(mu M + G),   W <- (1 - eta lambda) W - eta 0.18 sqrt(max(n, m)) O

NS drives all singular values of a matrix [n, m] to 1 (Newton-Schulz, `X <- a X + b (X X^T) X + c (X X^T)^2 X`),
in the hybrid form of the report: eight steps that grow small values fast and leave them near 1, two that settle them on
it. An orthogonal matrix has entries of root mean square 1 / sqrt(max(n, m)), so every update has 0.18, like a typical
update of AdamW, and one learning rate serves both (Moonlight, arXiv 2502.16982, section 2.2).

A matrix is what the model multiplies by: every expert's own, gate and up apart, though they are stored as one parameter
[E, 2 I, d]. Matrices of one shape run as a batch. Embedding, head, norms, biases, sinks and the connections' base and
scale are left to AdamW.

Sharded (`DTensor`, by FSDP2 or transformers' parallel plans): a parameter that is cut between matrices is updated where
it lies, any other is gathered for the iteration, by all ranks alike.

Shapes: B matrices of one shape, n rows, m columns.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# (a, b, c) of the iteration, from the report: eight times the first, twice the second.
GROW, SETTLE = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (GROW,) * 8 + (SETTLE,) * 2
UPDATE_RMS = 0.18


def newton_schulz(matrices: torch.Tensor, coefficients: Iterable[tuple[float, float, float]] = COEFFICIENTS):
    """The orthogonal factor U V^T of matrices [..., n, m] = U S V^T, to about 1e-3 where S is not tiny."""
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-20)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrices else x.mT


class Muon(Optimizer):
    """Muon for matrices, AdamW for all else, as one optimizer.

    Args:
        params: groups of parameters, as `muon_groups` makes them. In a group with `muon`, `parts` says how many
            matrices stand above each other in every one of its parameters.
        lr: learning rate of both.
        momentum: of Muon. betas, eps: of AdamW. weight_decay: of both.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
    ):
        rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, {**rates, "muon": False, "parts": 1})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._step_muon if group["muon"] else self._step_adamw)(parameters, group)
        return loss

    def _step_muon(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[tuple, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
            ahead = whole_matrices(parameter.grad.add(momentum, alpha=group["momentum"]))
            matrices = ahead.unflatten(-2, (group["parts"], -1)).flatten(0, -3)  # [B, n, m]
            by_shape[matrices.shape[-2:]].append((parameter, matrices))
        for (rows, columns), pairs in by_shape.items():
            updates = newton_schulz(torch.cat([matrices for _, matrices in pairs]))
            updates = updates * (UPDATE_RMS * max(rows, columns) ** 0.5)
            for (parameter, _), update in zip(pairs, updates.split([len(m) for _, m in pairs]), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(sharded_like(parameter, update), alpha=-group["lr"])

    def _step_adamw(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(
                    step=torch.zeros((), dtype=torch.float32),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def whole_matrices(tensor: torch.Tensor) -> torch.Tensor:
    """The matrices of `tensor` [..., n, m] that this rank computes with, each of them complete."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if _cut_between_matrices(tensor) else tensor.full_tensor()


def sharded_like(parameter: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    """The reverse of `whole_matrices` for an update [B, n, m]: shaped and sharded as `parameter`."""
    if not isinstance(parameter, DTensor):
        return update.view(parameter.shape)
    if _cut_between_matrices(parameter):
        local = update.view(parameter.to_local().shape)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    whole = DTensor.from_local(
        update.view(parameter.shape), parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    )
    return whole.redistribute(placements=parameter.placements)


def _cut_between_matrices(tensor: DTensor) -> bool:
    """Whether no matrix of [..., n, m] lies on several ranks."""
    return all(
        isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim < tensor.dim() - 2)
        for placement in tensor.placements
    )


class MuonFactory:
    """What a Trainer makes `Muon` by, once its model is wrapped or sharded:

    Trainer(..., optimizer_cls_and_kwargs=(MuonFactory, {"lr": 2e-3, "weight_decay": 0.1}))
    """

    def __call__(self, model: nn.Module, weight_decay: float, **rates) -> Muon:
        return Muon(muon_groups(model, weight_decay), **rates)


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sorts a model's trainable parameters into groups for `Muon`.

    Matrices of the layers go to Muon, whether 2-D or the experts' [E, n, m]; those of experts and
    hyper-connections included. Embedding, head and everything with fewer dimensions go to AdamW, the latter
    without weight decay.
    """
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    of_ends = {id(end.weight) for end in ends if end is not None}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in named if parameter.dim() > 1 and id(parameter) not in of_ends]
    groups = [
        {"params": [parameter for name, parameter in matrices if ("gate_up_proj" in name) == (parts == 2)],
         "muon": True, "parts": parts, "weight_decay": weight_decay}
        for parts in (1, 2)
    ] + [
        {"params": [parameter for _, parameter in named if id(parameter) in of_ends], "weight_decay": weight_decay},
        {"params": [parameter for _, parameter in named if parameter.dim() < 2], "weight_decay": 0.0},
    ]  # fmt: skip
    return [group for group in groups if group["params"]]

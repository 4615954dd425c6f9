"""`RouterBiasCallback`: auxiliary-loss-free load balancing (arXiv 2408.15664) under any of transformers' trainers.

    Trainer(..., callbacks=[RouterBiasCallback()])     transformers' own, and TRL's SFT, DPO, KTO, GRPO, RLOO trainers

Every forward in training mode counts the tokens of each expert; after an optimizer step the bias of an expert with
more than the mean falls, that of one with fewer rises. Where no bias can move, one warning says why.
"""

import warnings

import torch
from transformers import TrainerCallback

from ..modeling.experts import TopKRouter
from .diagnostics import load_ratio


class RouterBiasCallback(TrainerCallback):
    """Moves the routing biases once per optimizer step, whatever the gradient accumulation.

    Args:
        warn: warn once where no routing bias can move.
    """

    def __init__(self, warn: bool = True) -> None:
        self.warn = warn
        self.reset()

    def reset(self) -> None:
        """Begins the sums for the log anew."""
        self.load: torch.Tensor | None = None  # [routers, E]
        self.max_vio: torch.Tensor | float = 0.0  # mean over routers, summed over optimizer steps
        self.steps = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if (reason := why_biases_rest(model)) is not None:
            self.say(reason)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        load = model.update_router_bias() if hasattr(model, "update_router_bias") else None
        if load is None:
            return
        if not load.any():
            self.say("no forward in training mode counted the tokens of its experts in this step")
        self.load = load if self.load is None else self.load + load
        self.max_vio = self.max_vio + load_ratio(load).mean() - 1
        self.steps += 1

    def say(self, reason: str) -> None:
        """Warns, once, that the biases rest."""
        if self.warn:
            warnings.warn(f"RouterBiasCallback moves no routing bias: {reason}", stacklevel=2)
            self.warn = False


def why_biases_rest(model) -> str | None:
    """Why no routing bias of a model can move, or None if one can."""
    if not hasattr(model, "update_router_bias"):
        return f"{type(model).__name__} is no Fathom model"
    with_bias = [
        router
        for router in model.routers()
        if isinstance(router, TopKRouter) and router.e_score_correction_bias is not None
    ]
    if not with_bias:
        config = model.config
        return f"its {config.generation} model has none (topk_method={config.topk_method!r})"
    if not any(router.weight.requires_grad for router in with_bias):
        return "all its routers are frozen, as beside adapters of other layers"
    if not model.config.router_bias_update_speed:
        return "router_bias_update_speed is 0"
    return None

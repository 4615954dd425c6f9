"""Stages of pre-training a model with indexers (DeepSeek-V3.2, arXiv 2512.02556, section 2.1.1; V4, section 4.2.2).

    dense     attention to everything; the whole model learns, the indexers to foretell its attention
    warmup    attention to everything; the indexers alone learn, all else is frozen
    sparse    attention to what the indexers select; the whole model learns. The stage of every other model

A V3 model becomes a V3.2 model by indexers that it has not yet: `--init V3 --generation v3.2 --stage warmup`, and then
`--init` of that with `--stage sparse`.
"""

from pathlib import Path
from typing import Any

from ..modeling.configuration_fathom import FathomConfig
from ..modeling.indexing import TrainableIndexer
from ..modeling.modeling_fathom import FathomForCausalLM
from ..modeling.presets import GENERATIONS
from .errors import UserError
from .loading import load_model

STAGES = ("sparse", "dense", "warmup")


def stage_fields(stage: str) -> dict[str, Any]:
    """Fields of FathomConfig that a stage sets."""
    return {"index_dense": stage != "sparse"}


def enter_stage(model: FathomForCausalLM, stage: str) -> None:
    """Freezes what does not learn in a stage.

    Raises:
        UserError: a stage for indexers, and the model has none that learn.
    """
    if stage == "sparse":
        return
    if not model.learns_to_select:
        raise UserError(
            f"--stage {stage} trains indexers, and this {model.config.generation} model has none that learn; "
            f"use --generation v3.2 or v4, with an indexer_loss_coef above 0"
        )
    if stage == "warmup":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, TrainableIndexer):
                module.requires_grad_(True)


def converted_fields(config: FathomConfig, generation: str) -> dict[str, Any]:
    """The fields that change when a model of `config` becomes one of another generation.

    Raises:
        UserError: nothing leads from one to the other; V3 to V3.2 alone adds to a model without changing it.
    """
    if generation == config.generation:
        return {}
    if (config.generation, generation) != ("v3", "v3.2"):
        raise UserError(
            f"--init is a {config.generation} model and cannot become {generation}: only v3 becomes v3.2, by adding "
            f"indexers; leave out --generation to keep what it is"
        )
    if config.q_lora_rank is None:
        raise UserError("--init has uncompressed queries (q_lora_rank null), from which no indexer can select")
    kinds = config.token_mixers
    mixers = "dsa" if isinstance(kinds, str) else ["dsa" if kind == "mla" else kind for kind in kinds or []]
    indexer = {name: value for name, value in GENERATIONS["v3.2"](config.hidden_size).items() if "index_" in name}
    return {"generation": generation, "token_mixers": mixers, **indexer}


def initial_model(folder: str | Path, changes: dict[str, Any]) -> FathomForCausalLM:
    """The model in `folder` with some fields of its config changed; new indexers start at random.

    Raises:
        UserError: the folder holds no whole checkpoint, or the weights do not fit the changed config.
    """
    return load_model(str(folder), dtype="float32", changes=changes, may_begin=r"\.indexer\.").train()

"""Small matched runs over seeds: trains and measures one variant of a model at a time, and compares the results.

What is compared stands in `experiments`. A run is a variant and a seed; all runs of a study see the same text, in the
same order for the same seed. Its result is one JSON file, written when the run is done and never made twice, so that
an interrupted study goes on where it was.

A difference of two means counts as shown where it is larger than twice its standard deviation over the seeds,
2 sqrt(s_a^2 / n_a + s_b^2 / n_b). The runs are taken for independent: a caution, as equal seeds share the order of the
text. With three seeds the s are themselves rough, so a difference just above the limit is weak evidence.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..modeling.cache_size import cache_bytes_per_token
from ..modeling.configuration_fathom import FathomConfig
from ..modeling.modeling_fathom import FathomForCausalLM
from .checkpoints import staged_directory
from .diagnostics import StreamProbe
from .errors import UserError
from .optimizers import MuonFactory
from .packing import IGNORED, collate_rows
from .trainer import FathomTrainer

SEQUENCE_LENGTH, BATCH_ROWS = 128, 8
HELDOUT_ROWS, EVALUATION_ROWS = 256, 32  # in all, and at a time
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.1


@dataclass(frozen=True)
class Study:
    """What all runs have in common.

    Args:
        train, heldout: rows of `SEQUENCE_LENGTH` tokens. Of the held-out ones `HELDOUT_ROWS`, evenly spaced, are used.
        token_bytes: UTF-8 bytes of each id.
        ids: `vocab_size` and the special ids, as fields of FathomConfig.
        steps: optimizer steps of a run.
        corpus: what identifies the text, for the record.
        origin: `command`, `commit` and the like; kept with every run, and not compared.
    """

    train: Dataset
    heldout: Dataset
    token_bytes: list[int]
    ids: dict[str, Any]
    steps: int
    corpus: str
    origin: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One model and how it is trained.

    Args:
        config: fields of FathomConfig, on top of the generation's nano preset.
        optimizer: `adamw` or `muon`.
        prepare: changes the new model before it is trained.
        afterwards: further training and its figures.
    """

    config: dict[str, Any]
    optimizer: str = "adamw"
    learning_rate: float = LEARNING_RATE
    prepare: Callable[[FathomForCausalLM], None] | None = None
    afterwards: Callable[[FathomForCausalLM, Study, int], dict[str, float]] | None = None


class Spread(NamedTuple):
    """A figure over the seeds."""

    mean: float
    deviation: float  # standard deviation, nan for one run
    runs: int


def run_file(folder: Path, name: str, seed: int) -> Path:
    """Where the result of a run is."""
    return folder / f"{name}-{seed}.json"


def read_result(folder: Path, name: str, seed: int, setup: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The result of a run, or None where it is missing.

    Raises:
        UserError: it is one of another `setup`.
    """
    file = run_file(folder, name, seed)
    if not file.is_file():
        return None
    result = json.loads(file.read_text(encoding="utf-8"))
    if setup is not None and result["setup"] != setup:
        differing = [key for key in setup if result["setup"].get(key) != setup[key]]
        raise UserError(f"{file} was run with another {', '.join(differing)}; choose another --output, or remove it")
    return result


def setup_of(variant: Variant, study: Study) -> dict[str, Any]:
    """All that decides the result of a run besides seed and code."""
    return {
        "config": variant.config,
        "optimizer": variant.optimizer,
        "learning_rate": variant.learning_rate,
        "steps": study.steps,
        "tokens_per_step": BATCH_ROWS * SEQUENCE_LENGTH,
        "corpus": study.corpus,
        "vocab_size": study.ids["vocab_size"],
    }


def run(name: str, variant: Variant, seed: int, study: Study, folder: Path) -> dict[str, Any]:
    """Trains and measures a variant with a seed, or reads what `folder` has of it.

    Raises:
        UserError: the folder holds the run, but of another setup.
        KeyboardInterrupt: a signal ended it; nothing is written.
    """
    setup = setup_of(variant, study)
    found = read_result(folder, name, seed, setup)
    if found is not None:
        return found
    started = time.perf_counter()
    set_seed(seed)
    model = FathomForCausalLM(FathomConfig.preset("v3", **study.ids, **variant.config))
    if variant.prepare is not None:
        variant.prepare(model)
    figures, curve = train_and_measure(model, study, seed, variant.learning_rate, variant.optimizer)
    if variant.afterwards is not None:
        figures |= variant.afterwards(model, study, seed)
    result = {
        "variant": name,
        "seed": seed,
        "setup": setup,
        "origin": {
            **study.origin,
            "torch": torch.__version__,
            "device": model.device.type,
            "threads": str(torch.get_num_threads()),
        },
        "seconds": round(time.perf_counter() - started, 1),
        "figures": figures,
        "training_loss": curve,
    }
    with staged_directory(folder) as staging:
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items())
        (staging / run_file(folder, name, seed).name).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    return result


def train_and_measure(
    model: FathomForCausalLM,
    study: Study,
    seed: int,
    learning_rate: float = LEARNING_RATE,
    optimizer: str = "adamw",
    steps: int | None = None,
) -> tuple[dict[str, Any], list[tuple[int, float]]]:
    """Trains a model in place, for no steps if `steps` is 0.

    Returns:
        Its figures on the held-out rows, and (step, training loss) from time to time.
    """
    steps = study.steps if steps is None else steps
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=max(steps, 1),
            per_device_train_batch_size=BATCH_ROWS,
            per_device_eval_batch_size=EVALUATION_ROWS,
            learning_rate=learning_rate,
            lr_scheduler_type="warmup_stable_decay",
            lr_scheduler_kwargs={"num_decay_steps": max(int(0.4 * steps), 1), "min_lr_ratio": 0.1},
            warmup_steps=min(20, steps // 4),
            weight_decay=WEIGHT_DECAY,
            adam_beta2=0.95,
            logging_steps=max(steps // 20, 1),
            save_strategy="no",
            seed=seed,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rates = {"lr": learning_rate, "weight_decay": WEIGHT_DECAY}
        trainer = FathomTrainer(
            model=model,
            args=arguments,
            train_dataset=study.train,
            data_collator=collate_rows,
            token_bytes=study.token_bytes,
            optimizer_cls_and_kwargs=(MuonFactory, rates) if optimizer == "muon" else None,
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        if steps:
            trainer.train()
        if trainer.interrupted:
            raise KeyboardInterrupt
        heldout = evenly_spaced(study.heldout, HELDOUT_ROWS)
        figures = measure(trainer, heldout)
    logs = trainer.state.log_history
    if last := [entry["max_vio_batch"] for entry in logs if "max_vio_batch" in entry][-5:]:
        figures["max_vio_batch"] = statistics.mean(last)
    return figures, [(entry["step"], round(entry["loss"], 4)) for entry in logs if "loss" in entry]


def evenly_spaced(rows: Dataset, count: int) -> Dataset:
    """`count` rows from the whole of a data set, or all if it has fewer."""
    count = min(count, len(rows))
    return rows.select([index * len(rows) // count for index in range(count)])


def measure(trainer: FathomTrainer, heldout: Dataset) -> dict[str, Any]:
    """All figures that a model has, on held-out rows."""
    model = trainer.model
    evaluation = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(heldout).items()}
    kept = ("bits_per_byte", "amax_", "off_diagonal_mass", "stream_similarity", "indexer_")
    figures: dict[str, Any] = {name: value for name, value in evaluation.items() if name.startswith(kept)}
    for figure, combine in (("max_vio", statistics.mean), ("dead_experts", sum)):
        if by_layer := [value for name, value in evaluation.items() if name.startswith(f"{figure}_layer_")]:
            figures[figure] = combine(by_layer)
    counts = model.parameter_counts()
    figures["parameters_total"], figures["parameters_active"] = counts["total"], counts["active"]
    figures["cache_bytes_per_token"] = cache_bytes_per_token(model.config)
    rows = collate_rows(list(heldout.select(range(min(EVALUATION_ROWS, len(heldout))))))
    batch = {name: values.to(model.device) for name, values in rows.items()}
    if model.config.num_nextn_predict_layers:
        figures["draft_acceptance"] = draft_acceptance(model, batch)
    if model.config.hc_mult > 1:
        figures["gain_by_depth"] = gain_by_depth(model, batch)
    return figures


@torch.no_grad()
def draft_acceptance(model: FathomForCausalLM, batch: dict[str, torch.Tensor]) -> float:
    """How often the MTP layer's best guess of the token after next is the model's own, once it has read the next."""
    model.eval()
    ids, positions = batch["input_ids"], batch["position_ids"]
    outputs = model.model(input_ids=ids, position_ids=positions, use_cache=False)
    embeds = model.model.embed_tokens(ids)
    drafts = model.drafts(outputs.final_states, embeds, None, positions, batch["labels"], input_ids=ids)
    draft, targets = next(drafts)
    guesses = model.lm_head(draft.hidden_states).argmax(dim=-1)
    own = model.lm_head(outputs.last_hidden_state).argmax(dim=-1).roll(-1, dims=1)
    return (guesses == own)[targets != IGNORED].float().mean().item()


@torch.no_grad()
def gain_by_depth(model: FathomForCausalLM, batch: dict[str, torch.Tensor]) -> list[tuple[float, float]]:
    """Amax gain (forward, backward) of the residual streams from the first sub-layer to each."""
    with StreamProbe(model.eval()) as probe:
        model.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return probe.gains()


def spread(results: list[dict[str, Any]], figure: str) -> Spread | None:
    """A figure of some runs, None if none has it."""
    values = [result["figures"][figure] for result in results if figure in result["figures"]]
    if not values:
        return None
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))


def verdict(smaller: Spread, larger: Spread) -> str:
    """Whether one figure is smaller than another: `shown`, `reversed`, `open`, or `unknown` for a single run."""
    difference = larger.mean - smaller.mean
    limit = 2 * math.sqrt(smaller.deviation**2 / smaller.runs + larger.deviation**2 / larger.runs)
    if math.isnan(limit):
        return "unknown"
    if abs(difference) <= limit:
        return "open"
    return "shown" if difference > 0 else "reversed"

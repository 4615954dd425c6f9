"""Small matched experiments over seeds: which of DeepSeek's findings show at a size that a CPU can train.

An experiment compares variants of one small model on one corpus: same tokens, same order of rows per seed, same
learning rate unless that is the question, and the same number of active parameters (`matched`). Each run is one JSON
file, written when the run is done; a run that is there is not repeated, so that an interrupted study goes on.

A difference counts as shown where it is larger than two standard deviations of the difference of two means over the
seeds, 2 sqrt(s_a^2 / n_a + s_b^2 / n_b).
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..modeling.cache_size import cache_bytes_per_token
from ..modeling.configuration_fathom import FathomConfig
from ..modeling.experts import MixtureOfExperts
from ..modeling.modeling_fathom import FathomForCausalLM
from .checkpoints import staged_directory
from .optimizers import MuonFactory
from .packing import collate_rows
from .trainer import FathomTrainer

# DeepSeek-V3 in small: 4 layers of width 128, 16 experts of which 4 are chosen, one shared.
BASE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "intermediate_size": 320,
    "moe_intermediate_size": 64,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 512,
}
LEARNING_RATE, BATCH_ROWS, SEQUENCE_LENGTH = 3e-3, 8, 256


@dataclass(frozen=True)
class Variant:
    """One column of an experiment: fields of FathomConfig, and how it is trained."""

    config: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    learning_rate: float = LEARNING_RATE


@dataclass(frozen=True)
class Experiment:
    """A question, the published finding, and the variants that answer it; the last one is what DeepSeek chose."""

    question: str
    finding: str
    variants: dict[str, Variant]
    figures: tuple[str, ...] = ("bits_per_byte",)
    measure: Callable[[FathomTrainer, Dataset], dict[str, float]] | None = None


def without_shared_expert(trainer: FathomTrainer, heldout: Dataset) -> dict[str, float]:
    """Held-out loss with the shared expert switched off and one more routed expert chosen in its place."""
    mixtures = [module for module in trainer.model.modules() if isinstance(module, MixtureOfExperts)]
    shared = [mixture.shared_experts for mixture in mixtures]
    if not mixtures or shared[0] is None:
        return {}
    for mixture in mixtures:
        mixture.shared_experts = None
        mixture.gate.top_k += 1
    bits = trainer.evaluate(heldout)["eval_bits_per_byte"]
    for mixture, expert in zip(mixtures, shared, strict=True):
        mixture.shared_experts = expert
        mixture.gate.top_k -= 1
    return {"without_shared_bits_per_byte": bits}


@torch.no_grad()
def draft_acceptance(trainer: FathomTrainer, heldout: Dataset) -> dict[str, float]:
    """How often the MTP layer's best guess of the token after next is the model's own, along held-out text."""
    model = trainer.model.eval()
    if not model.config.num_nextn_predict_layers:
        return {}
    batch = collate_rows(list(heldout.select(range(min(16, len(heldout))))))
    ids, positions = batch["input_ids"], batch["position_ids"]
    hidden = model.model(input_ids=ids, position_ids=positions, use_cache=False)
    shared = model.model.layer_inputs(model.model.embed_tokens(ids), None, positions, None)
    shared.pop("position_ids")
    ahead = model.model.embed_tokens(ids.roll(-1, dims=1))
    draft = model.model.mtp_layers[0](hidden.final_states, ahead, input_ids=ids.roll(-1, dims=1), **shared)
    guesses = model.lm_head(draft.hidden_states).argmax(dim=-1)[:, :-1]
    own = model.lm_head(hidden.last_hidden_state).argmax(dim=-1)[:, 1:]
    return {"draft_acceptance": (guesses == own)[:, :-1].float().mean().item()}


def _attention(kind: str, key_heads: int | None = None) -> Variant:
    if kind == "mla":
        return Variant()
    return Variant({"token_mixers": "mha", "head_dim": 32, "num_key_value_heads": key_heads})


EXPERIMENTS: dict[str, Experiment] = {
    "balance": Experiment(
        "Does a routing bias balance experts at less cost in loss than an auxiliary loss?",
        "Bias: lower loss and MaxVio than an auxiliary loss (arXiv 2408.15664, table 2; V3 section 4.5.2).",
        {
            "none": Variant({"router_bias_update_speed": 0.0, "seq_aux_loss_coef": 0.0}),
            **{
                f"loss {alpha:g}": Variant(
                    {
                        "router_bias_update_speed": 0.0,
                        "seq_aux_loss_coef": 0.0,
                        "aux_loss_alpha": alpha,
                        "seq_aux": False,
                    }
                )
                for alpha in (1e-3, 1e-2, 1e-1)
            },
            "bias": Variant({"seq_aux_loss_coef": 0.0}),
        },
        ("bits_per_byte", "max_vio", "dead_experts"),
    ),
    "experts": Experiment(
        "Are many small experts better than few large ones, and one of them shared better than none?",
        "Finer experts and a shared one lower the loss; a model without its shared expert is lost (arXiv 2401.06066, "
        "figure 3 and section 4.5).",
        {
            "4 x 4w, top 1": Variant(
                {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 320, "n_shared_experts": 0}
            ),
            "16 x w, top 5": Variant({"num_experts_per_tok": 5, "n_shared_experts": 0}),
            "16 x w, top 4 + shared": Variant(),
        },
        ("bits_per_byte", "without_shared_bits_per_byte", "max_vio"),
        without_shared_expert,
    ),
    "attention": Experiment(
        "What does a smaller cache cost?",
        "MLA is as good as MHA or better, GQA and MQA are worse (DeepSeek-V2, arXiv 2405.04434, tables 8 and 9).",
        {
            "MHA": _attention("mha", 4),
            "GQA": _attention("mha", 2),
            "MQA": _attention("mha", 1),
            "MLA": _attention("mla"),
        },
        ("bits_per_byte", "cache_bytes_per_token"),
    ),
    "residual": Experiment(
        "Do constrained hyper-connections keep signals in bounds, and do they help?",
        "Amax gain stays below 1.6 with mHC and reaches 3000 with HC; loss mHC < HC < plain at 27B (arXiv 2512.24880, "
        "section 5).",
        {
            "plain": Variant({"num_hidden_layers": 8}),
            "HC": Variant({"num_hidden_layers": 8, "hc_mult": 4, "hc_sinkhorn_iters": 0}),
            "mHC": Variant({"num_hidden_layers": 8, "hc_mult": 4}),
        },
        ("bits_per_byte", "amax_gain_forward", "amax_gain_backward", "off_diagonal_mass", "stream_similarity"),
    ),
    "optimizer": Experiment(
        "Does Muon need fewer tokens than AdamW?",
        "Muon reaches the same loss with about half the compute (Moonlight, arXiv 2502.16982); DeepSeek-V4 uses it.",
        {
            **{f"AdamW {rate:g}": Variant(learning_rate=rate) for rate in (3e-3, 6e-3)},
            **{f"Muon {rate:g}": Variant(learning_rate=rate, optimizer="muon") for rate in (6e-3, 3e-3)},
        },
    ),
    "drafting": Experiment(
        "Does a multi-token-prediction layer cost the next token anything, and are its drafts accepted?",
        "The main loss is unchanged; the second token is accepted 85 to 90 % of the time (V3 sections 4.5.1 and 5.4.3).",
        {"no MTP": Variant(), "MTP": Variant({"num_nextn_predict_layers": 1})},
        ("bits_per_byte", "draft_acceptance"),
        draft_acceptance,
    ),
}


def matched(config: dict[str, Any], base_active: int, vocab_size: int) -> FathomConfig:
    """A variant with as many active parameters as the base, by the width of its experts."""

    def active(values: dict[str, Any]) -> int:
        with torch.device("meta"):
            return FathomForCausalLM(FathomConfig.preset("v3", vocab_size=vocab_size, **values)).parameter_counts()[
                "active"
            ]

    values = {**BASE, **config}
    width = values["moe_intermediate_size"]
    slope = (active({**values, "moe_intermediate_size": width + 8}) - active(values)) / 8
    width = max(8, round((width + (base_active - active(values)) / slope) / 8) * 8)
    return FathomConfig.preset("v3", vocab_size=vocab_size, **{**values, "moe_intermediate_size": width})


def run_one(
    variant: Variant, experiment: Experiment, seed: int, data: dict[str, Dataset], steps: int, config, token_bytes
) -> dict[str, Any]:
    """Trains and evaluates one variant with one seed."""
    set_seed(seed)
    started = time.perf_counter()
    model = FathomForCausalLM(config)
    arguments = TrainingArguments(
        output_dir="unused",
        max_steps=steps,
        per_device_train_batch_size=BATCH_ROWS,
        per_device_eval_batch_size=16,
        learning_rate=variant.learning_rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(int(0.4 * steps), 1), "min_lr_ratio": 0.1},
        warmup_steps=min(20, steps // 4),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=max(steps // 20, 1),
        save_strategy="no",
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = FathomTrainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        data_collator=collate_rows,
        token_bytes=token_bytes,
        optimizer_cls_and_kwargs=(MuonFactory, {"lr": variant.learning_rate, "weight_decay": 0.1})
        if variant.optimizer == "muon"
        else None,
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.train()
    if trainer.interrupted:
        raise KeyboardInterrupt
    evaluation = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(data["heldout"]).items()}
    by_layer = [value for name, value in evaluation.items() if name.startswith("max_vio_layer")]
    dead = [value for name, value in evaluation.items() if name.startswith("dead_experts_layer")]
    if by_layer:
        evaluation |= {"max_vio": statistics.mean(by_layer), "dead_experts": sum(dead)}
    if experiment.measure is not None:
        evaluation |= experiment.measure(trainer, data["heldout"])
    counts = model.parameter_counts()
    return {
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH_ROWS * SEQUENCE_LENGTH,
        "parameters_total": counts["total"],
        "parameters_active": counts["active"],
        "cache_bytes_per_token": cache_bytes_per_token(config),
        **evaluation,
        "training_loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds": time.perf_counter() - started,
    }


def summary(runs: dict[str, list[dict[str, Any]]], figure: str) -> dict[str, tuple[float, float, int]]:
    """Mean, standard deviation over seeds and number of runs of a figure, by variant; variants without it are left out."""
    found = {name: [run[figure] for run in of_variant if figure in run] for name, of_variant in runs.items()}
    return {
        name: (statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan, len(values))
        for name, values in found.items()
        if values
    }


def shown(ours: tuple[float, float, int], theirs: tuple[float, float, int]) -> bool:
    """Whether two means differ by more than two standard deviations of their difference."""
    return abs(ours[0] - theirs[0]) > 2 * math.sqrt(ours[1] ** 2 / ours[2] + theirs[1] ** 2 / theirs[2])


def run_experiment(
    name: str,
    folder: Path,
    data: dict[str, Dataset],
    token_bytes: list[int],
    vocab_size: int,
    seeds: int,
    steps: int,
    say: Callable[[str], None] = print,
) -> dict[str, list[dict[str, Any]]]:
    """All runs of an experiment, by variant; those that `folder` holds already are read.

    Args:
        folder: gets `{variant}-{seed}.json` per run.
        data: rows of SEQUENCE_LENGTH tokens, `train` and `heldout`.
    """
    experiment = EXPERIMENTS[name]
    with torch.device("meta"):
        base = FathomConfig.preset("v3", vocab_size=vocab_size, **BASE)
        base_active = FathomForCausalLM(base).parameter_counts()["active"]
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in experiment.variants}
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        for label, variant in experiment.variants.items():
            file = folder / f"{label.replace(' ', '_').replace(',', '')}-{steps}-{seed}.json"
            if file.exists():
                record = json.loads(file.read_text(encoding="utf-8"))
            else:
                # Layers more than the base's are no means to an end; only a variant of its own depth has them.
                matches = "num_hidden_layers" not in variant.config
                values = {**BASE, **variant.config}
                config = (
                    matched(variant.config, base_active, vocab_size)
                    if matches
                    else FathomConfig.preset("v3", vocab_size=vocab_size, **values)
                )
                record = {"variant": label, **run_one(variant, experiment, seed, data, steps, config, token_bytes)}
                with staged_directory(folder) as staging:
                    (staging / file.name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            runs[label].append(record)
            figures = "  ".join(f"{figure} {record[figure]:.3f}" for figure in experiment.figures if figure in record)
            say(f"{name}: {label}, seed {seed}: {figures}  ({record['seconds']:.0f} s)")
    return runs

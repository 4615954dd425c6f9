"""Three steps of every kind of Trainer on the same rows; also for two processes:

torchrun sft_steps.py FOLDER            all kinds, the model whole on each process
torchrun sft_steps.py FOLDER plans      FathomTrainer, the model cut by each of PLANS
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from sharded_on_cpu import taken_for_gpus
from tiny_runs import VOCABULARY, model
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from fathom import FathomForCausalLM, FathomTrainer, RouterBiasCallback
from fathom.modeling.experts import TopKRouter

KINDS = ("plain", "fathom", "trl")
# transformers' DistributedConfig: who has which part of the model, and whether the ranks share a batch.
PLANS = {
    "tensor": {"tp_size": 2},
    "experts-of-one-batch": {"tp_size": 2, "ep_size": 2},
    "experts-of-two-batches": {"fsdp_size": 2, "ep_size": 2},
}
STEPS, ROWS_PER_STEP = 3, 8


def rows() -> list[dict[str, list[int]]]:
    """Rows of 6 to 20 tokens of which the first 1 to 5 are no targets."""
    generator = torch.Generator().manual_seed(0)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    made = []
    for _ in range(STEPS * ROWS_PER_STEP):
        ids = torch.randint(3, VOCABULARY, (number(6, 20),), generator=generator).tolist()
        prompt = number(1, 5)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


ROWS = rows()


def collate(batch: list[dict[str, list[int]]], pad: int = 0, side: str = "right") -> dict[str, torch.Tensor]:
    """Pads to the longest row, and by `pad` more."""
    length = max(len(row["input_ids"]) for row in batch) + pad
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    columns: dict[str, list[list[int]]] = {name: [] for name in fills}
    for row in batch:
        for name, fill in fills.items():
            values = row.get(name, [1] * len(row["input_ids"]))
            padding = [fill] * (length - len(values))
            columns[name].append(values + padding if side == "right" else padding + values)
    return {name: torch.tensor(values) for name, values in columns.items()}


class InOrder:
    """Mixed into a Trainer: the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


def train(
    kind: str,
    folder: Path,
    batch: int,
    accumulation: int,
    order: Callable[[list], list] = lambda step: step,
    trained: FathomForCausalLM | None = None,
) -> None:
    """Trains three steps of eight rows and writes weights and history to `folder`."""
    steps = [ROWS[start : start + ROWS_PER_STEP] for start in range(0, len(ROWS), ROWS_PER_STEP)]
    data = Dataset.from_list([row for step in steps for row in order(step)])
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "ddp_find_unused_parameters": False,
    }
    trained = trained or model(seq_aux_loss_coef=0.0)
    common = {"model": trained, "train_dataset": data, "data_collator": collate}
    if kind.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        from fathom.training.trl import FathomSFTTrainer

        cls = FathomSFTTrainer if kind == "trl" else SFTTrainer
        config = SFTConfig(**settings, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True})
        made = type("", (InOrder, cls), {})(**common, args=config, processing_class=word_tokenizer())
    else:
        cls = {"plain": Trainer, "fathom": FathomTrainer}[kind]
        callbacks = [RouterBiasCallback()] if kind == "plain" else []
        made = type("", (InOrder, cls), {})(**common, args=TrainingArguments(**settings), callbacks=callbacks)
    made.train()
    if made.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.json").write_text(json.dumps(made.state.log_history))
    if made.is_world_process_zero() or trained.is_distributed_loading_by_transformers:
        trained.save_pretrained(folder)


def train_by_plans(folder: Path) -> None:
    """The steps of `train`, by a model that transformers cuts as it loads it."""
    from transformers.distributed import DistributedConfig

    start = folder / "start"
    if os.environ["RANK"] == "0":
        model(seq_aux_loss_coef=0.0).save_pretrained(start)
    PartialState(cpu=True).wait_for_everyone()
    # accelerate knows of tensor parallelism on accelerators only.
    AcceleratorState.__init__ = taken_for_gpus  # type: ignore[method-assign]
    for name, plan in PLANS.items():
        for choose, place in ((TopKRouter.choose, folder / name), (first_experts, folder / f"{name}-of-rank-0")):
            cut = FathomForCausalLM.from_pretrained(start, distributed_config=DistributedConfig(**plan))
            with mock.patch.object(TopKRouter, "choose", choose):
                train("fathom", place, 4 // plan.get("fsdp_size", 1), 2, trained=cut)


def first_experts(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
    """Of two ranks that share the experts, the second has nothing to do."""
    return torch.arange(self.top_k).expand(len(scores), -1)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one, though the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), pad_token="<pad>", eos_token="<eos>"
    )


if __name__ == "__main__":
    if sys.argv[2:] == ["plans"]:
        train_by_plans(Path(sys.argv[1]))
    else:
        for kind in KINDS:
            train(kind, Path(sys.argv[1]) / kind, batch=2, accumulation=2)
    PartialState().destroy_process_group()

"""Steps of which some have no targets, by the plain Trainer, for `tests/training/test_no_targets.py`.

torchrun no_targets_on_ranks.py FOLDER      on two processes, of which the second has no targets in step 2, and neither
                                            has any in step 3
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from generations import model
from safetensors.torch import save_file
from sft_steps import InOrder, collate
from transformers import Trainer, TrainingArguments

GENERATIONS = ["moe", "v3.2", "v4"]
STEPS, ROWS_PER_STEP, LENGTH = 4, 4, 12
# Rows whose labels are all ignored: the second process's in step 2, all in step 3.
WITHOUT = [(2, 1), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for step in range(1, STEPS + 1):
        for row in range(ROWS_PER_STEP):
            ids = torch.randint(3, 97, (LENGTH,), generator=generator).tolist()
            made.append({"input_ids": ids, "labels": [-100] * LENGTH if (step, row) in WITHOUT else ids})
    return made


def train(folder: Path, generation: str, batch: int, accumulation: int = 1, **settings) -> dict[str, torch.Tensor]:
    """The weights after four steps of four rows each. A batch's balance loss would depend on how rows are cut."""
    trained = model(generation, aux_loss_alpha=0.0, seq_aux_loss_coef=0.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        **settings,
    )
    data = Dataset.from_list(rows())
    made = type("", (InOrder, Trainer), {})(trained, arguments, train_dataset=data, data_collator=collate)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return {**trained.state_dict(), "losses": torch.tensor(losses)}


if __name__ == "__main__":
    for kind in GENERATIONS:
        for average in (True, False):
            weights = train(Path(sys.argv[1]), kind, batch=2, average_tokens_across_devices=average)
            save_file(weights, Path(sys.argv[1]) / f"{kind}-{average}-{PartialState().process_index}.safetensors")
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()

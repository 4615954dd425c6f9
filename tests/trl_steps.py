"""Three steps of TRL's own trainers with TRL's defaults; for one process or several:

torchrun trl_steps.py FOLDER JOB ...     a JOB is TRAINER:GENERATION, for instance dpo:v3

Writes FOLDER/JOB-WORLDSIZE/result.json: how far the routing biases moved, whether all ranks hold the same weights.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tiny_runs import MODEL
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from fathom import FathomConfig, FathomForCausalLM, RouterBiasCallback
from fathom.tokenizer import train_tokenizer

TEXTS = [f"def f{n}(x):\n    return x + {n * n}\n" for n in range(24)]
TRAINERS: dict[str, tuple[type, type, dict[str, Any], dict[str, list]]] = {
    "sft": (SFTTrainer, SFTConfig, {}, {"text": TEXTS}),
    "dpo": (
        DPOTrainer,
        DPOConfig,
        {},
        {"prompt": TEXTS, "chosen": [f"{text}yes" for text in TEXTS], "rejected": [f"no{text}" for text in TEXTS]},
    ),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 2, "max_completion_length": 8, "per_device_train_batch_size": 2},
        {"prompt": TEXTS},
    ),
}


def length_reward(completions: list[str], **kwargs) -> list[float]:
    return [float(len(completion) % 7) for completion in completions]


def model(generation: str, tokenizer, folder: Path) -> FathomForCausalLM:
    """Loaded from a folder, from where DPO loads its reference, too."""
    torch.manual_seed(0)
    drafting = {"num_nextn_predict_layers": 1} if generation in ("v3", "v3.2", "v4") else {}
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = FathomConfig.preset(generation, **{**MODEL, **drafting, **ends, "vocab_size": len(tokenizer)})
    with PartialState().local_main_process_first():
        if PartialState().is_main_process:
            FathomForCausalLM(config).save_pretrained(folder)
    return FathomForCausalLM.from_pretrained(folder)


def train(job: str, folder: Path) -> None:
    name, generation = job.split(":")
    trainer_class, config_class, further, columns = TRAINERS[name]
    tokenizer = train_tokenizer(TEXTS, 290, MODEL["max_position_embeddings"])
    trained = model(generation, tokenizer, folder / "start")
    start = {key: value.clone() for key, value in trained.state_dict().items()}
    settings = {"per_device_train_batch_size": 1, **further}
    arguments = config_class(
        output_dir=str(folder), max_steps=3, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        learning_rate=1e-3, **settings,
    )  # fmt: skip
    rewards = {"reward_funcs": length_reward} if name == "grpo" else {}
    made = trainer_class(
        model=trained,
        args=arguments,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        callbacks=[RouterBiasCallback()],
        **rewards,
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made.train()
    end = {key: value.detach() for key, value in trained.state_dict().items()}
    moved = {key: (value.float() - start[key].float()).abs().max().item() for key, value in end.items()}
    last = trained.config.num_hidden_layers
    mtp = tuple(f"model.layers.{last + n}." for n in range(trained.config.num_nextn_predict_layers))
    sums = gather_object([{key: value.double().sum().item() for key, value in end.items()}])
    if made.is_world_process_zero():
        biases = [key for key in moved if key.endswith("e_score_correction_bias") and not key.startswith(mtp)]
        result = {
            "biases": [moved[key] for key in biases],
            "mtp": max([value for key, value in moved.items() if mtp and key.startswith(mtp)], default=None),
            "layers": max(value for key, value in moved.items() if "layers.0" in key),
            "ranks_agree": all(of_rank == sums[0] for of_rank in sums),
            "steps": made.state.global_step,
            "said": [str(entry.message) for entry in said if "RouterBias" in str(entry.message)],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for word in sys.argv[2:]:
        processes = PartialState(cpu=True).num_processes
        train(word, Path(sys.argv[1]) / f"{word.replace(':', '-')}-{processes}")
    PartialState().destroy_process_group()

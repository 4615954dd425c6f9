"""What a folder stores does not change what a caller's own arguments mean, and training leaves nothing behind in it.

The calls are those of lm-evaluation-harness (HFLM passes `max_length` = prompt + `max_gen_toks`), of transformers'
pipelines and of plain `generate()`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
)

from fathom import FathomConfig, FathomForCausalLM

PROMPT, NEW = torch.arange(3, 13)[None], 8


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """As runs saved it before: with a length among the defaults, and without a cache."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 256, "eos_token_id": None}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_cache": False, "eos_token_id": None}))
    return folder


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


CALLS = {
    "max_length": {"max_length": PROMPT.shape[1] + NEW},
    "HFLM": {"max_length": PROMPT.shape[1] + NEW, "stopping_criteria": [Never()], "do_sample": False},
    "config with max_length": {"generation_config": GenerationConfig(max_length=PROMPT.shape[1] + NEW)},
    "max_new_tokens": {"max_new_tokens": NEW},
    "config with max_new_tokens": {"generation_config": GenerationConfig(max_new_tokens=NEW)},
    "both, by transformers' own rule": {"max_new_tokens": NEW, "max_length": 100},
    "drafts": {"max_length": PROMPT.shape[1] + NEW, "use_mtp": True},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_callers_length_holds(call: str, folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(PROMPT, **CALLS[call]).shape[1] == PROMPT.shape[1] + NEW


def test_what_is_stored_holds_where_the_caller_says_nothing(folder: Path):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_new_tokens": 5}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.generate(PROMPT).shape[1] == PROMPT.shape[1] + 5
    assert model.generate(PROMPT, do_sample=False).shape[1] == PROMPT.shape[1] + 5


def test_pipelines(folder: Path):
    generate = pipeline("text-generation", str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for asked, new in (({"max_new_tokens": NEW}, NEW), ({"max_length": 10}, 10 - len(tokenizer("def")["input_ids"]))):
        (answer,) = generate("def", return_tensors=True, **asked)
        assert len(answer["generated_token_ids"]) == len(tokenizer("def")["input_ids"]) + new


def test_a_streamer(folder: Path, capsys: pytest.CaptureFixture[str]):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    output = model.generate(
        PROMPT, max_length=PROMPT.shape[1] + NEW, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True)
    )
    assert output.shape[1] == PROMPT.shape[1] + NEW
    assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(output[0, PROMPT.shape[1] :]).rstrip("\n")


def test_a_loaded_model_returns_a_cache(folder: Path):
    """`use_cache: false` in a folder is what a Trainer left there; who wants no cache says so."""
    assert AutoModelForCausalLM.from_pretrained(folder)(PROMPT).cache is not None
    assert AutoModelForCausalLM.from_pretrained(folder, use_cache=False)(PROMPT).cache is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_leaves_no_trace_in_the_config(checkpointing: bool, tmp_path: Path):
    """Of transformers' plain Trainer, which sets `config.use_cache = False` for the time of training."""
    config = FathomConfig.preset("v3", vocab_size=99, hidden_size=64, num_hidden_layers=2, n_routed_experts=4)
    model = FathomForCausalLM(config)
    ids = torch.arange(3, 19)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 4)
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert model.config.use_cache is False  # or this test shows nothing
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["use_cache"] is True

"""`fathom pretrain`: trains a model on a corpus, from nothing or from another model (`--init`), in stages."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..training.errors import UserError, did_you_mean
from ..training.options import RunOptions, pairs, typed
from .arguments import parse
from .cli import run


@dataclass
class PretrainOptions:
    """What to train, on what."""

    _argument_group_name = "model and data"

    corpus: str = field(default="runs/corpus", metadata={"help": "folder made by `fathom corpus`"})
    tokenizer: str = field(
        default="runs/tokenizer",
        metadata={"help": "folder made by `fathom tokenizer`; with --init that model's is used"},
    )
    out: str = field(default="runs/pretrain", metadata={"help": "folder for the model and its checkpoints"})
    generation: str | None = field(
        default=None,
        metadata={"help": "classic, moe, v2, v3, v3.2, v4, or an official model (v3-671b); v3, or that of --init"},
    )
    size: str = field(default="nano", metadata={"help": "nano, micro or small"})
    override: list[str] = field(
        default_factory=list, metadata={"help": "fields of FathomConfig, as name=value (n_routed_experts=32 ...)"}
    )
    init: str | None = field(
        default=None,
        metadata={"help": "begin with this model's weights; a v3 model can become v3.2, by adding indexers"},
    )
    stage: str = field(
        default="sparse",
        metadata={
            "help": "with indexers: dense (attend to everything, all learns), warmup (the same, the indexers alone "
            "learn), sparse (attend to what they select)"
        },
    )
    sequence_length: int = field(default=256, metadata={"help": "tokens per row"})
    sample_prompt: str = field(default="def ", metadata={"help": "text to continue after each evaluation"})
    allowed_special: list[str] = field(
        default_factory=list,
        metadata={
            "help": "control tokens that are meant where texts hold them ('<｜fim▁hole｜>' ...); others are text"
        },
    )


def main(argv: Sequence[str]) -> int:
    options, run_options = parse("pretrain", str(__doc__), (PretrainOptions, RunOptions), argv)
    from ..training.run import run_folder, start

    start(run_options)
    with run_folder(Path(options.out), run_options) as checkpoint:
        return train(argv, options, run_options, checkpoint)


def train(argv: Sequence[str], options: PretrainOptions, run_options: RunOptions, checkpoint: Path | None) -> int:
    """Everything between the options and the trained model; returns the exit code."""
    from ..demo.generation import raw_prompt
    from ..modeling.modeling_fathom import FathomForCausalLM
    from ..tokenizer.bpe import token_byte_lengths, token_texts
    from ..training.corpus import load_corpus
    from ..training.loading import load_tokenizer
    from ..training.packing import collate_rows, pack_documents
    from ..training.resuming import refuse_another_config
    from ..training.run import continuation, run_training
    from ..training.stages import STAGES, enter_stage
    from ..training.trainer_arguments import device_of_run, training_arguments

    out = Path(options.out)
    if options.stage not in STAGES:
        raise UserError(
            f"--stage {options.stage} is unknown{did_you_mean(options.stage, STAGES)}; use {', '.join(STAGES)}"
        )
    tokenizer = load_tokenizer(options.init or options.tokenizer)
    prompt = raw_prompt(tokenizer, options.sample_prompt, options.allowed_special)
    model = None if options.init is None else begin_with(options, tokenizer)
    config = build_config(options, tokenizer) if model is None else model.config
    refuse_another_config(config, checkpoint)
    corpus = load_corpus(options.corpus)
    arguments = training_arguments(out, run_options, device_of_run(), checkpoint)

    with arguments.main_process_first(desc="packing"):
        rows = {
            split: pack_documents(
                corpus[split], tokenizer, options.sequence_length, allowed_special=options.allowed_special
            )
            for split in corpus
        }
    model = FathomForCausalLM(config) if model is None else model
    enter_stage(model, options.stage)
    if options.init is not None:
        # What the model could do, and its indexers could find, before this stage.
        arguments.eval_on_start = True
    report = json.loads((Path(options.corpus) / "corpus.json").read_text(encoding="utf-8"))
    code = run_training(
        verb="pretrain",
        argv=argv,
        out=out,
        options=run_options,
        model=model,
        tokenizer=tokenizer,
        token_bytes=token_byte_lengths(tokenizer),
        train=rows["train"],
        heldout=rows["heldout"],
        collator=collate_rows,
        tokens_per_row=options.sequence_length,
        arguments=arguments,
        checkpoint=checkpoint,
        yardsticks={name: report[f"{name}_bits_per_byte"] for name in ("gzip", "xz")},
        token_texts=token_texts(tokenizer),
        say=lambda model: continuation(model, tokenizer, prompt, new_tokens=32),
        facts={"generation": config.generation, "size": options.size, "corpus": report},
    )
    if code == 0:
        print(f"written to {out}\n\nnext: fathom sft --model {out} --out {out.with_name('sft')}")
    return code


def build_config(options: PretrainOptions, tokenizer):
    """The model's configuration: preset, overrides, and the tokenizer's vocabulary.

    Raises:
        UserError: unknown preset or field, an impossible combination, or rows longer than the context.
    """
    from huggingface_hub.errors import StrictDataclassError

    from ..modeling.configuration_fathom import FathomConfig
    from ..training.stages import stage_fields

    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **stage_fields(options.stage),
        **overrides(options),
    }
    try:
        config = FathomConfig.preset(options.generation or "v3", options.size, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if config.vocab_size < len(tokenizer):
        raise UserError(f"vocab_size={config.vocab_size} is less than the tokenizer's {len(tokenizer)}; leave it out")
    check_context(options, config)
    return config


def begin_with(options: PretrainOptions, tokenizer):
    """The model of `--init`, in the generation and with the fields asked for.

    Raises:
        UserError: it holds no whole model, or cannot become what is asked for.
    """
    from ..training.checkpoint_check import read_model_config
    from ..training.checkpoint_files import check_checkpoint
    from ..training.stages import converted_fields, initial_model, stage_fields

    config = read_model_config(check_checkpoint(Path(str(options.init))), str(options.init))
    changes = converted_fields(config, options.generation or config.generation)
    model = initial_model(str(options.init), {**changes, **stage_fields(options.stage), **overrides(options)})
    check_context(options, model.config)
    return model


def overrides(options: PretrainOptions) -> dict[str, Any]:
    return {name: typed(value) for name, value in pairs(options.override, "override").items()}


def check_context(options: PretrainOptions, config) -> None:
    if not 8 <= options.sequence_length <= config.max_position_embeddings:
        raise UserError(
            f"--sequence_length {options.sequence_length} must be between 8 and the model's context of "
            f"{config.max_position_embeddings}; for longer rows add --override max_position_embeddings=..."
        )


if __name__ == "__main__":
    sys.exit(run("pretrain", main, sys.argv[1:]))

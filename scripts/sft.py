"""`fathom sft`: teaches a pretrained model to answer, with a loss on the assistant's words alone.

Several processes: `torchrun --nproc_per_node 2 -m fathom.scripts.sft ...`, or on GPUs
`accelerate launch --config_file scripts/accelerate/ddp.yaml -m fathom.scripts.sft ...`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..training.errors import UserError
from ..training.options import RunOptions
from .arguments import parse
from .cli import run


@dataclass
class SftOptions:
    """Which model learns what."""

    _argument_group_name = "model and data"

    model: str = field(default="runs/pretrain", metadata={"help": "pretrained model: folder or Hub name"})
    data: str = field(
        default="docstrings",
        metadata={
            "help": "docstrings (of the standard library); a file of conversations: .jsonl .ndjson .json .csv .tsv "
            ".parquet, also as .gz .bz2 .xz .zst; a folder that datasets saved (save_to_disk); a datasets name. Rows "
            "have messages (with tools, and weight 0 for what is not learned), or the form of ShareGPT, Alpaca, or "
            "prompt and completion"
        },
    )
    out: str = field(default="runs/sft", metadata={"help": "folder for the model and its checkpoints"})
    sequence_length: int = field(default=256, metadata={"help": "longest conversation, in tokens"})
    skip_bad_rows: bool = field(default=False, metadata={"help": "leave out rows that are no conversations"})
    allowed_special: list[str] = field(
        default_factory=list,
        metadata={"help": "control tokens that are meant where messages hold them ('<think>' ...); others are text"},
    )


@dataclass
class SftRunOptions(RunOptions):
    """As in pretraining, with a smaller learning rate and shorter rows."""

    _argument_group_name = "training"

    steps: int = field(default=300, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=16, metadata={"help": "conversations per step and process, before accumulation"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})


def main(argv: Sequence[str]) -> int:
    options, run_options = parse("sft", str(__doc__), (SftOptions, SftRunOptions), argv)
    from ..training.run import run_folder, start

    start(run_options)
    with run_folder(Path(options.out), run_options) as checkpoint:
        return train(argv, options, run_options, checkpoint)


def train(argv: Sequence[str], options: SftOptions, run_options: SftRunOptions, checkpoint: Path | None) -> int:
    """Everything between the options and the trained model; returns the exit code."""
    from functools import partial

    from ..tokenizer.bpe import token_byte_lengths
    from ..training.checkpoints import load_model, load_tokenizer, read_run
    from ..training.conversations import encode_conversations
    from ..training.packing import pad_conversations
    from ..training.questions import load_conversations
    from ..training.resuming import refuse_another_config
    from ..training.run import continuation, run_training
    from ..training.trainer_arguments import device_of_run, training_arguments

    out = Path(options.out)
    tokenizer = load_tokenizer(options.model)
    skipped: list[str] | None = [] if options.skip_bad_rows else None
    conversations = load_conversations(options.data, skipped)
    # In fp32 whatever the file holds: AdamW's small steps would be lost in bf16 weights.
    model = load_model(options.model, dtype="float32")
    refuse_another_config(model.config, checkpoint)
    if options.sequence_length > model.config.max_position_embeddings:
        raise UserError(
            f"--sequence_length {options.sequence_length} is more than the model's context of "
            f"{model.config.max_position_embeddings} tokens"
        )
    arguments = training_arguments(out, run_options, device_of_run(), checkpoint)

    with arguments.main_process_first(desc="tokenizing"):
        rows = {
            split: encode_conversations(
                conversations[split], tokenizer, options.sequence_length, options.allowed_special
            )
            for split in ("train", "heldout")
        }
    if skipped:
        print(f"left out    {len(skipped):,} bad rows: {skipped[0]}{' ...' if skipped[1:] else ''}")
    for split, kept in rows.items():
        if left_out := len(conversations[split]) - len(kept):
            print(f"left out    {left_out:,} {split} conversations longer than {options.sequence_length} tokens")
    question, prompt = sample_question(conversations["heldout"], tokenizer, options)
    parent = read_run(Path(options.model))
    code = run_training(
        verb="sft",
        argv=argv,
        out=out,
        options=run_options,
        model=model,
        tokenizer=tokenizer,
        token_bytes=token_byte_lengths(tokenizer),
        train=rows["train"],
        heldout=rows["heldout"],
        collator=partial(pad_conversations, pad_token_id=tokenizer.pad_token_id),
        tokens_per_row=sum(map(len, rows["train"]["input_ids"])) / len(rows["train"]),
        arguments=arguments,
        checkpoint=checkpoint,
        yardsticks={},
        say=lambda model: f"{question} -> {continuation(model, tokenizer, prompt, new_tokens=48)}",
        facts={"generation": model.config.generation, "data": options.data, "parent": parent},
    )
    if code == 0:
        print(f"written to {out}\n\nnext: fathom chat {out}")
    return code


def sample_question(rows, tokenizer, options: SftOptions) -> tuple[str, list[int]]:
    """The last question of the first held-out conversation that is short enough, and the prompt that asks it."""
    from ..tokenizer import encode_chat
    from ..training.chat_rows import conversation

    for row in rows:
        found = conversation(row)
        *before, answer = found.messages
        encoded = encode_chat(
            tokenizer,
            before,
            found.tools,
            allowed_special=options.allowed_special,
            add_generation_prompt=True,
            thinking=bool(answer.get("reasoning_content")),
        )
        if len(encoded.input_ids) <= options.sequence_length:
            break
    return before[-1]["content"], encoded.input_ids


if __name__ == "__main__":
    sys.exit(run("sft", main, sys.argv[1:]))

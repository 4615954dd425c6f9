"""`fathom export --to transformers|deepseek SRC DST`: a model for code that knows nothing of Fathom.

`transformers` writes a folder that transformers' own DeepSeek class loads without remote code, with the same logits;
`deepseek` one in the form of DeepSeek's releases. Weights are copied file by file, MTP layers and tokenizer included.
A model that the other code cannot express is refused with the name of the field.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..training.hub import local_folder
from .arguments import parse
from .cli import run

# Who reads what is written; transformers has no class for DeepSeekMoE, and drops MTP layers.
LOADERS = {"transformers": ("transformers", "AutoModelForCausalLM"), "deepseek": ("fathom", "FathomForCausalLM")}


@dataclass
class ExportOptions:
    _argument_group_name = "export"

    source: str = field(metadata={"help": "folder of a model, or owner/name on the Hub; DeepSeek's own ones, too"})
    target: str = field(metadata={"help": "folder to write"})
    to: str = field(metadata={"help": "transformers or deepseek"})
    max_shard_size: str = field(default="5GB", metadata={"help": "largest weight file, and so about the memory used"})


def main(argv: Sequence[str]) -> int:
    (options,) = parse(
        "export",
        "Write a model as transformers' own DeepSeek classes or DeepSeek's releases have it.",
        [ExportOptions],
        _folders_first(argv),
        positionals=("source", "target"),
    )
    from ..training.export import export_checkpoint

    target = Path(options.target).expanduser()
    written = export_checkpoint(local_folder(options.source), target, options.to, options.max_shard_size)
    mtp = f", {written.mtp_layers} MTP layers included" if written.mtp_layers else ""
    print(f"""{written.model_type}: {written.tensors} tensors{mtp}, {written.bytes:,} bytes in {written.files} files
written to {target}
""")
    package, name = LOADERS[options.to]
    print(f"""next: python -c "from {package} import {name}; print({name}.from_pretrained('{target}'))\"""")
    return 0


def _folders_first(argv: Sequence[str]) -> list[str]:
    """The words with the two folders before the options, wherever they stand: every option here takes one value."""
    values = {at + 1 for at, word in enumerate(argv) if word.startswith("-") and "=" not in word}
    folders = [at for at, word in enumerate(argv) if not word.startswith("-") and at not in values]
    return [argv[at] for at in folders] + [word for at, word in enumerate(argv) if at not in folders]


if __name__ == "__main__":
    sys.exit(run("export", main, sys.argv[1:]))

"""The README.md of a pushed model, made only from what its run wrote.

    config.json           layers, context, generation
    run.json              parameters, tokens, steps, evaluation, corpus and command; `parent` is the run.json of the
                          run before it (sft after pretrain), and so on
    trainer_state.json    steps, where run.json does not say
    corpus.json           the corpus, where run.json does not say

A figure that no file holds is left out; none is estimated. Secrets and absolute paths, which run.json of earlier
versions may hold, are left out, too. The YAML block on top is what the Hub reads
(https://huggingface.co/docs/hub/model-cards).
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import ModelCardData

from .secrecy import public, public_command

_KINDS = {"classic": "plain transformer (multi-head attention, ReLU feed-forward networks)", "moe": "DeepSeekMoE"}

_TEMPLATE = Template("""---
$metadata
---

# $name

A $kind language model, built and trained with Fathom, which implements each DeepSeek generation as one readable model
for Hugging Face transformers.

$model

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("$repo_id", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("$repo_id", trust_remote_code=True)
```

The modeling code is in this repository. Read it before you run it, or run `fathom chat $repo_id`, which uses
the code of the installed package.
$stages
## Limits

- It knows what its training text says, and no more. It can be wrong in fluent words: check what it answers.
- It was not trained to refuse or to be safe; do not put it before the public as it is.
$context""")


def model_card(run_dir: Path, repo_id: str, license: str = "apache-2.0") -> str:
    """The text of README.md for the model in `run_dir`.

    Args:
        run_dir: folder of a whole checkpoint; the files of its run are used as far as they are there.
        repo_id: `owner/name` on the Hub.
        license: licence of the weights, as an identifier of the Hub.
    """
    run_dir = Path(run_dir)
    config, run = _read(run_dir / "config.json"), _read(run_dir / "run.json")
    steps = _read(run_dir / "trainer_state.json").get("global_step")
    run = {"corpus": _read(run_dir / "corpus.json"), "steps": steps, **run}
    context = config.get("max_position_embeddings")
    generation = run.get("generation") or config.get("generation", "v3")  # the default of FathomConfig
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=["fathom", *([] if generation == "classic" else ["deepseek", f"deepseek-{generation}"])],
    )
    stages = [_stage(stage) for stage in reversed(list(_lineage(run)))]
    return _TEMPLATE.substitute(
        metadata=metadata.to_yaml().strip(),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        kind=_KINDS.get(generation, f"DeepSeek-{generation.upper()}"),
        model=_model(config, run),
        stages="".join(f"\n{stage}\n" for stage in stages if stage),
        context=f"- It reads at most {context:,} tokens, prompt and answer together.\n" if context else "",
    )


def _model(config: dict[str, Any], run: dict[str, Any]) -> str:
    rows = [
        ("parameters", _number(run.get("parameters_total"))),
        ("active per token", _number(run.get("parameters_active"))),
        ("parameters of the drafting (MTP) layers, beside these", _number(run.get("parameters_mtp") or None)),
        ("layers", _number(config.get("num_hidden_layers"))),
        ("multi-token-prediction layers", _number(config.get("num_nextn_predict_layers") or None)),
        ("vocabulary", _number(config.get("vocab_size"))),
        ("context in tokens", _number(config.get("max_position_embeddings"))),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _stage(run: dict[str, Any]) -> str:
    """One training run: what it read, how much of it, what came out, and the command that does it again."""
    evaluation, corpus = run.get("evaluation") or {}, run.get("corpus") or {}
    lines = []
    if sources := corpus.get("sources"):
        python = f" of Python {corpus['python']}" if "stdlib" in sources and corpus.get("python") else ""
        lines.append(f"- text: {', '.join(public(sources))}{python}")
    if "train_bytes" in corpus and "heldout_bytes" in corpus:
        read, kept = corpus["train_bytes"], corpus["heldout_bytes"]
        lines.append(f"- size: {read:,} bytes to train on, {kept:,} held out")
    if (tokens := run.get("tokens_seen")) is not None:
        flops = run.get("flops_per_token")
        lines.append(f"- tokens seen: {tokens:,}" + (f", at {flops:,.0f} FLOPs each" if flops else ""))
    if steps := run.get("steps"):
        lines.append(f"- optimizer steps: {steps:,}")
    if (bits := evaluation.get("bits_per_byte")) is not None:
        known = [("gzip -9", corpus.get("gzip_bits_per_byte")), ("xz -9e", corpus.get("xz_bits_per_byte"))]
        beside = ", ".join(f"{name} {value:.3f}" for name, value in known if value is not None)
        lines.append(f"- held-out bits per byte: **{bits:.3f}**" + (f" ({beside}, on the same text)" if beside else ""))
    for name, title in (("loss", "held-out loss, nats per token"), ("perplexity", "held-out perplexity per token")):
        if (value := evaluation.get(name)) is not None:
            lines.append(f"- {title}: {value:.3f}")
    if version := run.get("fathom_version"):
        lines.append(f"- Fathom {version}")
    if command := run.get("command"):
        words = command if isinstance(command, str) else shlex.join(command)
        lines.append(f"\n```\n{public_command(words)}\n```")
    title = f"## Training: {run['verb']}" if "verb" in run else "## Training"
    return f"{title}\n\n" + "\n".join(lines) if lines else ""


def _lineage(run: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The run and those it started from, newest first."""
    current: Any = run
    while isinstance(current, dict) and current:
        yield current
        current = current.get("parent")


def _number(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

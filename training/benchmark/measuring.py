"""What a benchmark times, and how.

    prefill   a text of C tokens read at once
    decode    one more token after C; also what the cache then holds
    generate  a continuation of C tokens by `generate()`, which is where drafts count
    serve     continuations of B requests of C tokens down to half of that, one after another or in a shared batch
    train     forward, backward and AdamW on a batch of rows of C tokens
    memory    the largest memory of a process that loads the model and reads a text of C tokens at once

A case is a kind at one context, batch size and dtype of one model. Its contenders take turns, round after round, and
each round begins with another: what else the machine does then hits all of them alike. A figure is the median of a
contender's rounds, a ratio that of two medians.

Before anything is timed, contenders of a model must agree in fp32, whatever dtypes are measured, and before each case
all its contenders do the work once, and their logits (tokens, losses) are compared. A difference ends the benchmark.
"""

import argparse
import inspect
import multiprocessing
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...modeling.experts import RoutedExperts
from ...modeling.presets import GENERATIONS, SIZES
from ...tokenizer import encode_text
from ..checkpoint_check import whole_model
from ..errors import UserError, did_you_mean
from ..flops import training_flops_per_token
from ..loading import load_tokenizer
from .contenders import (
    CONTENDERS,
    Contender,
    Decoding,
    Training,
    held_bytes,
    random_checkpoint,
    stock_checkpoint,
)
from .machine import ceilings, describe_machine, synchronize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS: dict[str, tuple[str, ...]] = {
    "prefill": ("stock", "fathom", "reference"),
    "decode": ("stock", "fathom", "reference", "compiled", "int8"),
    "generate": ("stock", "fathom", "draft"),
    "serve": ("stock", "fathom", "shared"),
    "train": ("stock", "fathom", "reference"),
    "memory": ("stock", "fathom", "reference"),
}
# Tokens of the text that is compared in fp32, and how many of its last ones, as also before decoding is timed.
COMPARED_CONTEXT, COMPARED_STEPS = 256, 8
# How far apart two contenders' logits may be, relative to their spread, for the median token. Where two experts or two
# keys have almost the same score, rounding decides which is chosen: in fp32 for a rare token, in bf16 for most, so that
# there only what is altogether different is found.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.25}


class Disagreement(Exception):
    """Two contenders computed different things, so that comparing their times would mean nothing."""


@dataclass
class Plan:
    """What to measure. Every combination that makes sense is a case.

    Args:
        generations: whose models are made with random weights; not looked at if `checkpoint` is given.
        override: fields of their config that are not the preset's.
        checkpoint: folder of a model of ours to measure instead.
        size: of random models.
        contexts: tokens before a decoding step, before `generate`, and of the longest request of `serve`.
        prefills: tokens of texts that are read at once, also in training rows and for peak memory.
        steps: tokens per round of decoding.
        new_tokens: tokens per round of `generate`, and per request of `serve`.
    """

    generations: Sequence[str]
    kinds: Sequence[str]
    contenders: Sequence[str]
    dtypes: Sequence[str]
    contexts: Sequence[int]
    prefills: Sequence[int]
    batch_sizes: Sequence[int]
    rounds: int = 5
    steps: int = 16
    new_tokens: int = 64
    size: str = "nano"
    override: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    stock_experts: str | None = None
    device: str = "cpu"
    ceiling_size: int = 2048

    def __post_init__(self) -> None:
        for option, values, known in (
            ("generations", self.generations, GENERATIONS),
            ("kinds", self.kinds, KINDS),
            ("contenders", self.contenders, CONTENDERS),
            ("dtypes", self.dtypes, DTYPES),
            ("size", [self.size], SIZES),
        ):
            for value in values:
                if value not in known:
                    raise UserError(
                        f"--{option} {value} is unknown{did_you_mean(value, known)}; known: {', '.join(known)}"
                    )
        for option in ("contexts", "prefills", "batch_sizes"):
            for number in getattr(self, option):
                if number < (1 if option == "batch_sizes" else 2):
                    raise UserError(f"--{option} {number} is too small; give at least {1 + (option != 'batch_sizes')}")
        for option in ("rounds", "steps", "new_tokens"):
            if getattr(self, option) < 1:
                raise UserError(f"--{option} {getattr(self, option)} must be at least 1")
        for each in self.contenders:
            where = [kind for kind, names in KINDS.items() if each in names]
            if not set(where) & set(self.kinds):
                raise UserError(f"--contenders {each} takes part in {' and '.join(where)}; add it to --kinds")
        if "int8" in self.contenders and "fathom" not in self.contenders:
            raise UserError("int8 is measured beside the model that it is made of; add fathom to --contenders")
        if self.contenders == ["stock"]:
            raise UserError("how much work there is, is counted on a Fathom model; add fathom to --contenders")
        if "draft" in self.contenders and self.checkpoint is None:
            raise UserError("random weights accept no drafts; measure `draft` on a trained model, with --model")
        if self.checkpoint is not None and self.override:
            raise UserError("--override is for models with random weights; a model of yours has its own config")
        if self.checkpoint is not None:
            config = whole_model(Path(self.checkpoint), read_values=True).config
            if "draft" in self.contenders and not config.num_nextn_predict_layers:
                raise UserError(f"{self.checkpoint} has no MTP layers to draft with; leave `draft` out of --contenders")
            if self.longest > config.max_position_embeddings:
                raise UserError(
                    f"{self.checkpoint} was made for {config.max_position_embeddings} tokens, and the longest text of "
                    f"this plan has {self.longest}; choose shorter --contexts and --prefills, or fewer --rounds and "
                    f"--steps"
                )

    @property
    def longest(self) -> int:
        """Tokens of the longest text of all cases."""
        lengths = [2]
        if "decode" in self.kinds:
            lengths.append(max(self.contexts) + COMPARED_STEPS + self.rounds * self.steps)
        if {"generate", "serve"} & set(self.kinds):
            lengths.append(max(self.contexts) + self.new_tokens)
        if {"prefill", "train", "memory"} & set(self.kinds):
            lengths.append(max(self.prefills))
        return max(lengths)


@dataclass(frozen=True)
class Case:
    """One line of a benchmark."""

    model: str
    kind: str
    dtype: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {self.dtype}, batch {self.batch}, context {self.context}"


def run_benchmark(plan: Plan, text: torch.Tensor | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measures all cases of a plan.

    Args:
        text: token ids [N] of a text for `plan.checkpoint`, repeated where it is too short; random ids without one.
        say: gets a line per case.

    Returns:
        `machine`, `ceilings` by dtype, `plan`, `without_stock` (why, by model) and `rows`, as JSON can hold it. A row
        is a case and its `contenders`, each with all `seconds` of its rounds, their `median` and what follows from it.

    Raises:
        UserError: a model cannot be loaded, or reads no texts that long.
        Disagreement: contenders of one case computed different things.
    """
    device = torch.device(plan.device)
    report: dict[str, Any] = {
        "machine": describe_machine(device),
        "plan": asdict(plan),
        "ceilings": {name: ceilings(DTYPES[name], device, plan.ceiling_size) for name in plan.dtypes},
        "without_stock": {},
        "rows": [],
    }
    for name in [plan.checkpoint] if plan.checkpoint is not None else plan.generations:
        with tempfile.TemporaryDirectory(prefix="fathom-bench-") as temporary:
            folder = Path(temporary)
            source = folder / "fathom" if plan.checkpoint is None else Path(plan.checkpoint)
            if plan.checkpoint is None:
                fields = {"max_position_embeddings": plan.longest + COMPARED_STEPS, **plan.override}
                random_checkpoint(source, name, plan.size, **fields)
            folders = dict.fromkeys(plan.contenders, source)
            if "stock" in plan.contenders and (reason := stock_checkpoint(source, folder / "stock")):
                report["without_stock"][name] = reason
                del folders["stock"]
                say(f"{name} without stock: {reason}")
            elif "stock" in plan.contenders:
                folders["stock"] = folder / "stock"
            for row in measure_model(plan, name, folders, text, device):
                add_shares(row, report["ceilings"][row["dtype"]])
                report["rows"].append(row)
                say(f"{Case(*(row[field] for field in Case.__dataclass_fields__))}: {summary(row)}")
    return report


def measure_model(
    plan: Plan, name: str, folders: Mapping[str, Path], text: torch.Tensor | None, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The rows of one model's cases, whose contenders are loaded from `folders`."""
    experts = {"stock": plan.stock_experts}
    check_in_fp32(plan, name, folders, text, device)
    for dtype in plan.dtypes:
        # A process of its own needs no models in this one.
        if "memory" in plan.kinds:
            for batch, context in product(plan.batch_sizes, plan.prefills):
                yield {
                    **asdict(Case(name, "memory", dtype, batch, context)),
                    "contenders": peaks(folders, dtype, batch, context, experts, device),
                }
        for kind in plan.kinds:
            taking_part = [each for each in folders if each in KINDS[kind]]
            if kind == "memory" or not taking_part:
                continue
            in_memory = torch.float32 if kind == "train" else DTYPES[dtype]
            models = [Contender(each, folders[each], in_memory, device, experts.get(each)) for each in taking_part]
            contexts = plan.contexts if kind in ("decode", "generate", "serve") else plan.prefills
            for batch, context in product(plan.batch_sizes, contexts):
                case = Case(name, kind, dtype, batch, context)
                yield {**asdict(case), **MEASURES[kind](plan, case, models, text)}


def check_in_fp32(
    plan: Plan, name: str, folders: Mapping[str, Path], text: torch.Tensor | None, device: torch.device
) -> None:
    """Compares prefill and decoding of the eager contenders, a compiled one being compared where it is timed."""
    eager = [each for each in folders if each in KINDS["prefill"]]
    if len(eager) < 2:
        return
    contenders = [Contender(each, folders[each], torch.float32, device) for each in eager]
    context = max(min(COMPARED_CONTEXT, plan.longest) - COMPARED_STEPS, 1)
    case = Case(name, "decode", "fp32", 1, context)
    tokens = tokens_of(case, context + COMPARED_STEPS, contenders, text)
    with torch.inference_mode():
        compare_steps(case, {each.name: Decoding(each, tokens, context) for each in contenders})


def compare_steps(case: Case, texts: Mapping[str, Decoding]) -> float:
    """Reads `COMPARED_STEPS` tokens by every contender; what `agree` says of those that have the same weights.

    Those of `int8` are rounded, and where weights are random other experts are chosen: tests compare it, and text.
    """
    steps = range(COMPARED_STEPS)
    logits = {name: torch.stack([each.step() for _ in steps], dim=1) for name, each in texts.items()}
    return agree(case, {name: each for name, each in logits.items() if name != "int8"})


def tokens_of(case: Case, length: int, contenders: Sequence[Contender], text: torch.Tensor | None) -> torch.Tensor:
    """[B, T] ids: parts of the text, or random ones; the same for a case in every run."""
    device = contenders[0].device
    if text is None:
        generator = torch.Generator().manual_seed(case.context)
        vocab_size = contenders[0].model.config.vocab_size
        return torch.randint(3, vocab_size, (case.batch, length), generator=generator).to(device)
    repeats = -(-case.batch * length // len(text))
    return text.repeat(repeats)[: case.batch * length].view(case.batch, length).to(device)


def source_code_ids(checkpoint: Path) -> torch.Tensor | None:
    """Token ids of a real text, the standard library's own, for a trained model; None where it has no tokenizer.

    What a model makes of random ids says nothing of how often its drafts are right.
    """
    if not (checkpoint / "tokenizer.json").is_file():
        return None
    text = "\n".join(inspect.getsource(module) for module in (argparse, inspect, tempfile, statistics))
    return torch.tensor(encode_text(load_tokenizer(str(checkpoint)), text))


def measure_prefill(plan: Plan, case: Case, contenders: Sequence[Contender], text) -> dict[str, Any]:
    tokens = tokens_of(case, case.context, contenders, text)
    with torch.inference_mode():
        found = agree(case, {each.name: each.prefill(tokens).unsqueeze(1) for each in contenders})
        runs = {each.name: lambda each=each: each.prefill(tokens) for each in contenders}
        seconds = interleaved(runs, plan.rounds, contenders[0].device)
    row = figures(seconds, tokens.numel())
    operations = forward_flops(contenders, case.context) * tokens.numel()
    return {"difference": found, "operations": operations, "contenders": row}


def measure_decode(plan: Plan, case: Case, contenders: Sequence[Contender], text) -> dict[str, Any]:
    # The context is that of the middle of what is timed.
    timed = plan.rounds * plan.steps
    begin = max(case.context - timed // 2 - COMPARED_STEPS, 1)
    length = begin + COMPARED_STEPS + timed
    tokens = tokens_of(case, length, contenders, text)
    with torch.inference_mode():
        texts = {each.name: Decoding(each, tokens, begin) for each in contenders}
        found = compare_steps(case, texts)

        def steps(decoding: Decoding) -> None:
            for _ in range(plan.steps):
                decoding.step()

        runs = {name: lambda each=each: steps(each) for name, each in texts.items()}
        seconds = interleaved(runs, plan.rounds, contenders[0].device)
    row = figures(seconds, plan.steps * case.batch, plan.steps)
    for name, each in texts.items():
        row[name]["cache_bytes"] = held_bytes(each.cache)
        row[name]["weight_bytes"] = read_weights(each.contender if name == "int8" else ours(contenders), case.batch)
    return {"difference": found, "contenders": row}


def measure_generate(plan: Plan, case: Case, contenders: Sequence[Contender], text) -> dict[str, Any]:
    tokens = tokens_of(case, case.context, contenders, text)
    return measure_texts(plan, case, contenders, lambda each: each.generate(tokens, plan.new_tokens))


def measure_serve(plan: Plan, case: Case, contenders: Sequence[Contender], text) -> dict[str, Any]:
    tokens = tokens_of(case, case.context, contenders, text)
    requests = [row[None, index * case.context // (2 * case.batch) :] for index, row in enumerate(tokens)]
    return measure_texts(plan, case, contenders, lambda each: each.answer(requests, plan.new_tokens))


def measure_texts(
    plan: Plan, case: Case, contenders: Sequence[Contender], make: Callable[[Contender], torch.Tensor]
) -> dict[str, Any]:
    """Times what makes `plan.new_tokens` tokens per row of the case, after a look at whether they are the same."""
    made = {each.name: make(each) for each in contenders}
    first, *others = made
    same = min([(made[first] == made[each]).float().mean().item() for each in others], default=1.0)
    # In bf16 two scores are often equal, and which of them is larger depends on the order of sums.
    if same < 1 and case.dtype == "fp32":
        raise Disagreement(f"{case}: only {same:.0%} of the generated tokens are the same")
    runs = {each.name: lambda each=each: make(each) for each in contenders}
    seconds = interleaved(runs, plan.rounds, contenders[0].device)
    count = plan.new_tokens * case.batch
    return {"same_tokens": same, "contenders": figures(seconds, count, plan.new_tokens)}


def measure_train(plan: Plan, case: Case, contenders: Sequence[Contender], text) -> dict[str, Any]:
    tokens = tokens_of(case, case.context, contenders, text)
    learners = {each.name: Training(each, tokens, DTYPES[case.dtype]) for each in contenders}
    losses = {name: each.step().item() for name, each in learners.items()}
    first, *others = losses.values()
    found = max([abs(loss - first) / first for loss in others], default=0.0)
    if not found <= TOLERANCE[case.dtype]:
        raise Disagreement(f"{case}: the losses differ, {losses}")
    seconds = interleaved({name: each.step for name, each in learners.items()}, plan.rounds, contenders[0].device)
    operations = training_flops_per_token(ours(contenders).model, case.context) * tokens.numel()
    return {"difference": found, "operations": operations, "contenders": figures(seconds, tokens.numel())}


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "prefill": measure_prefill,
    "decode": measure_decode,
    "generate": measure_generate,
    "serve": measure_serve,
    "train": measure_train,
}


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round; who begins a round was second in the one before."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            started = time.perf_counter()
            runs[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def figures(seconds: Mapping[str, Sequence[float]], tokens: int, steps: int = 1) -> dict[str, dict[str, Any]]:
    """What follows from the seconds of all rounds.

    Args:
        seconds: by contender.
        tokens: read or made in a round.
        steps: of a round.

    Returns:
        By contender `seconds`, their `median`, `seconds_per_step`, `tokens_per_second`, and `speedup` against the
        first contender.
    """
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    first = next(iter(medians.values()))
    return {
        name: {
            "seconds": list(each),
            "median": medians[name],
            "seconds_per_step": medians[name] / steps,
            "tokens_per_second": tokens / medians[name],
            "speedup": first / medians[name],
        }
        for name, each in seconds.items()
    }


def agree(case: Case, logits: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between the first contender's logits [B, T, V] and another's, for the median token.

    Raises:
        Disagreement: it is larger than `TOLERANCE`.
    """
    (first, expected), *others = logits.items()
    largest = 0.0
    for name, found in others:
        spread = (expected - expected.mean(dim=-1, keepdim=True)).float().norm(dim=-1)
        apart = ((found.float() - expected.float()).norm(dim=-1) / spread).median().item()
        if not apart <= TOLERANCE[case.dtype]:
            raise Disagreement(
                f"{case}: logits of {name} and {first} differ by {apart:.1e} of their spread, more than "
                f"{TOLERANCE[case.dtype]:.0e}"
            )
        largest = max(largest, apart)
    return largest


def add_shares(row: dict[str, Any], ceiling: Mapping[str, float]) -> None:
    """Adds to contenders the `share` of the machine's limit that they reach, where a row says what the work is."""
    for each in row["contenders"].values():
        if "operations" in row:
            each["share"] = row["operations"] / each["median"] / ceiling["flops"]
        elif "weight_bytes" in each:
            read = each["weight_bytes"] + each["cache_bytes"]
            each["share"] = read / each["seconds_per_step"] / ceiling["bandwidth"]


def ours(contenders: Sequence[Contender]) -> Contender:
    """Any contender that is a Fathom model of plain weights: what work there is can be counted on it."""
    return next((each for each in contenders if each.name not in ("stock", "int8")), contenders[0])


def forward_flops(contenders: Sequence[Contender], length: int) -> float:
    """Floating-point operations per token of a forward pass over `length` tokens."""
    model = ours(contenders).model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    operations = training_flops_per_token(model, length)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return operations


def read_weights(contender: Contender, batch: int) -> int:
    """Bytes of weights that a decoding step reads: of the experts as many as `batch` tokens choose at most.

    Added to what the cache holds it is what must be read where attention is dense; sparse attention reads less.
    """
    model: PreTrainedModel = contender.model
    total = sum(parameter.nbytes for parameter in model.parameters())
    total -= model.get_input_embeddings().weight.nbytes
    for module in model.modules():
        if isinstance(module, RoutedExperts):
            experts = sum(parameter.nbytes for parameter in module.parameters())
            chosen = min(batch * model.config.num_experts_per_tok, module.num_experts)
            total -= experts - experts * chosen // module.num_experts
    return total


def peaks(
    folders: Mapping[str, Path],
    dtype: str,
    batch: int,
    context: int,
    experts: Mapping[str, str | None],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """The largest memory of a process per contender, and how many times as much the first one takes.

    `peak_bytes` is None where the process was ended for lack of memory.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        if name not in KINDS["memory"]:
            continue
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as process:
            measured = process.submit(
                peak_of_prefill, name, folder, dtype, batch, context, experts.get(name), device, torch.get_num_threads()
            )
            try:
                found[name] = dict(zip(("loaded_bytes", "peak_bytes"), measured.result(), strict=True))
            except BrokenProcessPool:
                found[name] = {"loaded_bytes": None, "peak_bytes": None}
    first = next(iter(found.values()))["peak_bytes"]
    for each in found.values():
        each["saving"] = first / each["peak_bytes"] if first and each["peak_bytes"] else None
    return found


def peak_of_prefill(
    name: str,
    folder: Path,
    dtype: str,
    batch: int,
    context: int,
    experts: str | None,
    device: torch.device,
    threads: int,
) -> tuple[int, int]:
    """Reads a text in this process, which has done nothing before: largest memory after loading, and in the end."""
    torch.set_num_threads(threads)
    contender = Contender(name, folder, DTYPES[dtype], device, experts)
    loaded = peak_memory(device)
    case = Case(name, "memory", dtype, batch, context)
    with torch.inference_mode():
        contender.prefill(tokens_of(case, context, [contender], None))
    return loaded, peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: on an accelerator of its tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands `ru_maxrss` on to a child, which would begin with all that this benchmark has ever used.
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text()).group(1)) * 1024  # type: ignore[union-attr]
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def summary(row: Mapping[str, Any]) -> str:
    """A row's contenders in a line."""
    words = []
    for name, each in row["contenders"].items():
        if row["kind"] == "memory":
            peak = each["peak_bytes"]
            words.append(f"{name} " + ("ran out of memory" if peak is None else f"{peak / 1e9:.2f} GB"))
        else:
            words.append(f"{name} {each['seconds_per_step'] * 1e3:.2f} ms ({each['speedup']:.2f}x)")
    return ", ".join(words)

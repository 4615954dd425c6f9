"""Feeds the native functions anything that a model, a file or a caller may hand them, beside PyTorch alone.

    python tests/processes/fuzz_kernels.py --seconds 3600 --sanitize

Every case is a small model of some generation with sizes, dtypes, weights and tables that are drawn. It reads a prompt
and some steps; then it is misused (`misuses.py`), once with native functions and once without. Both must give the same
numbers, or raise the same kind of exception. With `--sanitize` the native functions are built with AddressSanitizer and
UndefinedBehaviorSanitizer, which end the process at the first wrong access; `--generic` builds them without the
processor's own instructions, whose masked reads no sanitizer sees. A case is repeated by its number: `--first N
--cases 1`.
"""

import argparse
import collections
import contextlib
import copy
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))  # the folder of the tests

SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1 -O1"
# As the compiler's own flags come last, this takes the processor's instructions away again.
GENERIC = "-march=x86-64-v2"


def sanitized_environment(generic: bool) -> dict[str, str]:
    """What a process needs so that a library with sanitizers can be loaded into it."""
    compiler = os.environ.get("CXX") or "g++"

    def runtime(name: str) -> str:
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    return os.environ | {
        "FATHOM_KERNELS_FLAGS": f"{SANITIZERS} {GENERIC if generic else ''}".strip(),
        # The C++ runtime too: else the sanitizer does not find what it calls when an exception is thrown.
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        # PyTorch asks for absurd amounts of memory too, and takes a null pointer for a no.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "FUZZ_SANITIZED": "1",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--generic", action="store_true")
    given = parser.parse_args()
    if given.sanitize and "FUZZ_SANITIZED" not in os.environ:
        command = [sys.executable, *sys.argv]
        return subprocess.run(command, env=sanitized_environment(given.generic), check=False).returncode
    if given.generic and not given.sanitize:
        os.environ["FATHOM_KERNELS_FLAGS"] = GENERIC
    return march(given.first, given.cases, given.seconds)


def march(first: int, cases: int, seconds: float) -> int:
    """Runs cases until the time is over; 1 if anything differed."""
    import torch

    from fathom.modeling import fused, native

    if not native.wait():
        print("there are no native functions to try")
        return 1
    torch.set_num_threads(2)
    counted: collections.Counter[str] = collections.Counter()
    differences = []
    # Texts too, whatever this processor multiplies fastest.
    with mock.patch.object(fused, "multiplies_texts", return_value=True):
        begin, number = time.monotonic(), first
        while number < first + cases and (time.monotonic() - begin < seconds or number == first):
            print(f"case {number}", file=sys.stderr, flush=True)
            try:
                differences += [f"case {number}: {line}" for line in Case(number, counted).run()]
            except Exception:
                differences.append(f"case {number}: {traceback.format_exc()}")
            number += 1
    print(f"{number - first} cases, {dict(sorted(counted.items()))}")
    print(*differences, f"{len(differences)} differences", sep="\n")
    return int(bool(differences))


@contextlib.contextmanager
def pytorch_alone() -> Iterator[None]:
    """No native function serves."""
    from fathom.modeling import fused

    with mock.patch.dict(fused._kernels, clear=True), mock.patch.object(fused, "library", return_value=None):
        yield


class Case:
    """One drawn model, and what is done with it."""

    def __init__(self, number: int, counted: collections.Counter[str]):
        self.number, self.counted = number, counted
        self.chance = random.Random(number)

    def run(self) -> list[str]:
        """What differed."""
        import torch
        from processes import misuses

        torch.manual_seed(self.number)
        model, name = self.draw_model()
        self.strict = misuses.is_exact(model)
        seed = self.chance.randrange(10**6)
        found = self.compare(f"{name} reads", lambda model: self.read(model, seed), model)
        for _ in range(3):
            misuse = self.chance.choice(misuses.ALL)
            seed = self.chance.randrange(10**6)
            found += self.compare(
                f"{name} {misuse.__name__} seed {seed}",
                lambda model, misuse=misuse, seed=seed: misuse(model, seed),
                model,
            )
        return found

    def draw_model(self) -> tuple[Any, str]:
        import generations
        import torch

        pick = self.chance.choice
        generation = pick(["classic", "moe", "v2", "v3", "v3.2", "v3.2", "v4", "v4", "v4"])
        experts = pick([4, 8, 16])
        settings: dict[str, Any] = {
            "hidden_size": pick([8, 24, 40, 64, 72, 136]),
            "num_attention_heads": pick([1, 2, 4]),
            "num_hidden_layers": pick([1, 2, 3]) if generation != "v4" else 4,
            "intermediate_size": pick([5, 16, 48, 100]),
            "moe_intermediate_size": pick([3, 16, 33, 64]),
            "n_routed_experts": experts,
            "num_experts_per_tok": pick([1, 2, experts]),
            "num_nextn_predict_layers": 0,
        }
        if generation == "classic":
            settings["head_dim"] = pick([6, 16, 34])
        if generation in ("v2", "v3", "v3.2"):
            settings |= {
                "kv_lora_rank": pick([4, 10, 32, 72]),
                "qk_nope_head_dim": pick([2, 9, 16, 32]),
                "qk_rope_head_dim": pick([2, 8, 16]),
                "v_head_dim": pick([2, 7, 16, 32]),
                "q_lora_rank": pick([3, 16, 40]) if generation != "v2" else pick([None, 16]),
            }
            if experts >= 8:  # a group counts by its best two
                settings["n_group"], settings["topk_group"] = pick([(1, 1), (4, 4), (4, 2)])
            if generation == "v3.2":
                settings |= {"index_topk": pick([1, 3, 8, 64, 4096]), "index_n_heads": pick([1, 5, 8])}
                settings |= {"index_head_dim": pick([16, 24, 36]), "index_dense": pick([False, False, True])}
        if generation == "v4":
            settings |= {"head_dim": pick([16, 32]), "num_attention_heads": pick([2, 4])}
            settings |= {"index_topk": pick([1, 2, 5, 4096]), "sliding_window": pick([1, 4, 8, 31])}
            settings |= {"hc_mult": pick([1, 2, 4]), "hc_sinkhorn_iters": pick([1, 3, 20])}
        model = generations.model(generation, seed=self.number, **settings)
        dtype = pick([torch.float32, torch.float32, torch.bfloat16])
        model = model.to(dtype)
        if pick([False, False, False, True]) and generation != "classic":
            model.quantize_int8()
        self.draw_tables(model)
        changed = {key: value for key, value in settings.items() if key != "num_nextn_predict_layers"}
        return model, f"{generation} {dtype} {changed}"

    def draw_tables(self, model: Any) -> None:
        """Tables as files have them: balanced, all zeros, some expert several times, one expert for all."""
        import torch

        for module in model.modules():
            if not hasattr(module, "tid2eid"):
                continue
            table = module.tid2eid
            kind = self.chance.choice(["as it is", "zeros", "random", "last"])
            if kind == "zeros":
                table.zero_()
            elif kind == "random":
                table.copy_(torch.randint(module.num_experts, table.shape))
            elif kind == "last":
                table.fill_(module.num_experts - 1)

    def read(self, model: Any, seed: int) -> Any:
        """A prompt and some steps, padded or not, with a cache of either kind or none."""
        import torch
        from transformers import DynamicCache, StaticCache

        from fathom.modeling.cache import adopt_cache

        pick = random.Random(seed).choice
        generator = torch.Generator().manual_seed(seed)
        rows, length = pick([1, 2, 3, 5]), pick([1, 2, 7, 16, 40, 90, 130, 300, 1100])
        if length > 300:
            rows = 1
        steps = [pick([1, 1, 2, 3, 8]) for _ in range(pick([0, 2, 4]))]
        whole = length + sum(steps)
        ids = torch.randint(3, 97, (rows, whole), generator=generator)
        mask = torch.ones(rows, whole, dtype=torch.int64)
        if rows > 1 and length > 2 and pick([True, False]):
            mask[1:, : length // 2] = 0
        masked = pick([True, False]) or not mask.all()
        cache = (
            DynamicCache(config=model.config)
            if pick([True, True, False])
            else StaticCache(model.config, max_cache_len=whole)
        )
        adopt_cache(cache, model.config)
        outputs, at = [], 0
        with torch.no_grad():
            for count in (length, *steps):
                given = {"attention_mask": mask[:, : at + count]} if masked else {}
                output = model(ids[:, at : at + count], cache=cache, use_cache=True, **given)
                # What padding makes is never used.
                real = mask[:, at : at + count].unsqueeze(-1).bool()
                outputs.append(output.logits.masked_fill(~real, 0))
                at += count
        self.counted["reads"] += 1
        return torch.cat(outputs, dim=1)

    def compare(self, name: str, act: Callable[[Any], Any], model: Any) -> list[str]:
        """Runs an action with native functions and without, each on a model of its own."""
        results = []
        for serves in (contextlib.nullcontext, pytorch_alone):
            with serves():
                try:
                    results.append(act(copy.deepcopy(model)))
                except Exception as error:
                    results.append(error)
        return difference(name, *results, strict=self.strict, counted=self.counted)


def difference(name: str, ours: Any, theirs: Any, strict: bool, counted: collections.Counter[str]) -> list[str]:
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        counted[f"{type(theirs).__name__ if isinstance(theirs, Exception) else 'none'} raised"] += 1
        if type(ours) is type(theirs):
            return []
        return [f"{name}:\n    native  {described(ours)}\n    PyTorch {described(theirs)}"]
    counted["compared" if strict else "compared in shape"] += 1
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return [f"{name}: native {described(ours)}, PyTorch {described(theirs)}"]
    if not strict:
        # A near tie may fall otherwise where numbers are rounded: that there are such is all that is known.
        return [] if ours.isfinite().all() or not theirs.isfinite().all() else [f"{name}: native functions give NaN"]
    if not theirs.numel():
        return []
    ours, theirs = ours.float(), theirs.float()
    scale = theirs.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-6)
    # Not finite is not finite: one multiplies infinity by zero where the other does not.
    same = (~ours.isfinite() & ~theirs.isfinite()) | ((ours - theirs).abs() <= 1e-3 * scale)
    if same.all():
        return []
    worst = ((ours - theirs).abs() / scale).nan_to_num(float("inf")).max()
    return [f"{name}: {int((~same).sum())} of {same.numel()} numbers differ by up to {worst:.2g} of the largest"]


def described(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {str(result).partition(chr(10))[0][:200]}"
    return f"{list(result.shape)} {result.dtype}"


if __name__ == "__main__":
    sys.exit(main())

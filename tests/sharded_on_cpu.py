"""`torchrun sharded_on_cpu.py RUNS`: verbs under FSDP2 on CPU processes, as accelerate runs them on GPUs.

accelerate shards on accelerators only and runs plain DDP on CPUs (`AcceleratorState.__init__`). Taken for GPUs at that
one place, CPU processes go all the way that GPUs go, over gloo. RUNS is a JSON list of

    {"environment": {...}, "words": [...],
     "copy": [from, to],         a folder copied before the run, optional
     "few_experts": true,        rank R sends all tokens to experts K R ... K R + K - 1, optional
     "nan_on_rank_1": true,      its experts return NaN, optional
     "code": 1}                  with which the verb must end, if not 0
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from fathom.modeling.experts import RoutedExperts, TopKRouter
from fathom.scripts import cli

of_accelerate = AcceleratorState.__init__
of_experts = RoutedExperts.forward


def taken_for_gpus(self, *args, **kwargs) -> None:
    if PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    of_accelerate(self, *args, **kwargs)


def few_experts(self, scores: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
    return (torch.arange(self.top_k) + self.top_k * dist.get_rank()).expand(len(scores), -1)


def nan_on_rank_1(self, *args, **kwargs) -> torch.Tensor:
    return of_experts(self, *args, **kwargs) * (math.nan if dist.get_rank() == 1 else 1.0)


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.update(run["environment"])
        if "copy" in run:
            if os.environ["RANK"] == "0":
                shutil.copytree(*run["copy"])
            dist.barrier()
        chosen = few_experts if run.get("few_experts") else TopKRouter.choose
        experts = nan_on_rank_1 if run.get("nan_on_rank_1") else of_experts
        state = taken_for_gpus if os.environ["ACCELERATE_USE_FSDP"] == "true" else of_accelerate
        with (
            mock.patch.object(AcceleratorState, "__init__", state),
            mock.patch.object(TopKRouter, "choose", chosen),
            mock.patch.object(RoutedExperts, "forward", experts),
        ):
            code = cli.main(run["words"])
        if code != run.get("code", 0):
            sys.exit(f"{run['words']} ended with {code}")

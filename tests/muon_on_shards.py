"""`torchrun muon_on_shards.py FOLDER`: Muon takes the same steps on parameters cut in all ways as on whole ones."""

import copy
import sys

import torch
import torch.distributed as dist
from sft_steps import PLANS
from tiny_runs import model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig

from fathom import FathomForCausalLM
from fathom.training.optimizers import Muon, muon_groups

# Shape, parts, where it is cut. Two ranks share 5, 3 or 1 unevenly, the last of them not at all.
CASES = [
    ((5, 8), 1, Shard(0)),
    ((1, 6), 1, Shard(0)),
    ((4, 6), 1, Shard(1)),
    ((4, 6), 1, Replicate()),
    ((3, 8, 6), 2, Shard(0)),
    ((1, 8, 6), 2, Shard(0)),
    ((3, 8, 6), 2, Shard(1)),
    ((3, 6, 4), 1, Shard(0)),
    ((5,), 0, Shard(0)),
    ((1,), 0, Shard(0)),
]


def optimizer(parameters: list[nn.Parameter]) -> Muon:
    groups = [
        {"params": [parameter for parameter, case in zip(parameters, CASES, strict=True) if case[1] == parts]}
        for parts in (1, 2, 0)
    ]
    return Muon([{**groups[0], "muon": True}, {**groups[1], "muon": True, "parts": 2}, groups[2]], lr=0.1)


def one_by_one() -> None:
    """Single parameters; their optimizer is saved and loaded on the way."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(shape)) for shape, _, _ in CASES]

    def cut(tensor: torch.Tensor, case: tuple) -> DTensor:
        return distribute_tensor(tensor.detach().clone(), mesh, [case[2]])

    shards = [nn.Parameter(cut(parameter, case)) for parameter, case in zip(whole, CASES, strict=True)]
    by_whole, by_shard = optimizer(whole), optimizer(shards)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(by_shard.state_dict())
            by_shard = optimizer(shards)
            by_shard.load_state_dict(state)
        for parameter, shard, case in zip(whole, shards, CASES, strict=True):
            parameter.grad = torch.randn(case[0])
            shard.grad = cut(parameter.grad, case)
        by_whole.step()
        by_shard.step()
    for parameter, shard, case in zip(whole, shards, CASES, strict=True):
        assert shard.placements == (case[2],)
        torch.testing.assert_close(shard.full_tensor(), parameter.detach(), rtol=0, atol=1e-5, msg=str(case))


def as_models(folder: str) -> None:
    """All parameters of a model, cut by transformers' plans."""
    if dist.get_rank() == 0:
        model().save_pretrained(folder)
    dist.barrier()

    def after_two_steps(stepped: nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        by_model = Muon(muon_groups(stepped, weight_decay=0.1), lr=0.1)
        for _ in range(2):
            for parameter in stepped.parameters():
                parameter.grad = torch.randn(parameter.shape)
                if isinstance(parameter, DTensor):
                    mesh = parameter.device_mesh
                    whole = DTensor.from_local(parameter.grad, mesh, [Replicate()] * mesh.ndim)
                    parameter.grad = whole.redistribute(placements=parameter.placements)
            by_model.step()
        named = stepped.named_parameters()
        return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in named}

    expected = after_two_steps(FathomForCausalLM.from_pretrained(folder))
    for plan in PLANS.values():
        cut = FathomForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**plan))
        torch.testing.assert_close(after_two_steps(cut), expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    one_by_one()
    as_models(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()

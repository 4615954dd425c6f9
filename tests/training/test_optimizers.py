"""Muon against a float64 singular value decomposition, and AdamW's part against PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from fathom import FathomConfig, FathomForCausalLM
from fathom.training.optimizers import Muon, muon_groups, newton_schulz


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vh


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (3, 16, 40), (32, 32)])
def test_the_iteration_finds_the_orthogonal_factor(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    # Singular values of a square Gaussian matrix reach down to 0; the iteration is judged where they are not tiny.
    if shape == (32, 32):
        matrices = (
            orthogonal_factor(matrices)
            @ torch.diag(torch.linspace(0.05, 1, 32)).double()
            @ orthogonal_factor(torch.randn(32, 32))
        )
    found = newton_schulz(matrices.float())
    torch.testing.assert_close(found.double(), orthogonal_factor(matrices), rtol=0, atol=3e-3)
    singular = torch.linalg.svdvals(found.double())
    assert (singular - 1).abs().max() < 2e-3


def reference_step(weight, gradients, lr, momentum=0.95, weight_decay=0.1):
    """Algorithm 1 of the report in float64, with the exact orthogonal factor."""
    weight, buffer = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        buffer = momentum * buffer + gradient.double()
        update = orthogonal_factor(momentum * buffer + gradient.double())
        weight = weight * (1 - lr * weight_decay) - lr * update * 0.18 * max(weight.shape[-2:]) ** 0.5
    return weight


def test_a_step_is_the_algorithm_for_every_expert_gate_and_up() -> None:
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(3, 2 * 8, 24))
    other = nn.Parameter(torch.randn(8, 24))
    expected = [experts.detach().clone(), other.detach().clone()]
    gradients = [(torch.randn_like(experts), torch.randn_like(other)) for _ in range(3)]
    optimizer = Muon([{"params": [experts], "muon": True, "parts": 2}, {"params": [other], "muon": True}], lr=0.02)
    for of_experts, of_other in gradients:
        experts.grad, other.grad = of_experts.clone(), of_other.clone()
        optimizer.step()
    for expert in range(3):
        for part in (slice(0, 8), slice(8, 16)):
            wanted = reference_step(expected[0][expert, part], [g[expert, part] for g, _ in gradients], 0.02)
            torch.testing.assert_close(experts[expert, part].double(), wanted, rtol=0, atol=2e-4)
    wanted = reference_step(expected[1], [g for _, g in gradients], 0.02)
    torch.testing.assert_close(other.double(), wanted, rtol=0, atol=2e-4)


def test_everything_else_is_adamw() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(7, 4))]
    theirs = copy.deepcopy(ours)
    optimizers = [
        Muon([{"params": ours}], lr=0.01, weight_decay=0.1, eps=1e-8),
        torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8),
    ]
    for _ in range(4):
        for parameter, twin in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3", "v3.2", "v4"])
def test_groups_hold_every_parameter_once(generation: str) -> None:
    config = FathomConfig.preset(
        generation, hidden_size=64, num_hidden_layers=3, vocab_size=128, n_routed_experts=4, num_experts_per_tok=2
    )
    model = FathomForCausalLM(config)
    groups = muon_groups(model, weight_decay=0.1)
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(trainable)
    assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in trainable}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon = {names[id(p)]: group["parts"] for group in groups if group.get("muon") for p in group["params"]}
    assert all(parameter.dim() > 1 for group in groups if group.get("muon") for parameter in group["params"])
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(by_muon)
    assert {parts for name, parts in by_muon.items() if name.endswith("experts.gate_up_proj")} <= {2}
    assert {parts for name, parts in by_muon.items() if not name.endswith("experts.gate_up_proj")} == {1}


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))]
    twins = copy.deepcopy(parameters)

    def optimizer_of(pair):
        return Muon([{"params": [pair[0]], "muon": True}, {"params": [pair[1]]}], lr=0.1)

    first, second = optimizer_of(parameters), optimizer_of(twins)
    for step in range(4):
        if step == 2:
            third = optimizer_of(twins)
            third.load_state_dict(copy.deepcopy(second.state_dict()))
            second = third
        for parameter, twin in zip(parameters, twins, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        first.step()
        second.step()
    torch.testing.assert_close(parameters, twins, rtol=0, atol=0)

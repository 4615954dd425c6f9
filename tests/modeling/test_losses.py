"""The chunked cross-entropy against PyTorch's own on full logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import losses
from fathom.modeling.losses import head_cross_entropy


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_IN_CACHE", 37 * 5)  # five tokens at a time
    monkeypatch.setattr(losses, "FEWEST_TOKENS", 1)


def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(16, 37, bias=False, dtype=dtype)
    hidden = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(37, (2, 9))
    targets[0, 3:6] = -100
    return head, hidden, targets


def plain(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, num_items=None) -> torch.Tensor:
    reduction = "mean" if num_items is None else "sum"
    loss = F.cross_entropy(head(hidden).flatten(0, 1).float(), targets.flatten(), reduction=reduction)
    return loss if num_items is None else loss / num_items


@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
def test_value_and_gradients_are_those_of_the_full_logits(num_items) -> None:
    head, hidden, targets = problem()
    gradients = []
    for function in (plain, head_cross_entropy):
        loss = function(head, hidden, targets, num_items)
        gradients.append((loss, *torch.autograd.grad(3 * loss, (hidden, head.weight))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_logits_that_no_exponential_can_hold() -> None:
    head, hidden, targets = problem()
    hidden = (hidden * 500).detach().requires_grad_()
    assert head(hidden).amax() > 200
    for function in (plain, head_cross_entropy):
        loss = function(head, hidden, targets)
        found = (loss, *torch.autograd.grad(loss, (hidden, head.weight)))
        if function is plain:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_large_vocabulary_has_as_many_tokens_at_once_as_a_product_needs(monkeypatch) -> None:
    monkeypatch.undo()
    assert losses.tokens_at_once(4096, torch.device("cpu")) == 512
    assert losses.tokens_at_once(129280, torch.device("cpu")) == 128


@pytest.mark.parametrize("frozen", ["head", "states"])
def test_what_is_frozen_gets_no_gradient_and_changes_none(frozen) -> None:
    head, hidden, targets = problem()
    expected = torch.autograd.grad(plain(head, hidden, targets), (hidden, head.weight))
    (head.weight if frozen == "head" else hidden).requires_grad_(False)
    head_cross_entropy(head, hidden, targets).backward()
    for gradient, wanted, name in zip((hidden.grad, head.weight.grad), expected, ("states", "head"), strict=True):
        if name == frozen:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


def test_gradients_in_float64_by_finite_differences() -> None:
    head, hidden, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda states, weight: losses._LinearCrossEntropy.apply(states, weight, targets.flatten(), torch.float64),
        (hidden.flatten(0, 1).detach().requires_grad_(), head.weight),
    )


def test_no_targets_is_zero_with_zero_gradients() -> None:
    head, hidden, targets = problem()
    loss = head_cross_entropy(head, hidden, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_bf16_autocast_is_as_near_to_fp32_as_the_full_logits_are() -> None:
    head, hidden, targets = problem()
    exact = plain(head, hidden, targets)
    exact_gradient = torch.autograd.grad(exact, head.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        errors = []
        for function in (plain, head_cross_entropy):
            loss = function(head, hidden, targets)
            gradient = torch.autograd.grad(loss, head.weight)[0]
            assert gradient.dtype == torch.float32
            errors.append((gradient - exact_gradient).norm())
    assert errors[1] <= 1.1 * errors[0]


def test_a_wrapped_head_is_called() -> None:
    head, hidden, targets = problem()

    class Scaled(nn.Module):
        def forward(self, x):
            return 2 * head(x)

    torch.testing.assert_close(head_cross_entropy(Scaled(), hidden, targets), plain(Scaled(), hidden, targets))
    hook = head.register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(head_cross_entropy(head, hidden, targets), plain(head, hidden, targets))
    hook.remove()


def test_the_logits_of_all_tokens_are_never_there() -> None:
    """The largest tensor made is a chunk of logits or one of the gradients."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.numel = max(self.numel, output.numel())
            return output

    head, hidden, targets = problem()
    with Largest() as largest:
        head_cross_entropy(head, hidden, targets).backward()
    assert largest.numel == max(head.weight.numel(), hidden.numel(), 37 * 5)


@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_the_model_trains_the_same_without_its_logits(generation: str) -> None:
    config = FathomConfig.preset(
        generation, hidden_size=64, num_hidden_layers=2, vocab_size=37, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = FathomForCausalLM(config).train()
    ids = torch.randint(37, (2, 24))
    labels = ids.clone()
    labels[0, :7] = -100
    results = []
    for skip_logits in (False, True):
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, skip_logits=skip_logits, num_items_in_batch=50)
        output.loss.backward()
        assert (output.logits is None) == skip_logits
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.loss, output.mtp_loss, gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)

"""Products by oneDNN against `F.linear`, and where they are not called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import products

callable_here = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of PyTorch has no oneDNN"
)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Products that oneDNN is given, on every processor."""
    found, times = [], products.times
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "times", lambda a, b: found.append((a.shape, b.shape)) or times(a, b))
    return found


@callable_here
@pytest.mark.parametrize("shape", [(300,), (4, 77)], ids=["matrix", "rows of tokens"])
@pytest.mark.parametrize("strided", [False, True])
def test_outputs_and_gradients_are_those_of_a_linear_map(shape, strided, calls) -> None:
    x = torch.randn(*shape, 48 if strided else 24)[..., :24].requires_grad_()
    weight = torch.randn(40, 24, requires_grad=True)
    direction = torch.randn(*shape, 80)[..., ::2]
    results = []
    for function in (F.linear, products.linear):
        output = function(x, weight)
        results.append((output, *torch.autograd.grad(output, (x, weight), direction)))
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert len(calls) == 3


@callable_here
def test_no_gradient_is_computed_that_nobody_asks_for(calls) -> None:
    x, weight = torch.randn(300, 24), torch.randn(40, 24)
    products.linear(x, weight.clone().requires_grad_()).sum().backward()
    assert calls[1:] == [((24, 300), (40, 300))]
    calls.clear()
    products.linear(x.requires_grad_(), weight).sum().backward()
    assert calls[1:] == [((300, 40), (24, 40))]


def test_elsewhere_the_definition_serves(calls, monkeypatch) -> None:
    x, weight = torch.randn(300, 24), torch.randn(40, 24)
    expected = F.linear(x, weight)

    def definition_serves(x=x, weight=weight) -> bool:
        calls.clear()
        torch.testing.assert_close(products.linear(x, weight).float(), expected[: len(x)], rtol=0.05, atol=0.5)
        return not calls

    assert definition_serves(x[:100]), "few tokens"
    assert definition_serves(x.bfloat16(), weight.bfloat16())
    assert definition_serves(x, weight.t().contiguous().t())
    with torch.autocast("cpu", torch.bfloat16):
        assert definition_serves()
    with torch.backends.mkldnn.flags(enabled=False):
        assert definition_serves()
    assert torch.func.vmap(lambda row: products.linear(row, weight))(torch.randn(2, 300, 24)).shape == (2, 300, 40)
    assert not calls
    torch.compile(products.linear, backend="eager", fullgraph=True)(x, weight)
    assert not calls
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    assert definition_serves()


def test_a_module_with_more_than_a_weight_is_called(calls) -> None:
    """Adapters and hooks have to be heard."""
    module = nn.Linear(24, 40, bias=False)
    hooked = []
    module.register_forward_hook(lambda *_: hooked.append(1))
    products.mapped(torch.randn(300, 24), module)
    products.project(torch.randn(1, 300, 24), nn.Linear(24, 40), nn.Linear(24, 40, bias=False).eval())
    assert hooked
    assert not calls


@callable_here
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3"])
def test_a_training_step_is_that_of_the_definitions(generation, checkpointing, calls, monkeypatch) -> None:
    """With whole blocks of queries and many rows per expert, so that every fast path of a step is taken."""
    experts = {} if generation == "classic" else {"n_routed_experts": 4, "num_experts_per_tok": 3}
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 97, **experts}
    ids = torch.randint(3, 97, (2, 256), generator=torch.Generator().manual_seed(0))
    results = []
    for settings in ({"attn_implementation": "eager", "experts_implementation": "eager"}, {}):
        calls.clear()
        monkeypatch.setattr(products, "onednn_is_faster", lambda settings=settings: not settings)
        torch.manual_seed(0)
        model = FathomForCausalLM(FathomConfig.preset(generation, **sizes, **settings)).train()
        if checkpointing is not None and not settings:
            model.activation_checkpointing_enable({"use_reentrant": checkpointing})
        loss = model(ids, labels=ids, skip_logits=not settings).loss
        loss.backward()
        results.append([loss, *(each.grad for each in model.parameters() if each.requires_grad)])
        assert bool(calls) == (not settings)
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

"""Hyper-connections against a float64 computation written from DeepSeek-V4's equations, token by token."""

import math

import pytest
import torch
from torch import nn

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.hyper_connections import HyperConnection, StreamCollapse, sinkhorn

WIDTH, EPS = 6, 1e-6


def config(streams: int = 4, **overrides) -> FathomConfig:
    return FathomConfig.preset(
        "v3", **{"hidden_size": 64, "vocab_size": 97, "num_hidden_layers": 3, "hc_mult": streams, **overrides}
    )


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_definition(module: HyperConnection, streams: torch.Tensor, output: torch.Tensor):
    """One token: streams [n, d] and the sub-layer's output [d] -> its input [d] and the new streams [n, d]."""
    n = streams.shape[0]
    fn, base, scale = (parameter.double() for parameter in (module.fn, module.base, module.scale))
    flat = streams.flatten()
    m = (fn @ flat) / torch.sqrt(flat.square().mean() + EPS)
    pre = [sigmoid(m[i] * scale[0] + base[i]) + EPS for i in range(n)]
    post = [2 * sigmoid(m[n + i] * scale[1] + base[n + i]) for i in range(n)]
    matrix = [[math.exp(m[2 * n + i * n + j] * scale[2] + base[2 * n + i * n + j]) for j in range(n)] for i in range(n)]
    matrix = [[value / sum(row) + EPS for value in row] for row in matrix]
    for step in range(20):
        if step:
            matrix = [[value / (sum(row) + EPS) for value in row] for row in matrix]
        columns = [sum(row[j] for row in matrix) + EPS for j in range(n)]
        matrix = [[row[j] / columns[j] for j in range(n)] for row in matrix]
    read = sum(pre[j] * streams[j] for j in range(n))
    written = [post[k] * output + sum(matrix[j][k] * streams[j] for j in range(n)) for k in range(n)]
    return read, torch.stack(written)


@torch.no_grad()
@pytest.mark.parametrize("n", [2, 4])
def test_read_and_write_by_definition(n):
    settings = config(n)
    settings.hidden_size = WIDTH
    module = randomised(HyperConnection(settings))
    streams, output = torch.randn(2, 5, n, WIDTH), torch.randn(2, 5, WIDTH)
    read, mixing = module(streams)
    written = module.write(streams, output, mixing)
    for b in range(2):
        for t in range(5):
            expected = by_definition(module, streams[b, t].double(), output[b, t].double())
            torch.testing.assert_close(read[b, t].double(), expected[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(written[b, t].double(), expected[1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_collapse_by_definition():
    settings = config()
    settings.hidden_size = WIDTH
    module = randomised(StreamCollapse(settings))
    streams = torch.randn(1, 3, 4, WIDTH)
    collapsed = module(streams)
    for t in range(3):
        token = streams[0, t].double()
        m = module.hc_fn.double() @ token.flatten() / torch.sqrt(token.square().mean() + EPS)
        weights = torch.sigmoid(m * module.hc_scale.double() + module.hc_base.double()) + EPS
        torch.testing.assert_close(collapsed[0, t].double(), weights @ token, atol=1e-5, rtol=1e-5)


def test_mixing_matrices_are_doubly_stochastic():
    matrix = sinkhorn(torch.randn(7, 4, 4), 20, EPS)
    assert (matrix > 0).all()
    torch.testing.assert_close(matrix.sum(dim=-2), torch.ones(7, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(7, 4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("streams", [2, 4])
@torch.no_grad()
def test_the_untrained_network_is_the_plain_residual_network(streams):
    model = FathomForCausalLM(config(streams, num_nextn_predict_layers=0)).eval()
    plain = FathomForCausalLM(config(1, num_nextn_predict_layers=0)).eval()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "hc" not in name})
    tokens = torch.randint(3, 97, (2, 20))
    outputs = [each(tokens, output_hidden_states=True) for each in (model, plain)]
    for ours, theirs in zip(outputs[0].hidden_states[:-1], outputs[1].hidden_states[:-1], strict=True):
        # Before the last norm; every stream is the residual.
        torch.testing.assert_close(ours, theirs.unsqueeze(2).expand_as(ours), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_untrained_streams_keep_what_they_have():
    _, mixing = FathomForCausalLM(config()).model.layers[0].attn_hc(torch.randn(2, 5, 4, 64))
    assert mixing.residual.diagonal(dim1=-2, dim2=-1).min() > 0.9


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("depths", [1, 2])
def test_every_parameter_gets_a_gradient(checkpointing, depths):
    torch.manual_seed(0)
    model = FathomForCausalLM(config(num_nextn_predict_layers=depths)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    tokens = torch.randint(3, 97, (4, 32))
    model(tokens, labels=tokens).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_cast_to_bf16():
    """Weights of the mixing are computed in fp32 whatever the dtype of the model; hidden states keep theirs."""
    torch.manual_seed(0)
    model = FathomForCausalLM(config()).eval()
    tokens = torch.randint(3, 97, (2, 20))
    expected = model(tokens).logits
    logits = model.to(torch.bfloat16)(tokens).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_sinkhorn_by_its_steps(spread):
    """Every step carried out on the matrix itself, eps included; large logits leave columns that are hardly more."""
    torch.manual_seed(0)
    logits = (spread * torch.randn(2, 7, 4, 4, dtype=torch.double)).requires_grad_()
    matrix = logits.softmax(dim=-1) + EPS
    for step in range(9):
        matrix = matrix / (matrix.sum(dim=-1 if step % 2 else -2, keepdim=True) + EPS)
    result, upstream = sinkhorn(logits, 5, EPS), torch.randn_like(matrix)
    torch.testing.assert_close(result, matrix, rtol=1e-10, atol=0)
    torch.testing.assert_close(sinkhorn(logits[0, 0], 5, EPS), result[0, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(sinkhorn(logits.float(), 5, EPS).double(), matrix, rtol=1e-5, atol=1e-6)
    (gradient,), (expected,) = (torch.autograd.grad(each, logits, upstream) for each in (result, matrix))
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-10)

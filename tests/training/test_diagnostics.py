"""Figures about balance and residual streams against computations by hand."""

import pytest
import torch
from tiny_runs import model

from fathom.training.diagnostics import StreamProbe, balance_by_layer, router_layers

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def connections(trained):
    return [part for layer in trained.model.layers[:2] for part in (layer.attn_hc, layer.ffn_hc)]


@torch.no_grad()
def test_an_untrained_model_neither_amplifies_nor_distinguishes_streams():
    trained = model(hc_mult=4).eval()
    with StreamProbe(trained) as probe:
        trained(IDS)
    figures = probe.metrics()
    assert figures["amax_gain_forward"] == pytest.approx(1, abs=1e-3)
    assert figures["amax_gain_backward"] == pytest.approx(1, abs=0.02)
    assert figures["stream_similarity"] == pytest.approx(1, abs=1e-3)
    assert 0 < figures["off_diagonal_mass"] < 0.06


@torch.no_grad()
def test_gains_and_off_diagonal_mass_of_given_matrices(monkeypatch):
    """Two sub-layers double stream 0 and pass it on to stream 1, two leave all as it is."""
    trained = model(hc_mult=2).eval()
    doubling, identity = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.eye(2)
    for connection, matrix in zip(connections(trained), (doubling, identity, doubling, identity), strict=True):
        # Not a doubly stochastic matrix, hence put behind Sinkhorn's back.
        forward = type(connection).forward

        def replaced(streams, connection=connection, matrix=matrix, forward=forward):
            read, mixing = forward(connection, streams)
            return read, mixing._replace(residual=matrix.expand_as(mixing.residual))

        monkeypatch.setattr(connection, "forward", replaced)
    with StreamProbe(trained) as probe:
        trained(IDS)
    figures = probe.metrics()
    product = doubling.T @ doubling.T  # [[4, 0], [3, 1]]
    assert product.tolist() == [[4.0, 0.0], [3.0, 1.0]]
    assert figures["amax_gain_forward"] == 4
    assert figures["amax_gain_backward"] == 7
    assert figures["off_diagonal_mass"] == 1 / 4


@torch.no_grad()
def test_similarity_of_streams_that_differ():
    trained = model(hc_mult=2).eval()
    with StreamProbe(trained) as probe:
        trained(IDS)
        trained.model.hc_head(torch.stack((torch.ones(1, 3, 64), -torch.ones(1, 3, 64)), dim=2))
    assert probe.metrics()["stream_similarity"] == pytest.approx(-1)


def test_no_figures_without_streams():
    trained = model().eval()
    with StreamProbe(trained) as probe:
        trained(IDS)
    assert probe.metrics() == {}


def test_balance_of_each_layer():
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [8.0, 6.0, 2.0, 0.0]])
    assert balance_by_layer(load, [1, 3]) == {
        "max_vio_layer_1": 0,
        "min_load_layer_1": 1,
        "dead_experts_layer_1": 0,
        "max_vio_layer_3": 1,
        "min_load_layer_3": 0,
        "dead_experts_layer_3": 1,
    }


def test_routers_are_found_in_their_layers():
    trained = model(num_hidden_layers=3, first_k_dense_replace=1)
    assert router_layers(trained) == [1, 2, 3]  # the last one is the MTP layer's

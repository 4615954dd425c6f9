"""Masks of decoding steps against those of transformers."""

import pytest
import torch
from transformers.masking_utils import create_causal_mask

from fathom.modeling import masks
from fathom.modeling.configuration_fathom import FathomConfig
from fathom.modeling.masks import causal_mask
from fathom.modeling.modeling_fathom import FathomForCausalLM


def whole(mask: torch.Tensor | None, rows: int, tokens: int, keys: int) -> torch.Tensor:
    if mask is None:
        return torch.ones(rows, 1, tokens, keys, dtype=torch.bool)
    assert mask.dtype is torch.bool
    return mask.expand(rows, 1, tokens, keys)


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("padding", ["unsaid", "none", "left", "between"])
def test_masks_of_steps(tokens, padding, monkeypatch):
    model = FathomForCausalLM(FathomConfig.preset("v3", num_nextn_predict_layers=0, num_hidden_layers=2)).eval()
    ids = torch.randint(5, 4000, (3, 20))
    mask = torch.ones(3, 20 + tokens, dtype=torch.int64)
    if padding in ("left", "between"):
        mask[1, :4] = 0
    if padding == "between":
        mask[2, 19:21] = 0
    given = None if padding == "unsaid" else mask
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache
    positions = (torch.arange(tokens) + 20).expand(3, -1)
    arguments = model.config, torch.zeros(3, tokens, 8), given, cache, positions
    monkeypatch.setattr(masks, "create_causal_mask", None)  # made without it
    found = causal_mask(*arguments)
    expected = create_causal_mask(*arguments)
    assert torch.equal(whole(found, 3, tokens, 20 + tokens), whole(expected, 3, tokens, 20 + tokens))


def test_everything_else_is_for_transformers():
    """An empty cache, other backends, masks of other shapes."""
    config = FathomConfig.preset("v3", num_nextn_predict_layers=0, num_hidden_layers=2, attn_implementation="sdpa")
    model = FathomForCausalLM(config).eval()
    with torch.no_grad():
        cache = model(torch.randint(5, 4000, (1, 20)), use_cache=True).cache
    positions, embeds = torch.tensor([[20]]), torch.zeros(1, 1, 8)
    made = torch.ones(1, 1, 1, 21, dtype=torch.bool)
    assert causal_mask(config, embeds, made, cache, positions) is made
    assert causal_mask(config, embeds, None, None, positions) is None
    config._attn_implementation = "eager"
    additive = causal_mask(config, torch.zeros(1, 2, 8), None, cache, torch.tensor([[20, 21]]))
    assert additive.is_floating_point()
    assert additive.shape == (1, 1, 2, 22)

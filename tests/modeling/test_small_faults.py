"""Uses that once ended in an error of PyTorch's: other numbers of rows in a static cache, models in float64."""

import pytest
import torch
from generations import GENERATIONS, model, tokens
from transformers import StaticCache

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2, "disable_compile": True}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_static_cache_takes_another_number_of_rows_after_reset(generation):
    ours, ids = model(generation), tokens(batch=4, length=12)
    cache = StaticCache(config=ours.config, max_cache_len=40)
    for rows in (4, 2, 3):
        expected = ours.generate(ids[:rows], **GREEDY)
        torch.testing.assert_close(ours.generate(ids[:rows], cache=cache, **GREEDY), expected)
        cache.reset()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_model_in_float64_computes_in_it(generation):
    """No kernel that knows fp32 alone is asked; experts in a loop are the definition."""
    ours, ids = model(generation).double(), tokens()
    logits = ours(ids).logits
    assert logits.dtype == torch.float64
    ours.config._experts_implementation = "eager"
    torch.testing.assert_close(logits, ours(ids).logits, atol=1e-12, rtol=0)

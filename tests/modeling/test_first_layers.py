"""`from_pretrained(folder, num_hidden_layers=2)`: a shorter model made of what a folder holds, and of nothing else."""

import re

import pytest
import torch
from torch import nn

from fathom import FathomConfig, FathomForCausalLM


def small(generation: str) -> FathomForCausalLM:
    shape = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    if generation == "classic":
        return FathomForCausalLM(FathomConfig.preset(generation, **shape)).eval()
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    return FathomForCausalLM(FathomConfig.preset(generation, **shape, **experts)).eval()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one file", "shards"])
@pytest.mark.parametrize("generation", ["classic", "moe", "v2", "v3", "v3.2", "v4"])
def test_the_first_layers_of_a_checkpoint(generation, shards, tmp_path):
    """With a smaller `num_hidden_layers`: the first ones and the MTP layer, which is stored behind all of them."""
    whole = small(generation)
    whole.save_pretrained(tmp_path, **shards)
    model, report = FathomForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert (model.config.num_hidden_layers, len(model.model.mtp_layers)) == (2, len(whole.model.mtp_layers))
    expected = whole.state_dict()
    for name, value in model.state_dict().items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= 2:
            name = name.replace(layer[0], f"layers.{int(layer[1]) + 2}.")
        assert torch.equal(value, expected[name]), name
    # The same model, made by hand of the parts of the whole one.
    layers = whole.model.layers
    whole.model.layers = nn.ModuleList([*layers[:2], *layers[4:]])
    whole.config = whole.model.config = model.config
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole.eval()(ids).logits, atol=1e-5, rtol=0)
    assert model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] == 20


def test_fields_given_to_from_pretrained_are_checked(tmp_path):
    small("v3").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="n_group=3"):
        FathomConfig.from_pretrained(tmp_path, n_group=3)
    assert FathomConfig.from_pretrained(tmp_path, hidden_act="gelu", use_cache=False).use_cache is False


def test_more_layers_than_are_stored_are_said_to_be_missing(tmp_path):
    """The stored MTP layer is no main layer."""
    small("v3").save_pretrained(tmp_path)
    model, report = FathomForCausalLM.from_pretrained(tmp_path, num_hidden_layers=6, output_loading_info=True)
    assert {name.split(".")[2] for name in report["missing_keys"]} == {"4", "5"}
    assert len(model.model.mtp_layers) == 1

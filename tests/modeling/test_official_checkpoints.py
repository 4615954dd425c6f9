"""Checkpoints that others wrote: transformers' four DeepSeek classes, and DeepSeek itself."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_models import CLASSES, greedy, ids, stock_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fathom import FathomConfig, FathomForCausalLM, FathomModel, register_deepseek
from fathom.modeling.conversion import name_in_memory, name_on_disk

TOLERANCE = 1e-4


def load(folder: Path, **options) -> FathomForCausalLM:
    """Loads without anything missing, left over or of another shape."""
    model, report = FathomForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("generation", CLASSES)
def test_a_folder_of_transformers_classes(tmp_path, generation, seed):
    stock = stock_model(generation, seed)
    stock.save_pretrained(tmp_path, max_shard_size="60KB" if seed % 2 else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == bool(seed % 2)
    ours = load(tmp_path)
    tokens = ids(stock, 2, 45)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)
    assert torch.equal(greedy(ours, tokens), greedy(stock, tokens))


@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_mtp_layers_that_are_promised_but_absent_are_left_out(tmp_path, generation, caplog, monkeypatch):
    """transformers writes the config of the MTP layers that it has dropped. Random ones would pass for trained."""
    stock = stock_model(generation, num_nextn_predict_layers=2)
    stock.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 2
    with caplog.at_level(logging.WARNING):
        ours = load(tmp_path)
    assert "num_nextn_predict_layers=2 but holds no weights of MTP layers" in caplog.text
    assert ours.config.num_nextn_predict_layers == 0
    assert len(ours.model.layers) == stock.config.num_hidden_layers
    tokens = ids(stock, 1, 20)
    assert ours.train()(tokens, labels=tokens).mtp_loss is None
    ours.save_pretrained(tmp_path / "ours")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "ours")
    assert "MTP" not in caplog.text


def test_reading_a_known_type_warns_of_nothing(tmp_path, caplog, monkeypatch):
    stock_model("v2").save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("generation", CLASSES)
def test_auto_classes_make_our_models_where_asked(tmp_path, generation, monkeypatch):
    stock_class = CLASSES[generation][1]
    stock_model(generation).save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is stock_class
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))
    register_deepseek()
    assert type(AutoConfig.from_pretrained(tmp_path)) is FathomConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is FathomForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is FathomModel
    assert type(stock_class.from_pretrained(tmp_path)) is stock_class


# As in the releases, but small: config.json beside the weights, and that of the inference code.
V4_CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "compress_ratios": [0, 4, 16, 4, 0],
    "compress_rate_hca": 16,
    "compress_rope_theta": 160000,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 16,
    "index_n_heads": 32,
    "index_topk": 9,
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 2,
    "o_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 64,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 11,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 97,
}
V4_INFERENCE_CONFIG = {
    "vocab_size": 97,
    "dim": 64,
    "moe_inter_dim": 32,
    "n_layers": 4,
    "n_hash_layers": 1,
    "n_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_activated_experts": 2,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 32,
    "head_dim": 32,
    "rope_head_dim": 8,
    "o_groups": 2,
    "o_lora_rank": 32,
    "window_size": 11,
    "original_seq_len": 64,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 9,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 4, 16, 4, 0],
    "compress_rate_hca": 16,
}


def v4_release(folder: Path, config_json: dict) -> FathomForCausalLM:
    """Writes a folder in DeepSeek's naming; returns the model that it holds."""
    torch.manual_seed(0)
    model = FathomForCausalLM(FathomConfig.from_dict(V4_CONFIG)).eval()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dim() == 1 and value.is_floating_point() and "inv_freq" not in name:
            value.data.normal_(mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)
    # The copies that some releases hold.
    file = folder / "model.safetensors"
    tensors = load_file(file)
    copies = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}
    tensors.update({copy: tensors[name].clone() for copy, name in copies.items()})
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_json))
    return model


@torch.no_grad()
@pytest.mark.parametrize("config_json", [V4_CONFIG, V4_INFERENCE_CONFIG], ids=["config", "inference config"])
def test_deepseeks_own_naming_of_v4(tmp_path, config_json):
    released = v4_release(tmp_path, config_json)
    ours = load(tmp_path, dtype=torch.float32)
    expected = released.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, expected[name]), name
    tokens = ids(ours, 2, 60)
    outputs, wanted = (model(tokens, labels=tokens) for model in (ours, released))
    assert torch.equal(outputs.logits, wanted.logits)
    assert torch.equal(outputs.mtp_loss, wanted.mtp_loss)
    base = FathomModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(base(tokens).last_hidden_state, released.model(tokens).last_hidden_state)


def test_the_inference_config_says_the_same():
    """What it does not mention is about training and text."""
    beside_weights, beside_code = (FathomConfig.from_dict(c).to_dict() for c in (V4_CONFIG, V4_INFERENCE_CONFIG))
    silent = {"architectures", "dtype"}
    different = {name for name in beside_weights if beside_weights[name] != beside_code.get(name)}
    assert different <= silent


def test_names_are_a_bijection():
    """Every tensor has one name on disk, and its name in memory back."""
    config = FathomConfig.from_dict(
        {**V4_CONFIG, "num_nextn_predict_layers": 2, "compress_ratios": [0, 4, 16, 4, 0, 0]}
    )
    with torch.device("meta"):
        names = [
            name.replace("experts.gate_up_proj", "experts.1.up_proj.weight").replace("experts.down_proj", "experts.1.x")
            for name in FathomForCausalLM(config).state_dict()
        ]
    on_disk = [name_on_disk(name, config) for name in names]
    assert len(set(on_disk)) == len(names)
    assert [name_in_memory(name, config) for name in on_disk] == names
    assert [name_in_memory(name, config) for name in names] == names

"""Configurations: presets, what cannot work and how to mend it, DeepSeek's own config.json, parameter counts."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.presets import GENERATIONS, OFFICIAL

# The release's config.json without `quantization_config` (https://huggingface.co/deepseek-ai/DeepSeek-V3).
DEEPSEEK_V3_CONFIG_JSON = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def own_fields(config: FathomConfig) -> dict:
    """The values of the fields that `FathomConfig` itself declares, without transformers' bookkeeping."""
    inherited = {field.name for field in fields(PreTrainedConfig)} - {"tie_word_embeddings", "bos_token_id"}
    return {field.name: getattr(config, field.name) for field in fields(FathomConfig) if field.name not in inherited}


@pytest.mark.parametrize("size", ["nano", "micro", "small"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_preset_builds(generation, size):
    config = FathomConfig.preset(generation, size=size)
    assert config.generation == generation
    with torch.device("meta"):
        counts = FathomForCausalLM(config).parameter_counts()
    assert 0 < counts["embedding"] < counts["active"] <= counts["total"]
    assert (counts["mtp"] > 0) == (generation in ("v3", "v3.2", "v4"))


WIDTHS = {
    "v3": ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size"),
    "v4": ("num_attention_heads", "q_lora_rank", "o_groups", "moe_intermediate_size"),
    "classic": ("num_attention_heads", "num_key_value_heads", "intermediate_size"),
    "moe": ("num_attention_heads", "intermediate_size", "moe_intermediate_size"),
    "v2": ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "intermediate_size", "moe_intermediate_size"),
}
FIXED = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim", "n_routed_experts", "num_experts_per_tok")


@pytest.mark.parametrize("generation", WIDTHS)
def test_sizes_follow_from_one_dial(generation):
    """Twice the width has twice the heads, ranks and inner widths; a head, and the number of experts, stay."""
    one = FathomConfig.preset(generation, size="micro", hidden_size=512)
    two = FathomConfig.preset(generation, size="micro", hidden_size=1024)
    for field in WIDTHS[generation]:
        assert getattr(two, field) == 2 * getattr(one, field), field
    for field in (*FIXED, "num_hidden_layers", "vocab_size"):
        assert getattr(two, field) == getattr(one, field), field


def test_overrides_win():
    config = FathomConfig.preset("v3", size="micro", num_experts_per_tok=2, moe_intermediate_size=24, vocab_size=300)
    assert (config.num_experts_per_tok, config.moe_intermediate_size, config.vocab_size) == (2, 24, 300)
    assert FathomConfig.preset("v3-671b", num_hidden_layers=5).num_hidden_layers == 5


def test_kinds_of_layers():
    config = FathomConfig.preset("v3", num_hidden_layers=3, num_nextn_predict_layers=2)
    assert [config.channel_mixer(i) for i in range(5)] == ["dense", "moe", "moe", "moe", "moe"]
    mixed = FathomConfig.preset("v3", num_hidden_layers=2, channel_mixers=["moe", "dense", "moe"])
    assert [mixed.channel_mixer(i) for i in range(3)] == ["moe", "dense", "moe"]
    assert mixed.uses("mla")
    assert not mixed.uses("mha")


YARN = {"rope_type": "yarn", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"swiglu_limit": 0}, "swiglu_limit=0 must be above 0, or None"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"hidden_size": "256"}, "hidden_size='256' must be a whole number"),
        ({"hidden_size": 8}, "num_attention_heads=0 must be at least 1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1 must be 0 or more"),
        (
            {"token_mixers": ["mla"] * 4},
            "token_mixers has 4 entries for 4 layers and 1 MTP layers; give one kind, or 5",
        ),
        ({"token_mixers": "mlaa"}, "unknown kind 'mlaa' in token_mixers; did you mean mla"),
        ({"channel_mixers": "mo"}, "unknown kind 'mo' in channel_mixers; did you mean moe"),
        ({"token_mixers": ["mla", "mla", "mha", "mla", "mla"]}, "choose mha for all layers, or none"),
        ({"position_embedding_type": "sinusoidal"}, "set position_embedding_type='rope'"),
        ({"position_embedding_type": "learned"}, "known: rope, sinusoidal"),
        ({"scoring_func": "softmx"}, "scoring_func='softmx' is not known; did you mean softmax?; known: sigmoid, soft"),
        ({"topk_method": "best"}, "topk_method='best' is not known; known: greedy, group_limited_greedy, noaux_tc"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 must be 1; list each layer's kind in channel_mixers instead"),
        ({"topk_method": "group_limited_greedy", "n_group": 3}, "n_routed_experts=16 must be a multiple of n_group=3"),
        ({"hidden_act": "swilu"}, "hidden_act='swilu' is not known; did you mean silu"),
        ({"hc_mult": 0}, "hc_mult=0 must be at least 1"),
        ({"hc_mult": 4, "hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters=0 must be at least 1"),
        ({"hc_mult": 4, "hc_eps": 0.0}, "hc_eps=0.0 must be above 0"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15 must be even"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim=0 must be at least 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1, or None"),
        ({"v_head_dim": 0}, "v_head_dim=0 must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0 must be at least 1"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 must be between 1 and n_routed_experts=16"),
        ({"n_group": 3}, "n_routed_experts=16 must be a multiple of n_group=3"),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5 must be between 1 and n_group=4"),
        ({"n_group": 16, "topk_group": 8}, "set n_group to 8 or less"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be 0 or more"),
        ({"pad_token_id": 4096}, "pad_token_id=4096 must be below vocab_size=4096; raise vocab_size"),
        ({"attention_dropout": 1.0}, "attention_dropout=1.0 must be at least 0 and below 1"),
        (
            {"rope_parameters": {"rope_type": "yran", "rope_theta": 1e4}},
            "rope_type='yran' is not known; did you mean yarn",
        ),
        ({"rope_parameters": YARN}, "rope_type='yarn' needs a factor of at least 1 in rope_parameters, not None"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "rope_type='yarn' needs a factor of at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_combinations_say_how_to_mend_them(overrides, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below, literally
        FathomConfig.preset("v3", **overrides)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_attention_heads=8 must be a multiple of num_key_v"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        (
            {"num_attention_heads": 512, "head_dim": None},
            "hidden_size=256 is below num_attention_heads=512; set head_dim",
        ),
        ({"position_embedding_type": "rope", "head_dim": 7}, "head_dim=7 must be even"),
    ],
)
def test_impossible_heads(overrides, says):
    with pytest.raises(ValueError, match=says):
        FathomConfig.preset("classic", **overrides)


@pytest.mark.parametrize(
    ("arguments", "overrides", "says"),
    [
        (("v33",), {}, "unknown preset 'v33'; did you mean v3"),
        (("clasic",), {}, "did you mean classic"),
        (("v3", "nanno"), {}, "unknown size 'nanno' of v3; did you mean nano"),
        (("v3", "671"), {}, "did you mean 671b"),
        (("v3",), {"num_hiden_layers": 2}, "no field 'num_hiden_layers'; did you mean num_hidden_layers"),
    ],
)
def test_unknown_names_name_the_nearest(arguments, overrides, says):
    with pytest.raises(ValueError, match=says):
        FathomConfig.preset(*arguments, **overrides)


def test_zero_switches_off_what_it_weighs():
    """Whole numbers are as good as fractions: 0 is how these are switched off, in Python and in YAML."""
    config = FathomConfig.preset("v3", router_bias_update_speed=0, seq_aux_loss_coef=0, mtp_loss_weight=0)
    assert config.router_bias_update_speed == config.seq_aux_loss_coef == config.mtp_loss_weight == 0


def test_official_config_json_is_the_official_preset(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3_CONFIG_JSON))
    read, preset = FathomConfig.from_pretrained(tmp_path), FathomConfig.preset("v3", size="671b")
    assert own_fields(preset) == own_fields(FathomConfig.preset("v3-671b"))
    mine, official = own_fields(preset), own_fields(read)
    official["rope_parameters"].pop("type", None)  # the older spelling of rope_type, which transformers keeps
    assert mine == official


RECOUNTED = {
    "moe-16b": {"total": 16.4, "active": 2.8, "embedding": 0.4, "mtp": 0.0},
    "v2-lite": {"total": 15.7, "active": 2.7, "embedding": 0.4, "mtp": 0.0},
    "v2-236b": {"total": 235.7, "active": 21.4, "embedding": 1.0, "mtp": 0.0},
    # The MTP module has 11.5 B parameters by README_WEIGHTS.md of the release; by its own shapes 11.61 B.
    "v3-671b": {"total": 671.0, "active": 37.6, "embedding": 1.9, "mtp": 11.6},
    # V3 and 61 indexers of 1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128 = 14.0 million.
    "v3.2-671b": {"total": 671.9, "active": 38.4, "embedding": 1.9, "mtp": 11.6},
    "v4-flash": {"total": 284.3, "active": 13.8, "embedding": 1.1, "mtp": 6.6},
    "v4-pro": {"total": 1573.0, "active": 49.8, "embedding": 1.9, "mtp": 25.8},
}


def counts_of(name: str) -> dict[str, int]:
    with torch.device("meta"):
        return FathomForCausalLM(FathomConfig.preset(name)).parameter_counts()


@pytest.mark.parametrize("name", RECOUNTED)
def test_parameter_counts_of_the_releases(name):
    assert {kind: round(count / 1e9, 1) for kind, count in counts_of(name).items()} == RECOUNTED[name]


def test_active_parameters_of_v3_by_hand():
    """From the shapes in DeepSeek-V3, section 4.2: what one token is multiplied with, and the row that it looks up."""
    attention = 7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168 + 1536 + 512
    dense, experts = 3 * 7168 * 18432, 9 * 3 * 7168 * 2048 + 256 * 7168
    layers = 61 * (attention + 2 * 7168) + 3 * dense + 58 * experts
    assert counts_of("v3-671b")["active"] == layers + 7168 + 2 * 129280 * 7168


# As printed, in billions. The input embedding, a table in which rows are looked up, is among the active parameters of
# DeepSeekMoE (2.83 B with it, 2.62 B without), and not of the releases since: V2 has 20.9 B without it and 21.4 B with
# it, V3 36.6 B and 37.6 B, V4-Flash 13.3 B and 13.8 B, V4-Pro 48.9 B and 49.8 B.
@pytest.mark.parametrize(
    ("name", "total", "active", "counts_lookup"),
    [
        ("moe-16b", "16.4", "2.8", True),  # DeepSeekMoE, arXiv 2401.06066, section 5.1.2
        ("v2-236b", "236", "21", False),  # DeepSeek-V2, arXiv 2405.04434, section 3.1.2
        ("v3-671b", "671", "37", False),  # DeepSeek-V3, arXiv 2412.19437, abstract
        ("v4-flash", "284", "13", False),  # DeepSeek-V4's report, section 4.2.1
    ],
)
def test_parameter_counts_round_to_the_published_ones(name, total, active, counts_lookup):
    config, counts = FathomConfig.preset(name), counts_of(name)
    lookup = 0 if counts_lookup else config.vocab_size * config.hidden_size
    for count, printed in ((counts["total"], total), (counts["active"] - lookup, active)):
        digits = len(printed.partition(".")[2])
        assert round(count / 1e9, digits) == float(printed)
    assert counts["total"] / 1e9 == pytest.approx(float(total), rel=0.015)


def test_parameter_counts_of_v4_pro():
    """The published 1.6 T has two digits: its shapes give 1.573 T, 1.7 % less. 49 B are active."""
    config, counts = FathomConfig.preset("v4-pro"), counts_of("v4-pro")
    assert counts["total"] / 1e12 == pytest.approx(1.573, rel=1e-4)
    assert f"{counts['total'] / 1e12:.1f}" == "1.6"
    assert round((counts["active"] - config.vocab_size * config.hidden_size) / 1e9) == 49


def test_parameter_counts_of_v2_lite():
    """The published 2.4 B are 2.451 B, cut off: all that a token uses but the input embedding.

    Without the head, too, it is 2.24 B, what Moonlight, a model of the same shape, calls its active parameters.
    """
    config, counts = FathomConfig.preset("v2-lite"), counts_of("v2-lite")
    lookup = config.vocab_size * config.hidden_size
    assert counts["total"] / 1e9 == pytest.approx(15.7, rel=0.015)
    assert int((counts["active"] - lookup) / 1e8) == 24
    assert (counts["active"] - counts["embedding"]) / 1e9 == pytest.approx(2.24, abs=0.005)


# The release's config.json is V3's but for these (https://huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp).
DEEPSEEK_V32_CONFIG_JSON = {
    **DEEPSEEK_V3_CONFIG_JSON,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}


def test_v32_config_json_is_the_official_preset(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V32_CONFIG_JSON))
    read = FathomConfig.from_pretrained(tmp_path)
    read.rope_parameters.pop("type", None)
    assert own_fields(read) == own_fields(FathomConfig.preset("v3.2", size="671b"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"q_lora_rank": None}, "token_mixers 'dsa' selects by compressed queries; set q_lora_rank, or use 'mla'"),
        ({"index_head_dim": 8}, "index_head_dim=8 must be at least qk_rope_head_dim=16"),
        ({"index_topk": 0}, "index_topk=0 must be at least 1"),
        ({"index_n_heads": 0}, "index_n_heads=0 must be at least 1"),
        ({"token_mixers": ["dsa", "mha", "dsa", "dsa", "dsa"]}, "choose mha for all layers, or none"),
    ],
    ids=str,
)
def test_impossible_indexers(overrides, says):
    with pytest.raises(ValueError, match=says):
        FathomConfig.preset("v3.2", **overrides)


@pytest.mark.parametrize("generation", ["classic", "v3", "v3.2"])
def test_a_window_that_no_layer_has_is_refused(generation):
    """transformers' caches would drop the tokens beyond it, and decoding differ from prefill."""
    with pytest.raises(ValueError, match="sliding_window=11 is for swa, csa and hca layers"):
        FathomConfig.preset(generation, sliding_window=11)


def test_transformers_names_of_v4_layers_are_enough():
    """As transformers' own tests of V4 say them: without `compress_rates`, whose defaults are ours."""
    kinds = ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"]
    config = FathomConfig.preset(
        "v4", num_hidden_layers=3, num_nextn_predict_layers=0, token_mixers=None, channel_mixers=None
    )
    named = FathomConfig(
        **{**config.to_dict(), "token_mixers": None},
        layer_types=kinds,
        mlp_layer_types=["hash_moe", "moe", "moe"],
    )
    assert named.token_mixers == ["swa", "hca", "csa"]
    assert named.channel_mixers == ["hash", "moe", "moe"]


def test_a_window_in_a_file_that_no_layer_has_is_forgotten(tmp_path):
    config = FathomConfig.preset("v3.2")
    config.sliding_window = 2
    config.save_pretrained(tmp_path)
    assert FathomConfig.from_pretrained(tmp_path).sliding_window is None


def test_sparse_and_dense_layers_in_one_model():
    config = FathomConfig.preset("v3.2", token_mixers=["mla", "dsa", "mla", "dsa", "mla"])
    assert config.head_dim == config.qk_rope_head_dim
    with torch.device("meta"):
        layers = FathomForCausalLM(config).model.layers
    assert [hasattr(layer.self_attn, "indexer") for layer in layers] == [False, True, False, True, False]


# The release's config.json (https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash), what matters to the model.
DEEPSEEK_V4_FLASH_CONFIG_JSON = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


def test_official_v4_config_json_is_the_official_preset(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V4_FLASH_CONFIG_JSON))
    read, preset = FathomConfig.from_pretrained(tmp_path), FathomConfig.preset("v4", size="flash")
    kinds = [preset.token_mixer(i) for i in range(44)]
    assert {kind: kinds.count(kind) for kind in ("swa", "csa", "hca")} == {"swa": 3, "csa": 21, "hca": 20}
    assert [preset.channel_mixer(i) for i in range(44)] == ["hash"] * 3 + ["moe"] * 41
    mine, official = own_fields(preset), own_fields(read)
    official["rope_parameters"].pop("type", None)  # the older spelling of rope_type, which transformers keeps
    official.pop("pad_token_id", None)
    mine.pop("pad_token_id", None)
    assert mine == official
    assert read.model_type == "fathom"


def test_schedule_of_v4_pro():
    config = FathomConfig.preset("v4-pro")
    kinds = [config.token_mixer(i) for i in range(62)]
    assert kinds[:5] == ["hca", "hca", "csa", "hca", "csa"]
    assert {kind: kinds.count(kind) for kind in ("swa", "csa", "hca")} == {"swa": 1, "csa": 30, "hca": 31}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"compress_ratios": [0, 4, 64, 4, 0]}, "compress_ratios has 64, which is neither 0 nor compress_rate_csa=4"),
        ({"token_mixers": ["swa", "csa", "mla", "hca", "swa"]}, "choose one family"),
        ({"position_embedding_type": "sinusoidal"}, "set position_embedding_type='rope'"),
        ({"sliding_window": None}, "need a sliding_window"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
        ({"q_lora_rank": None}, "compress queries; set q_lora_rank"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: in swa, csa and hca layers all heads share one key"),
        ({"o_groups": 3}, "num_attention_heads=4 must be a multiple of o_groups=3"),
        ({"index_head_dim": 8}, "index_head_dim=8 must be at least qk_rope_head_dim=16"),
        ({"qk_rope_head_dim": 128}, "qk_rope_head_dim=128 must be even and at most head_dim=64"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15 must be even"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type='dynamic' changes with the length of the text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_v4_combinations_say_how_to_mend_them(overrides, says):
    settings = {"vocab_size": 97, "num_hidden_layers": 4, **overrides}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below, literally
        FathomConfig(**settings) if "compress_ratios" in settings else FathomConfig.preset("v4", **settings)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_parameter_counts_by_hand():
    config = FathomConfig.preset("classic", hidden_size=64, num_hidden_layers=3, vocab_size=97)
    layer = 4 * 64 * 64 + 2 * 64 * 256 + 2 * 64
    expected = {"total": 2 * 97 * 64 + 3 * layer + 64, "embedding": 2 * 97 * 64, "mtp": 0}
    expected["active"] = expected["total"]
    assert FathomForCausalLM(config).parameter_counts() == expected
    tied = FathomForCausalLM(FathomConfig.preset("classic", hidden_size=64, vocab_size=97, tie_word_embeddings=True))
    assert tied.parameter_counts()["embedding"] == 97 * 64


# What the releases' config.json files say beyond numbers of parameters, by https://huggingface.co/deepseek-ai.
DEEPSEEK_V2_LITE_CONFIG_JSON = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
    "pad_token_id": None,
}
DEEPSEEK_MOE_16B_CONFIG_JSON = {
    "architectures": ["DeepseekForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 4096,
    "model_type": "deepseek",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 28,
    "num_key_value_heads": 16,
    "pad_token_id": None,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
    "vocab_size": 102400,
}


@pytest.mark.parametrize(
    ("official", "preset"), [(DEEPSEEK_V2_LITE_CONFIG_JSON, "v2-lite"), (DEEPSEEK_MOE_16B_CONFIG_JSON, "moe-16b")]
)
def test_earlier_config_json_is_the_official_preset(official, preset, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(official))
    read, mine = FathomConfig.from_pretrained(tmp_path), FathomConfig.preset(preset)
    read.rope_parameters.pop("type", None)  # the older spelling of rope_type, which transformers keeps
    assert own_fields(read) == own_fields(mine)
    assert read.model_type == "fathom"


@pytest.mark.parametrize("preset", [*GENERATIONS, *OFFICIAL])
def test_round_trip(preset, tmp_path: Path):
    config = FathomConfig.preset(preset, mtp_loss_weight=0.1)
    config.save_pretrained(tmp_path)
    for read in (FathomConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(read) is FathomConfig
        assert own_fields(read) == own_fields(config)
    # AutoTokenizer and Trainer's resume read config.json by the base class, which has validators of its own.
    base = PreTrainedConfig.from_pretrained(tmp_path)
    assert base.num_hidden_layers == config.num_hidden_layers

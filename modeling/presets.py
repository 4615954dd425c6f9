"""Numbers of the models: sizes derived from one dial, DeepSeek's releases, and what their config.json leaves unsaid.

Fields are those of `FathomConfig`, whose defaults are DeepSeek-V3's.
"""

from typing import Any

# Width, depth, vocabulary and context of the sizes that are derived; every other number follows from the width.
SIZES = {
    "nano": {"hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 4096, "max_position_embeddings": 1024},
    "micro": {"hidden_size": 512, "num_hidden_layers": 8, "vocab_size": 8192, "max_position_embeddings": 2048},
    "small": {"hidden_size": 768, "num_hidden_layers": 16, "vocab_size": 16384, "max_position_embeddings": 4096},
}


def _classic(width: int) -> dict:
    """The plain transformer decoder: multi-head attention, ReLU feed-forward network, sinusoidal positions."""
    return {
        "token_mixers": "mha",
        "channel_mixers": "dense",
        "position_embedding_type": "sinusoidal",
        "num_attention_heads": width // 64,
        "head_dim": 64,
        "intermediate_size": 4 * width,
        "hidden_act": "relu",
        "mlp_gated": False,
        "num_nextn_predict_layers": 0,
    }


# What the generations before V3 share: softmax routing kept even by an auxiliary loss, and no MTP layers.
_BEFORE_V3: dict[str, Any] = {
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "router_bias_update_speed": 0.0,
    "seq_aux_loss_coef": 0.0,
    "num_nextn_predict_layers": 0,
}


def _moe(width: int) -> dict:
    """DeepSeekMoE: multi-head attention with rotary halves, fine-grained experts, two of them shared."""
    return {
        **_BEFORE_V3,
        "token_mixers": "mha",
        "rope_interleave": False,
        "num_attention_heads": width // 64,
        "head_dim": 64,
        "intermediate_size": 3 * width,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width // 2,
        "aux_loss_alpha": 0.001,
    }


def _mla(width: int) -> dict:
    """Multi-head latent attention, its heads as wide as those of the other generations."""
    return {
        "token_mixers": "mla",
        "num_attention_heads": width // 64,
        "q_lora_rank": 3 * width // 8,
        "kv_lora_rank": width // 4,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
    }


def _v2(width: int) -> dict:
    """DeepSeek-V2: MLA, and experts chosen within the best groups."""
    return {
        **_moe(width),
        **_mla(width),
        "rope_interleave": True,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
    }


def _v3(width: int) -> dict:
    """DeepSeek-V3: MLA, fine-grained experts with one shared, sigmoid routing with a bias, one MTP layer."""
    return {
        **_mla(width),
        "intermediate_size": 5 * width // 2,
        "first_k_dense_replace": 1,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width // 2,
        "n_group": 1,
        "topk_group": 1,
        # DeepSeek's 0.001 is for hundreds of thousands of steps; in a thousand it moves a bias by 1 at most.
        "router_bias_update_speed": 0.01,
        "num_nextn_predict_layers": 1,
    }


def _v32(width: int) -> dict:
    """DeepSeek-V3.2: V3 with sparse attention. Small indexer heads, but many: with few, most scores are 0."""
    return {
        **_v3(width),
        "token_mixers": "dsa",
        "index_n_heads": 32,
        "index_head_dim": 32,
        "index_topk": 128,
    }


def _v4(width: int) -> dict:
    """DeepSeek-V4: window, sparse and heavily compressed attention, hyper-connections, hash-routed first layers."""
    return {
        "token_mixers": None,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 3 * width // 8,
        "o_groups": max(1, width // 128),
        "o_lora_rank": 64,
        "sliding_window": 64,
        "compress_rate_csa": 4,
        "compress_rate_hca": 32,
        "compress_rope_theta": 160000.0,
        # With fewer heads all of a token's scores are often 0, and the choice is then made by age alone.
        "index_n_heads": 32,
        "index_head_dim": 16,
        "index_topk": 64,
        "hc_mult": 4,
        "num_hash_layers": 1,
        "first_k_dense_replace": 0,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": width // 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        # DeepSeek's 0.001 is for hundreds of thousands of steps; in a thousand it moves a bias by 1 at most.
        "router_bias_update_speed": 0.01,
        "num_nextn_predict_layers": 1,
    }


GENERATIONS = {"classic": _classic, "moe": _moe, "v2": _v2, "v3": _v3, "v3.2": _v32, "v4": _v4}


def _yarn(mscale: float) -> dict:
    """The rotary settings of all releases with MLA: 4096 positions stretched to 40 times as many."""
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": 4096,
    }


_V2_RELEASE: dict[str, Any] = {
    **_BEFORE_V3,
    "generation": "v2",
    "vocab_size": 102400,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "pad_token_id": None,
    "max_position_embeddings": 163840,
    "rope_parameters": _yarn(0.707),
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "aux_loss_alpha": 0.001,
}

# What DeepSeek-V4 Flash and Pro have in common (DeepSeek-V4, section 4.2.1, and the releases' config.json).
_V4_OFFICIAL = {
    "generation": "v4",
    "max_position_embeddings": 1048576,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_rope_theta": 160000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 65536,
    },
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "num_hash_layers": 3,
    "first_k_dense_replace": 0,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
}

# The releases' config.json; DeepSeekMoE table 1, DeepSeek-V2 section 3.1 and appendix B, DeepSeek-V3 section 4.2;
# V3.2 differs from V3 by its indexers alone. The defaults of `FathomConfig` are V3's other fields.
OFFICIAL = {
    "moe-16b": {
        **_BEFORE_V3,
        "generation": "moe",
        "token_mixers": "mha",
        "rope_interleave": False,
        "vocab_size": 102400,
        "bos_token_id": 100000,
        "eos_token_id": 100001,
        "pad_token_id": None,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 10944,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "aux_loss_alpha": 0.001,
    },
    "v2-lite": {
        **_V2_RELEASE,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "q_lora_rank": None,
        "intermediate_size": 10944,
        "n_routed_experts": 64,
        "moe_intermediate_size": 1408,
    },
    "v2-236b": {
        **_V2_RELEASE,
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "intermediate_size": 12288,
        "n_routed_experts": 160,
        "moe_intermediate_size": 1536,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    },
    "v3-671b": {
        "generation": "v3",
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(1.0),
    },
    "v3.2-671b": {
        "generation": "v3.2",
        "token_mixers": "dsa",
        "max_position_embeddings": 163840,
        "rope_parameters": _yarn(1.0),
    },
    "v4-flash": {
        **_V4_OFFICIAL,
        "hidden_size": 4096,
        "num_hidden_layers": 43,
        "token_mixers": None,
        "num_attention_heads": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "index_topk": 512,
        "n_routed_experts": 256,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 1.5,
    },
    "v4-pro": {
        **_V4_OFFICIAL,
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "token_mixers": ["hca", "hca", *(["csa", "hca"] * 30)[:59], "swa"],
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "index_topk": 1024,
        "n_routed_experts": 384,
        "moe_intermediate_size": 3072,
        "routed_scaling_factor": 2.5,
    },
}

# What a config.json of another `model_type` leaves unsaid, because that model knows no other way.
UNSAID: dict[str, dict[str, Any]] = {
    "deepseek": {**_BEFORE_V3, "generation": "moe", "token_mixers": "mha", "rope_interleave": False},
    "deepseek_v2": {**_BEFORE_V3, "generation": "v2", "token_mixers": "mla"},
    "deepseek_v3": {"generation": "v3", "token_mixers": "mla", "num_nextn_predict_layers": 0},
    "deepseek_v32": {"generation": "v3.2", "token_mixers": "dsa", "num_nextn_predict_layers": 0},
    "deepseek_v4": {"generation": "v4", "num_nextn_predict_layers": 0},
}

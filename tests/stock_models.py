"""Small models of transformers' four DeepSeek classes with random shapes and weights: oracles for checkpoints."""

import random
from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    PreTrainedModel,
)

CLASSES: dict[str, tuple[type, type]] = {
    "v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "v3.2": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "v4": (DeepseekV4Config, DeepseekV4ForCausalLM),
}
WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"


def _yarn(pick: random.Random) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": pick.choice([4.0, 8.0]),
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 32,
    }


def stock_config(generation: str, seed: int, **overrides):
    """A configuration of a generation; every seed is another shape."""
    pick = random.Random(f"{generation} {seed}")
    layers, experts = pick.choice([3, 4]), pick.choice([6, 8, 12])
    fields: dict[str, Any] = {
        "vocab_size": pick.choice([97, 131]),
        "hidden_size": pick.choice([32, 64]),
        "moe_intermediate_size": pick.choice([16, 24]),
        "num_hidden_layers": layers,
        "num_attention_heads": pick.choice([2, 4]),
        "n_routed_experts": experts,
        "num_experts_per_tok": pick.choice([1, 2, 3]),
        "q_lora_rank": pick.choice([16, 40]),
        "max_position_embeddings": 256,
        "routed_scaling_factor": pick.choice([1.0, 1.5, 2.5]),
        "initializer_range": 0.2,
        "pad_token_id": 2,
        "tie_word_embeddings": pick.random() < 0.3,
    }
    if generation != "v4":
        fields |= {
            "intermediate_size": pick.choice([48, 96]),
            "num_key_value_heads": fields["num_attention_heads"],
            "kv_lora_rank": pick.choice([24, 32]),
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": pick.choice([12, 16]),
            "n_shared_experts": pick.choice([1, 2]),
            "first_k_dense_replace": pick.choice([0, 1, 2]),
            "n_group": pick.choice([1, 2]),
            "topk_group": 1,
            "attention_bias": pick.random() < 0.3,
        }
        if pick.random() < 0.5:
            fields["rope_parameters"] = {**_yarn(pick), "rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 1.0}
            fields["rope_parameters"]["rope_type"] = fields["rope_parameters"].pop("type")
    if generation == "v2":
        fields["topk_method"] = pick.choice(["greedy", "group_limited_greedy"])
        fields["q_lora_rank"] = pick.choice([None, 40])
    if generation == "v3":
        fields["q_lora_rank"] = pick.choice([None, 40])
        fields["rope_interleave"] = pick.random() < 0.7
    if generation in ("v3.2", "v4"):
        # With few indexer heads most scores are 0, and stock breaks ties by the length of the row.
        fields |= {"index_n_heads": 64, "index_head_dim": 16, "index_topk": pick.choice([6, 9])}
    if generation == "v4":
        fields |= {
            "head_dim": 32,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": pick.choice([16, 24]),
            "sliding_window": pick.choice([7, 11]),
            "layer_types": [pick.choice([WINDOW, CSA, HCA]) for _ in range(layers - 2)] + [CSA, HCA],
            "mlp_layer_types": [pick.choice(["hash_moe", "moe"]) for _ in range(layers)],
            "compress_rates": {CSA: 4, HCA: pick.choice([8, 16])},
            "hc_mult": pick.choice([2, 4]),
            "swiglu_limit": pick.choice([0.5, 10.0]),
        }
        if pick.random() < 0.5:
            fields["rope_scaling"] = _yarn(pick)
    return CLASSES[generation][0](**{**fields, **overrides})


def stock_model(generation: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A model in eval mode. No parameter or buffer has a value by which it could be missed unnoticed."""
    config = stock_config(generation, seed, **overrides)
    torch.manual_seed(seed)
    model = CLASSES[generation][1](config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
        elif name.endswith("tid2eid"):
            experts = torch.rand(len(buffer), config.n_routed_experts).argsort(dim=-1)
            buffer.copy_(experts[:, : config.num_experts_per_tok])
    # The row of the padding token is zero, and a text of such tokens full of ties.
    nn.init.normal_(model.get_input_embeddings().weight, std=config.initializer_range)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif parameter.dim() == 1 or name.endswith("position_bias"):
            nn.init.normal_(parameter, std=0.5)
    return model


def ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


def greedy(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(tokens, attention_mask=mask, **settings)

"""Reads the config.json of DeepSeek's releases and of transformers' DeepSeek models as fields of `FathomConfig`.

A release says what its own code needs and leaves unsaid what that code knows in one way only (`presets.UNSAID`).
DeepSeek's inference code for V4 comes with a config.json of other names, those of `ModelArgs` in its `model.py`.
"""

from typing import Any

from .config_limits import check_numbers
from .presets import UNSAID

# V4's inference/config.json: our names for its names.
INFERENCE_FIELDS = {
    "dim": "hidden_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_hash_layers": "num_hash_layers",
    "n_mtp_layers": "num_nextn_predict_layers",
    "n_heads": "num_attention_heads",
    "n_activated_experts": "num_experts_per_tok",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "rope_head_dim": "qk_rope_head_dim",
    "norm_eps": "rms_norm_eps",
    "window_size": "sliding_window",
}
# What holds where it is silent: defaults of `ModelArgs` that are not those of `FathomConfig`.
INFERENCE_DEFAULTS: dict[str, Any] = {
    "num_nextn_predict_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "routed_scaling_factor": 1.0,
    "head_dim": 512,
    "q_lora_rank": 1024,
    "sliding_window": 128,
    "compress_rope_theta": 40000.0,
    "index_topk": 512,
    "hc_mult": 4,
}
# What it says about formats and serving, not about the model.
SERVING_FIELDS = ("dtype", "scale_fmt", "scale_dtype", "expert_dtype", "max_batch_size", "max_seq_len")


def read_official(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Fields of `FathomConfig` for the content of a config.json; that of a Fathom model is returned as it is.

    A `quantization_config` of DeepSeek's FP8 formats is left out: such weights are dequantised when they are loaded
    (see `quantized_weights`), and transformers would otherwise expect the model to stay quantised.
    """
    if "n_layers" in config_dict and "compress_ratios" in config_dict:
        config_dict = _read_inference_config(config_dict)
    model_type = config_dict.get("model_type")
    unsaid = UNSAID.get(model_type) if isinstance(model_type, str) else None
    if unsaid is None:
        return config_dict
    check_numbers(config_dict)
    said = {name: value for name, value in config_dict.items() if value is not None or name not in unsaid}
    # Kept, it would hide our own from transformers' search for a checkpoint layout.
    del said["model_type"]
    # Names of the release's own code; saving writes ours.
    said.pop("auto_map", None)
    if (said.get("quantization_config") or {}).get("quant_method") == "fp8":
        del said["quantization_config"]
        said.pop("expert_dtype", None)
        if said.get("dtype") is None and said.get("torch_dtype") is None:
            said["dtype"] = "bfloat16"
    if unsaid["generation"] != "v4":  # V4's other names are read by the constructor
        # transformers' own schedules; ours are `token_mixers` and `channel_mixers`.
        said.pop("layer_types", None)
        if kinds := said.pop("mlp_layer_types", None):
            kinds = ["dense" if kind == "dense" else "moe" for kind in kinds]
            said["channel_mixers"] = kinds + ["moe"] * said.get("num_nextn_predict_layers", 0)
    if unsaid["generation"] in ("v3", "v3.2"):
        # A leftover of V2 in V3's files; the training balanced by a bias and `seq_aux_loss_coef`.
        said.pop("aux_loss_alpha", None)
    return {**unsaid, **said}


def _read_inference_config(args: dict[str, Any]) -> dict[str, Any]:
    """The config.json beside DeepSeek-V4's inference code, in the names of the one beside its weights."""
    said = {INFERENCE_FIELDS.get(name, name): value for name, value in args.items() if name not in SERVING_FIELDS}
    said["swiglu_limit"] = said.get("swiglu_limit") or None  # 0 there: no limit
    beta_fast, beta_slow = said.pop("beta_fast", 32), said.pop("beta_slow", 1)
    original, factor = said.pop("original_seq_len", 0), said.pop("rope_factor", 40)
    if original:
        said["max_position_embeddings"] = int(original * factor)
        said["rope_scaling"] = {
            "type": "yarn",
            "factor": factor,
            "beta_fast": beta_fast,
            "beta_slow": beta_slow,
            "original_max_position_embeddings": original,
        }
    return {"model_type": "deepseek_v4", "dtype": "bfloat16", **INFERENCE_DEFAULTS, **said}

"""A Fathom configuration as that of a DeepSeek model type, for code that knows nothing of Fathom.

Two dialects of config.json: that of transformers' own DeepSeek classes, and that of DeepSeek's releases. Either is
written by a table of what the other code reads (`CARRIED`) and one of what it can do in one way only (`FIXED`); a
Fathom model that differs there is refused, because the other code would load it and compute something else.
"""

from typing import TYPE_CHECKING, Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from .errors import UserError

if TYPE_CHECKING:
    from ..modeling.configuration_fathom import FathomConfig

DIALECTS = ("transformers", "deepseek")

# Prefix of the class names that transformers and DeepSeek use.
CLASS_PREFIX = {
    "deepseek": "Deepseek",
    "deepseek_v2": "DeepseekV2",
    "deepseek_v3": "DeepseekV3",
    "deepseek_v32": "DeepseekV32",
    "deepseek_v4": "DeepseekV4",
}

_COMMON = """vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads hidden_act
    max_position_embeddings initializer_range rms_norm_eps use_cache bos_token_id eos_token_id pad_token_id
    tie_word_embeddings attention_bias attention_dropout moe_intermediate_size n_routed_experts n_shared_experts
    num_experts_per_tok norm_topk_prob routed_scaling_factor """
_MLA = "intermediate_size q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_group topk_group "
CARRIED: dict[str, str] = {
    "deepseek": _COMMON + "intermediate_size",
    "deepseek_v2": _COMMON + _MLA + "topk_method",
    "deepseek_v3": _COMMON + _MLA + "rope_interleave num_nextn_predict_layers",
    "deepseek_v32": _COMMON + _MLA + "index_n_heads index_head_dim index_topk num_nextn_predict_layers",
    "deepseek_v4": _COMMON
    + """head_dim qk_rope_head_dim q_lora_rank sliding_window compress_rope_theta o_groups o_lora_rank index_n_heads
    index_head_dim index_topk hc_mult hc_sinkhorn_iters hc_eps scoring_func swiglu_limit num_nextn_predict_layers""",
}

# Values that the other code takes for granted; a tuple lists those among which it can choose.
_ALL_FIXED: dict[str, Any] = {"position_embedding_type": "rope", "mlp_gated": True}
_MLA_FIXED = {**_ALL_FIXED, "hc_mult": 1, "swiglu_limit": None}
FIXED: dict[str, dict[str, Any]] = {
    "deepseek": {
        **_MLA_FIXED,
        "rope_interleave": False,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v2": {
        **_MLA_FIXED,
        "rope_interleave": True,
        "scoring_func": "softmax",
        "topk_method": ("greedy", "group_limited_greedy"),
        "num_nextn_predict_layers": 0,
    },
    "deepseek_v3": {**_MLA_FIXED, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "deepseek_v32": {
        **_MLA_FIXED,
        "index_dense": False,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
    },
    "deepseek_v4": {
        **_ALL_FIXED,
        "index_dense": False,
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "n_shared_experts": 1,
        "scoring_func": ("sqrtsoftplus", "sigmoid"),
    },
}
# What one of the two codes alone takes for granted.
FIXED_IN: dict[str, dict[str, dict[str, Any]]] = {
    "transformers": {"deepseek_v2": {"norm_topk_prob": False}},
    "deepseek": {
        "deepseek_v3": {"rope_interleave": True},
        # Its code takes layers of this rate, and no others, for sparse and overlapping ones.
        "deepseek_v4": {"compress_rate_csa": 4},
    },
}


def native_config(config: "FathomConfig", dialect: str) -> dict[str, Any]:
    """The content of the config.json, `architectures` and `model_type` included.

    Args:
        config: of the model, MTP layers included if they are written.
        dialect: `transformers` or `deepseek`.

    Raises:
        UserError: the other code has no such model; the message names the field.
    """
    model_type = native_type(config)
    fixed = {**FIXED[model_type], **FIXED_IN[dialect].get(model_type, {})}
    for field, wanted in fixed.items():
        value, allowed = getattr(config, field), wanted if isinstance(wanted, tuple) else (wanted,)
        if value not in allowed:
            _refuse(model_type, dialect, field, value, " or ".join(map(repr, allowed)))
    if config.uses("moe") and config.n_shared_experts < 1:
        _refuse(model_type, dialect, "n_shared_experts", config.n_shared_experts, "1 or more")
    fields = {name: getattr(config, name) for name in CARRIED[model_type].split()}
    schedule = _v4_schedule if model_type == "deepseek_v4" else _dense_first
    fields |= schedule(config, model_type, dialect)
    fields |= {"architectures": [f"{CLASS_PREFIX[model_type]}ForCausalLM"], "model_type": model_type}
    if dialect == "transformers":
        return _checked_by_transformers(config, model_type, fields)
    return {**fields, **_as_released(config)}


def native_type(config: "FathomConfig") -> str:
    """The DeepSeek model type that mixes tokens as `config` does."""
    layers = range(config.num_hidden_layers + config.num_nextn_predict_layers)
    mixers = {config.token_mixer(layer) for layer in layers}
    if mixers == {"mla"}:
        return "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    if mixers == {"dsa"}:
        return "deepseek_v32"
    if mixers == {"mha"}:
        return "deepseek"
    if mixers <= {"swa", "csa", "hca"}:
        return "deepseek_v4"
    raise UserError(f"token_mixers={sorted(mixers)}: no DeepSeek model has these together; export knows one family")


def _refuse(model_type: str, dialect: str, field: str, value: Any, wanted: str) -> None:
    code = "transformers'" if dialect == "transformers" else "DeepSeek's"
    raise UserError(f"{code} {model_type} cannot express {field}={value!r}; it knows only {wanted}")


def _kinds(config: "FathomConfig") -> list[str]:
    return [config.channel_mixer(layer) for layer in range(config.num_hidden_layers)]


def _check_mtp_layers(config: "FathomConfig", model_type: str, dialect: str) -> None:
    """An MTP layer has experts, and in V4 a window alone."""
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        if (kind := config.channel_mixer(layer)) != "moe":
            _refuse(model_type, dialect, f"channel_mixers[{layer}]", kind, "'moe' in MTP layers")
        if model_type == "deepseek_v4" and (kind := config.token_mixer(layer)) != "swa":
            _refuse(model_type, dialect, f"token_mixers[{layer}]", kind, "'swa' in MTP layers")


def _dense_first(config: "FathomConfig", model_type: str, dialect: str) -> dict[str, Any]:
    """Which layers are dense, in all generations before V4."""
    if model_type == "deepseek" and dialect == "transformers":
        _refuse(model_type, dialect, "token_mixers", "mha", "'mla', 'dsa', or 'swa', 'csa' and 'hca'")
    width = config.hidden_size // config.num_attention_heads
    if model_type == "deepseek" and config.head_dim != width:
        _refuse(model_type, dialect, "head_dim", config.head_dim, f"hidden_size / num_attention_heads = {width}")
    _check_mtp_layers(config, model_type, dialect)
    kinds = _kinds(config)
    dense = next((layer for layer, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if "hash" in kinds:
        _refuse(model_type, dialect, "channel_mixers", kinds, "'dense' and 'moe'")
    if model_type == "deepseek_v32" and dialect == "transformers":
        return {"mlp_layer_types": ["dense" if kind == "dense" else "sparse" for kind in kinds]}
    if kinds[dense:] != ["moe"] * (len(kinds) - dense):
        _refuse(model_type, dialect, "channel_mixers", kinds, "first layers 'dense', the others 'moe'")
    return {"first_k_dense_replace": dense}


def _v4_schedule(config: "FathomConfig", model_type: str, dialect: str) -> dict[str, Any]:
    """Which layers look back how far, and which route by token id."""
    from ..modeling.configuration_fathom import V4_LAYER_TYPES

    _check_mtp_layers(config, model_type, dialect)
    if config.hc_mult < 2:
        _refuse(model_type, dialect, "hc_mult", config.hc_mult, "2 or more")
    if config.swiglu_limit is None and dialect == "transformers":
        _refuse(model_type, dialect, "swiglu_limit", None, "a number")
    kinds = _kinds(config)
    if "dense" in kinds:
        _refuse(model_type, dialect, "channel_mixers", kinds, "'hash' and 'moe'")
    mixers = [config.token_mixer(layer) for layer in range(config.num_hidden_layers)]
    if dialect == "transformers":
        names = {ours: theirs for theirs, ours in V4_LAYER_TYPES.items()}
        return {
            "layer_types": [names[mixer] for mixer in mixers],
            "mlp_layer_types": ["hash_moe" if kind == "hash" else "moe" for kind in kinds],
            "compress_rates": {names["csa"]: config.compress_rate_csa, names["hca"]: config.compress_rate_hca},
            "partial_rotary_factor": config.qk_rope_head_dim / (config.head_dim or 1),
        }
    hashed = next((layer for layer, kind in enumerate(kinds) if kind != "hash"), len(kinds))
    if kinds[hashed:] != ["moe"] * (len(kinds) - hashed):
        _refuse(model_type, dialect, "channel_mixers", kinds, "first layers 'hash', the others 'moe'")
    rates = {"swa": 0, "csa": config.compress_rate_csa, "hca": config.compress_rate_hca}
    if config.compress_rate_hca == config.compress_rate_csa:
        _refuse(model_type, dialect, "compress_rate_hca", config.compress_rate_hca, "another than compress_rate_csa")
    schedule = {
        "compress_ratios": [rates[mixer] for mixer in mixers] + [0] * config.num_nextn_predict_layers,
        "num_hash_layers": hashed,
    }
    if config.compress_rate_hca != 128:  # read by Fathom and transformers; DeepSeek's code takes any
        schedule["compress_rate_hca"] = config.compress_rate_hca
    return schedule


def _checked_by_transformers(config: "FathomConfig", model_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    if model_type == "deepseek_v4":
        fields["rope_theta"] = rope["rope_theta"]
    try:
        native = getattr(transformers, f"{CLASS_PREFIX[model_type]}Config")(
            **{**fields, "rope_parameters": rope, "dtype": config.dtype or "float32"}
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(
            f"transformers' {model_type} cannot express this model: {' '.join(str(error).split())}"
        ) from error
    if native.qk_rope_head_dim != config.qk_rope_head_dim:  # V4 computes it from a fraction, rounding down
        _refuse(model_type, "transformers", "qk_rope_head_dim", config.qk_rope_head_dim, native.qk_rope_head_dim)
    return native.to_dict()


def _as_released(config: "FathomConfig") -> dict[str, Any]:
    """What DeepSeek's config.json files say in other words, or in addition."""
    rope = dict(config.rope_parameters or {})
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "scoring_func": config.scoring_func,
        "topk_method": config.topk_method,
        "moe_layer_freq": 1,
        "aux_loss_alpha": config.aux_loss_alpha,
        "seq_aux": config.seq_aux,
        "torch_dtype": str(config.dtype or "float32").removeprefix("torch."),
    }

"""What a number in a config may be: ranges wide enough for every published model, and none that hangs or fills memory.

A config.json is read from anywhere. A layer count of 10^12 or an epsilon of NaN is refused here, by name, before
anything is built or counted from it. What fields mean together is checked by `FathomConfig`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

_MANY = 2**31 - 1  # tokens: positions are 32-bit numbers in some kernels
_WIDE = 2**20  # of one dimension of a weight

# Most that a whole number may be; the least is 0, and where a model needs more `FathomConfig` says so.
MOST = {
    "vocab_size": 2**24,
    "hidden_size": _WIDE,
    "num_hidden_layers": 512,
    "num_nextn_predict_layers": 64,
    "hc_mult": 64,
    "hc_sinkhorn_iters": 1000,
    "max_position_embeddings": _MANY,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "q_lora_rank": _WIDE,
    "kv_lora_rank": _WIDE,
    "qk_nope_head_dim": 2**16,
    "qk_rope_head_dim": 2**16,
    "v_head_dim": 2**16,
    "index_n_heads": 2**16,
    "index_head_dim": 2**16,
    "index_topk": _MANY,
    "sliding_window": _WIDE,
    "compress_rate_csa": _WIDE,
    "compress_rate_hca": _WIDE,
    "o_groups": 2**16,
    "o_lora_rank": _WIDE,
    "num_hash_layers": _MANY,
    "first_k_dense_replace": _MANY,
    "intermediate_size": 2**24,
    "n_routed_experts": 2**16,
    "n_shared_experts": 1024,
    "num_experts_per_tok": 2**16,
    "moe_intermediate_size": 2**24,
    "moe_layer_freq": _MANY,
    "n_group": 2**16,
    "topk_group": 2**16,
    "num_labels": 100_000,
}
# Least and most of the other numbers. Epsilons are added to means of squares, which may be 0 and are divided by.
BETWEEN = {
    "rms_norm_eps": (1e-30, 1.0),
    "hc_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1e3),
    "attention_dropout": (0.0, 1.0),
    "routed_scaling_factor": (0.0, 1e6),
    "rope_theta": (1.0, 1e18),
    "compress_rope_theta": (1.0, 1e18),
    "swiglu_limit": (0.0, 1e6),
    "indexer_loss_coef": (0.0, 1e6),
    "router_bias_update_speed": (0.0, 1e6),
    "seq_aux_loss_coef": (0.0, 1e6),
    "aux_loss_alpha": (0.0, 1e6),
    "mtp_loss_weight": (0.0, 1e6),
}
# Of `rope_parameters`, whatever its kind; a list is checked number by number.
ROPE_BETWEEN = {
    "rope_theta": BETWEEN["rope_theta"],
    "factor": (1.0, 1e6),
    "attention_factor": (1e-6, 1e6),
    "original_max_position_embeddings": (1, _MANY),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "short_factor": (1e-6, 1e9),
    "long_factor": (1e-6, 1e9),
    "partial_rotary_factor": (1e-6, 1.0),
}
# Properties of transformers' configs that are set by what a config.json holds beyond the fields.
SETTABLE = {"model_type", "num_labels", "name_or_path", "output_attentions", "torch_dtype", "rope_scaling"}
MOST_ENTRIES = 4096  # of a list: one per layer, or a few
# What `FathomConfig` reads beyond its fields, under the names of DeepSeek's and transformers' config.json files.
EXTRA: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "layer_types": (list,),
    "mlp_layer_types": (list,),
    "compress_ratios": (list,),
    "compress_rates": (dict,),
    "rope_scaling": (dict,),
    "rope_parameters": (dict,),
    "quantization_config": (dict,),
    "output_attentions": (bool,),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_numbers(values: Mapping[str, Any]) -> None:
    """Compares numbers and names with the tables above; whether a field may be `None` is said by its type.

    Raises:
        ValueError: the message names field, value and range.
    """
    for name, most in MOST.items():
        value = values.get(name)
        if value is not None and not (type(value) is int and value <= most):
            raise ValueError(f"{name}={_short(value)} must be a whole number of at most {most}")
    for name, between in BETWEEN.items():
        if values.get(name) is not None:
            _check_between(name, values[name], *between)
    _check_kinds(values)


def check_rope_numbers(rope: Mapping[str, Any]) -> None:
    """The same for `rope_parameters`.

    Raises:
        ValueError: a number is out of range, or a value is neither a number, a list of numbers, text nor a switch.
    """
    for name, value in rope.items():
        if name in ROPE_BETWEEN:
            for number in value if isinstance(value, list) else [value]:
                if number is not None:
                    _check_between(name, number, *ROPE_BETWEEN[name], where=" in rope_parameters")
        elif not isinstance(value, str | bool | None):
            raise ValueError(f"{name}={_short(value)} in rope_parameters is not known; remove it")


def check_names(names: Iterable[str], config_class: type) -> None:
    """Looks for names beyond the fields that would replace a method or a property of the config.

    Raises:
        ValueError: there is one.
    """
    for name in names:
        if name not in SETTABLE and hasattr(config_class, name):
            raise ValueError(f"{name!r} is no field of a config but a part of its class; remove it")


def _check_between(name: str, value: Any, least: float, most: float, where: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name}={_short(value)}{where} must be a number from {least:g} to {most:g}")


def _check_kinds(values: Mapping[str, Any]) -> None:
    """The values that are no numbers, and that transformers takes without a look at them."""
    for name in ("dtype", "torch_dtype"):
        value = values.get(name)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{name}={_short(value)} must be one of {', '.join(DTYPES)}")
    for name, value in values.items():
        if isinstance(value, list) and len(value) > MOST_ENTRIES:
            raise ValueError(f"{name} has {len(value):,} entries; a list in a config has at most {MOST_ENTRIES:,}")
    for name, kinds in EXTRA.items():
        value = values.get(name)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{name}={_short(value)} must be a {' or a '.join(kind.__name__ for kind in kinds)}")
        if isinstance(value, list) and not all(isinstance(item, str | int) for item in value):
            raise ValueError(f"{name}={_short(value)} must be a list of names, or of whole numbers")
    for name in ("id2label", "label2id"):
        labels = values.get(name)
        if labels is not None and not (isinstance(labels, dict) and len(labels) <= MOST["num_labels"]):
            raise ValueError(f"{name} must map at most {MOST['num_labels']} labels, not {_short(labels)}")
    for key in values.get("id2label") or {}:
        if not str(key).isdecimal():
            raise ValueError(f"id2label has the key {_short(key)}; its keys must be whole numbers from 0")


def _short(value: Any) -> str:
    """The value as it can stand in one line."""
    text = repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Values of config.json that no model can have: of any field, drawn by hypothesis, and of absurd size (`malformed`)."""

import math
import resource
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import KINDS, MANY, changed, same_verdict, write_json

from fathom import FathomConfig

CONFIG_FIELDS = sorted({field.name for field in fields(FathomConfig)} | {"model_type", "auto_map", "torch_dtype"})
OTHER_NAMES = [
    *("num_labels", "layer_types", "mlp_layer_types", "compress_ratios", "compress_rates", "rope_theta"),
    *("rope_scaling", "quantization_config", "per_layer_config", "transformers_weights", "configuration_files"),
    *("uses", "to_dict", "token_mixer", "compresses", "validate", "num_local_experts", "partial_rotary_factor"),
    *("sub_configs", "_x", "attn_implementation", "_attn_implementation", "experts_implementation", "name_or_path"),
    *("output_attentions", "base_model_tp_plan", "attribute_map", "text_config", "max_new_tokens", "problem"),
    *("__class__", "self", "n_layers"),
]
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 10**12, 10**30, -(10**12), 64, 1000]),
    st.floats(),
    st.sampled_from([0.5, 1e-300, 1e300, -1.0, math.nan, math.inf]),
)
WORDS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["mla", "moe", "dense", "silu", "yarn", "float32", "int8", "v3", "sigmoid", "greedy", "x" * 300]),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
ROPE_KINDS = ["default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional", "x"]
ROPE_NUMBERS = [
    *("rope_theta", "factor", "attention_factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"),
    *("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"),
]
ROPE = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(ROPE_KINDS),
        **dict.fromkeys(ROPE_NUMBERS, NUMBERS),
        **dict.fromkeys(("short_factor", "long_factor"), st.lists(NUMBERS, max_size=9)),
        "truncate": st.booleans(),
        "odd": VALUES,
    },
)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_folders_are_whole(kind: str, whole: dict[str, Path], tmp_path: Path):
    with changed(whole[kind], tmp_path / "model", lambda _: None) as folder:
        assert same_verdict(folder) == ""


@pytest.mark.parametrize("kind", KINDS)
@settings(MANY, max_examples=120)
@given(name=st.sampled_from([*CONFIG_FIELDS, *OTHER_NAMES]), value=VALUES)
def test_any_value_of_any_field(kind: str, whole: dict[str, Path], tmp_path: Path, name: str, value: Any):
    with changed(whole[kind], tmp_path / "model", write_json("config.json", **{name: value})) as folder:
        same_verdict(folder)


@pytest.mark.parametrize("kind", KINDS)
@settings(MANY, max_examples=40)
@given(rope=ROPE)
def test_any_rotary_parameters(kind: str, whole: dict[str, Path], tmp_path: Path, rope: dict[str, Any]):
    with changed(whole[kind], tmp_path / "model", write_json("config.json", rope_parameters=rope)) as folder:
        same_verdict(folder)


ABSURD = {
    "num_hidden_layers": 10**12,
    "num_nextn_predict_layers": 10**9,
    "n_routed_experts": 10**12,
    "num_labels": 10**9,
    "hc_sinkhorn_iters": 10**9,
    "vocab_size": 10**15,
    "hidden_size": 2**40,
    "compress_ratios": [4] * 10**6,
    "max_position_embeddings": 10**400,
    "id2label": {str(n): "x" for n in range(200_000)},
}
LARGE = {"num_hidden_layers": 500, "num_nextn_predict_layers": 60, "n_routed_experts": 65_536, "vocab_size": 10**7}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), [*ABSURD.items(), *LARGE.items()], ids=lambda value: str(value)[:25])
def test_absurd_sizes_are_refused_by_arithmetic(kind: str, name: str, value: Any, whole, tmp_path: Path):
    """Before anything is built: in seconds of processor time, and without the memory that they ask for."""
    with changed(whole[kind], tmp_path / "model", write_json("config.json", **{name: value})) as folder:
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        assert "config.json" in same_verdict(folder)
        assert time.process_time() - start < 5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB

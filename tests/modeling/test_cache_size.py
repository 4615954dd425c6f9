"""Cache sizes against the figures that DeepSeek publishes (V3.2, V4-Flash: V4.1's report, figure 1b) or implies."""

import pytest

from fathom import FathomConfig
from fathom.modeling.cache_size import (
    cache_bytes_per_token,
    cache_numbers,
    multi_head_cache_numbers,
    released_cache_bytes_per_token,
)


@pytest.mark.parametrize(
    ("name", "bf16", "released"),
    [
        ("moe-16b", 28 * 8192, 229_376),
        ("v2-lite", 27 * 1152, 31_104),
        ("v2-236b", 60 * 1152, 69_120),
        ("v3-671b", 61 * 1152, 70_272),
        ("v3.2-671b", 61 * (1152 + 256), 48_068),
        ("v4-flash", 21 * 1280 / 4 + 20 * 1024 / 128, 3_514.25),
        ("v4-pro", 30 * 1280 / 4 + 31 * 1024 / 128, 5_031.4375),
    ],
)
def test_bytes_per_token_of_the_releases(name: str, bf16: float, released: float) -> None:
    config = FathomConfig.preset(name)
    assert cache_bytes_per_token(config) == bf16
    assert released_cache_bytes_per_token(config) == released


def test_only_layers_with_windows_hold_more_than_the_past() -> None:
    assert cache_numbers(FathomConfig.preset("v3-671b")).window == 0
    v4 = FathomConfig.preset("v4", num_hidden_layers=1, num_nextn_predict_layers=0, token_mixers="swa")
    assert cache_numbers(v4) == (0, (v4.sliding_window - 1) * v4.head_dim)


def test_plain_attention_keeps_all_keys_and_values() -> None:
    """Compared with itself, multi-head attention saves nothing; V2-Lite's 16 heads have keys of 192, values of 128."""
    moe = FathomConfig.preset("moe-16b")
    assert multi_head_cache_numbers(moe) == cache_numbers(moe).per_token
    assert multi_head_cache_numbers(FathomConfig.preset("v2-lite")) == 27 * 16 * (192 + 128)
    assert multi_head_cache_numbers(FathomConfig.preset("v4-flash")) == 43 * 64 * 2 * 512

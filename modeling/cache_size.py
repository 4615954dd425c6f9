"""How much a model remembers: numbers and bytes that its cache holds, by the formulas of the papers.

    mha   2 H_kv D                  keys and values of every key/value head
    mla   R + P                     one latent and one rotary key (DeepSeek-V2, arXiv 2405.04434, table 1)
    dsa   R + P + D_I               and one indexer key (DeepSeek-V3.2, arXiv 2512.02556)
    swa   0                         a window is full after its first tokens (DeepSeek-V4's report, section 2.3)
    csa   (D + D_I) / m             an entry and an indexer entry per m tokens
    hca   D / m'                    an entry per m' tokens

Releases store some of these in fewer bits. Latents and keys are FP8 with a scale per block, their rotary part stays
bf16, V4's indexer entries are FP4:

    dsa   R (+ 4 bytes per 128) + 2 P,  D_I (+ 4 bytes per 128)                          656 + 132 bytes
    V4    (D - P) + 2 P + one byte per 64 of D - P, filled up to 8,  D_I / 2 + D_I / 32  584 + 68 bytes

Per sequence, windows and unfinished blocks come on top, whatever the length (`window`).
"""

from fractions import Fraction
from math import ceil
from typing import NamedTuple


class CacheSize(NamedTuple):
    """What one layer, or a sum of layers, keeps per sequence; numbers or bytes."""

    per_token: Fraction | int  # for every token of the past
    window: int = 0  # once, for the newest tokens

    def __add__(self, other: "CacheSize") -> "CacheSize":  # type: ignore[override]
        return CacheSize(self.per_token + other.per_token, self.window + other.window)


def layer_cache_numbers(config, layer_idx: int) -> CacheSize:
    """Numbers in the cache of `model.layers.{layer_idx}`, by the formulas above.

    `window` counts what the next token may need: the window's keys without its own, and for every token of an
    unfinished block, in `csa` layers of the block before it too, values and gates of the compressors.
    """
    kind = config.token_mixer(layer_idx)
    if kind == "mha":
        return CacheSize(2 * config.num_key_value_heads * config.head_dim)
    if kind in ("mla", "dsa"):
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        return CacheSize(latent + (config.index_head_dim if kind == "dsa" else 0))
    window = (config.sliding_window - 1) * config.head_dim
    if kind == "swa":
        return CacheSize(0, window)
    if kind == "hca":
        block = config.compress_rate_hca
        return CacheSize(Fraction(config.head_dim, block), window + (block - 1) * 2 * config.head_dim)
    block, width = config.compress_rate_csa, config.head_dim + config.index_head_dim
    return CacheSize(Fraction(width, block), window + (2 * block - 1) * 4 * width)


def cache_numbers(config) -> CacheSize:
    """Numbers in the cache of all layers; MTP layers are not counted, as in the papers."""
    return sum((layer_cache_numbers(config, i) for i in range(config.num_hidden_layers)), CacheSize(0))


def multi_head_cache_numbers(config) -> int:
    """Numbers per token that plain multi-head attention of the same layers and heads keeps: all keys and values."""
    expanded = config.uses("mla") or config.uses("dsa")
    key_width = config.qk_nope_head_dim + config.qk_rope_head_dim if expanded else config.head_dim
    value_width = config.v_head_dim if expanded else config.head_dim
    return config.num_hidden_layers * config.num_attention_heads * (key_width + value_width)


def cache_bytes_per_token(config, itemsize: int = 2) -> float:
    """Bytes that every token of the past holds in the cache of all layers, at `itemsize` bytes per number."""
    return float(cache_numbers(config).per_token * itemsize)


def released_cache_bytes_per_token(config) -> float:
    """The same in the number formats of DeepSeek's releases: V3.2 and V4 partly FP8 and FP4, all others bf16."""
    return float(sum(released_layer_bytes(config, i) for i in range(config.num_hidden_layers)))


def released_layer_bytes(config, layer_idx: int) -> Fraction | int:
    """The same for `model.layers.{layer_idx}` alone."""
    kind, rotary = config.token_mixer(layer_idx), config.qk_rope_head_dim
    if kind == "dsa":
        quantised = config.kv_lora_rank + 4 * ceil(config.kv_lora_rank / 128) + 2 * rotary
        return quantised + config.index_head_dim + 4 * ceil(config.index_head_dim / 128)
    if kind in ("csa", "hca"):
        still = config.head_dim - rotary
        entry = still + 2 * rotary + 8 * ceil(still / (8 * 64))
        if kind == "hca":
            return Fraction(entry, config.compress_rate_hca)
        index_entry = config.index_head_dim // 2 + ceil(config.index_head_dim / 32)
        return Fraction(entry + index_entry, config.compress_rate_csa)
    return 2 * layer_cache_numbers(config, layer_idx).per_token

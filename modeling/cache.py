"""The cache: a list of layers, one per decoder layer, with one interface whatever the token mixers are.

transformers makes the caches, `DynamicCache` or `StaticCache`, by its own table of layer types. `adopt_cache` puts the
layers that the config's token mixers need into them, rather than into that table, where they would take the place of
those of transformers' own DeepSeek models:

                mha, mla, dsa (`cache_layers`)      swa, csa, hca (`compressed_cache`)
    dynamic     KeyValueCacheLayer                  CompressedCacheLayer
    static      StaticKeyValueCacheLayer            StaticCompressedCacheLayer

Every layer, and the cache as a whole, has `nbytes`, `allocated_nbytes`, `crop`, `reset`, `reorder_cache`,
`batch_repeat_interleave`, `batch_select_indices`, `activate_past_recording` and offloading; dynamic ones `batch_append`
and `drop_oldest` too.
"""

import copy

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.utils import logging

from .cache_layers import FathomCacheLayer, KeyValueCacheLayer, StaticKeyValueCacheLayer
from .compressed_cache import CompressedCacheLayer, StaticCompressedCacheLayer

logger = logging.get_logger(__name__)


class FathomCache(Cache):
    """What an adopted cache can do beside what transformers' caches can."""

    layers: list[FathomCacheLayer]

    def nbytes(self) -> int:
        """Bytes held for tokens in all layers, as `cache_size` counts them."""
        return sum(layer.nbytes() for layer in self.layers)

    def allocated_nbytes(self) -> int:
        """Bytes of all tensors, with empty room and bookkeeping."""
        return sum(layer.allocated_nbytes() for layer in self.layers)

    def layer(self, layer_idx: int) -> FathomCacheLayer:
        """That of the mixer with this index."""
        return self.layers[layer_idx]

    def fetch(self, layer_idx: int, device: torch.device) -> FathomCacheLayer:
        """The layer, with all its tensors on `device`; where layers are offloaded, the next begins to come too."""
        layer = self.layers[layer_idx]
        if self.offloading and device.type != "cpu":
            computing = torch.accelerator.current_stream(device)
            computing.wait_stream(self.prefetch_stream)
            layer.prefetch()
            # The next layer's tensors may take memory that is still read here.
            self.prefetch_stream.wait_stream(computing)
            if not (self.only_non_sliding and all(self.is_sliding)):
                self.prefetch(layer_idx + 1, self.only_non_sliding)
        return layer

    def release(self, layer_idx: int) -> None:
        """Says that the layer is not needed before the next forward: it may be offloaded."""
        if self.offloading:
            self.offload(layer_idx, self.only_non_sliding)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers, whose own works with CUDA alone where layers are offloaded."""
        if not self.offloading:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = self.fetch(layer_idx, key_states.device).update(key_states, value_states, *args, **kwargs)
        self.release(layer_idx)
        return keys, values


class FathomDynamicCache(FathomCache, DynamicCache):
    """An adopted `DynamicCache`. Rows may come and go while others are being continued."""

    def batch_append(self, other: "FathomDynamicCache") -> None:
        """Puts the rows of another cache below these, for one forward to continue them all.

        Rows end in the same column, and the shorter begin with padding: from now on forwards need an attention mask
        with zeros there, and position ids, since rows differ in them. `other` must not be used any more.

        Raises:
            ValueError: one of the two is empty, or they are not of one model.
        """
        kinds = [[type(layer) for layer in cache.layers] for cache in (self, other)]
        if not isinstance(other, FathomDynamicCache) or kinds[0] != kinds[1]:
            raise ValueError("batch_append() takes a growing cache of the same model")
        if not all(layer.is_initialized for layer in (*self.layers, *other.layers)):
            raise ValueError("batch_append() takes caches with tokens in them; an empty one has no rows")
        for layer, others in zip(self.layers, other.layers, strict=True):
            layer.batch_append(others)

    def copied(self) -> "FathomDynamicCache":
        """A cache with the same tensors, of which the two may then keep different rows (`batch_select_indices`)."""
        other = copy.copy(self)
        other.layers = [layer.copied() for layer in self.layers]
        return other

    def drop_oldest(self, columns: int) -> None:
        """Forgets columns at the beginning that are padding in every row, as when the longest row has been removed.

        Raises:
            ValueError: not a number of columns such that tokens are left.
        """
        length = int(self.get_seq_length())
        if not 0 <= columns < length:
            raise ValueError(f"drop_oldest({columns}) must be at least 0 and less than the {length} columns there are")
        if columns:
            for layer in self.layers:
                layer.drop_oldest(columns)


class FathomStaticCache(FathomCache, StaticCache):
    """An adopted `StaticCache`."""


def offloaded_where_it_can_be(generation_config: GenerationConfig) -> GenerationConfig:
    """The settings of a call of `generate`, with a cache that stays where it is if there is no accelerator.

    An offloaded cache keeps its layers on the CPU while an accelerator does not need them. Without one all of it is
    there anyway; transformers asks for a stream all the same, and a CUDA build of PyTorch has none without a driver.
    """
    kind = generation_config.cache_implementation
    if kind is None or "offloaded" not in kind or torch.accelerator.is_available():
        return generation_config
    logger.warning_once(f"cache_implementation='{kind}': there is no accelerator, so the cache is on the CPU as it is")
    generation_config = copy.copy(generation_config)
    generation_config.cache_implementation = "static" if "static" in kind else "dynamic"
    return generation_config


def adopt_cache(cache: Cache, config) -> None:
    """Makes a `DynamicCache` or `StaticCache` one of ours, in place; nothing happens to one that is.

    Where keys and values are all that layers hold, caches of other classes (quantised ones, say) and static ones with
    tensors in them (which `torch.export` has made graph inputs) are good as they are, and stay so.

    Raises:
        ValueError: a cache that was filled by another kind of model, or that cannot hold what the layers need.
    """
    compresses = config.compresses
    if not hasattr(cache, "layers"):  # the paged cache of `generate_batch`, which is no `Cache`
        check_paging(config)
        return
    for layer in cache.layers:
        if isinstance(layer, FathomCacheLayer) and isinstance(layer, CompressedCacheLayer) != compresses:
            raise ValueError("the cache was filled by another kind of model; start with a new cache")
    if isinstance(cache, FathomCache):
        return
    known, static = type(cache) in (DynamicCache, StaticCache), type(cache) is StaticCache
    filled = any(layer.is_initialized for layer in cache.layers)
    if compresses and not known:
        raise ValueError(f"swa, csa and hca layers take a DynamicCache or a StaticCache, no {type(cache).__name__}")
    if compresses and filled:
        raise ValueError("the cache was filled by another kind of model; start with a new cache")
    if not known or (static and filled):
        return
    if filled:
        check_widths(cache, config)
    for index in range(config.num_hidden_layers):
        layer = cache_layer(config, index, cache.get_max_length() if static else None)
        if index < len(cache.layers) and cache.layers[index].is_initialized:
            layer.update(cache.layers[index].keys, cache.layers[index].values)
        cache.layers[index : index + 1] = [layer]
    cache.__class__ = FathomStaticCache if static else FathomDynamicCache


def check_paging(config) -> None:
    """Raises ValueError where transformers' paged cache cannot hold what the layers cache."""
    mixers = {config.token_mixer(index) for index in range(config.num_hidden_layers)}
    if mixers != {"mha"}:
        raise ValueError(
            f"transformers' continuous batching (generate_batch) pages keys and values of one head size, which "
            f"{', '.join(sorted(mixers))} layers do not cache; let calls of generate() share a batch (share_batch)"
        )


def empty_cache(config) -> FathomDynamicCache:
    """A growing cache without tokens."""
    cache = DynamicCache(config=config)
    adopt_cache(cache, config)
    return cache  # type: ignore[return-value]


def check_widths(cache: Cache, config) -> None:
    """Raises ValueError unless the filled layers of a foreign cache hold what this model's layers cache per token.

    PEFT's prefix tuning, for one, makes keys and values of all heads, which latent attention does not cache.
    """
    for index, layer in enumerate(cache.layers[: config.num_hidden_layers]):
        if not layer.is_initialized:
            continue
        kind = config.token_mixer(index)
        if kind == "mha":
            expected = [(config.num_key_value_heads, config.head_dim)] * 2
        else:
            expected = [
                (1, config.kv_lora_rank + config.qk_rope_head_dim),
                (1, config.index_head_dim if kind == "dsa" else 0),
            ]
        found = [(rows.shape[1], rows.shape[-1]) for rows in (layer.keys, layer.values)]
        if found != expected:
            raise ValueError(
                f"the cache holds keys and values of {found} heads and widths where layer {index} ({kind}) caches "
                f"{expected}: it was filled by another kind of model; start with a new cache (PEFT's prefix tuning "
                f"fits multi-head attention alone, its prompt tuning all mixers)"
            )


def cache_layer(config, layer_idx: int, max_cache_len: int | None = None) -> FathomCacheLayer:
    """An empty cache of `model.layers.{layer_idx}`; with `max_cache_len` of fixed shape, for so many tokens."""
    if not config.compresses:
        return KeyValueCacheLayer() if max_cache_len is None else StaticKeyValueCacheLayer(max_cache_len)
    block, tail = {
        "swa": (1, 0),
        # The unfinished block, and before it the one whose tokens the next entry also reads.
        "csa": (config.compress_rate_csa, 2 * config.compress_rate_csa - 1),
        "hca": (config.compress_rate_hca, config.compress_rate_hca - 1),
    }[config.token_mixer(layer_idx)]
    if max_cache_len is None:
        return CompressedCacheLayer(config.sliding_window - 1, tail, block)
    return StaticCompressedCacheLayer(config.sliding_window - 1, tail, block, max_cache_len)

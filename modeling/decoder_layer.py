"""One decoder layer: a token mixer and a channel mixer, each between a norm and a residual connection.

The layer is composed from what the config says for its index; no generation has a layer of its own.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention, MultiHeadLatentAttention
from .compressed_attention import CompressedSparseAttention, HeavilyCompressedAttention, SlidingWindowAttention
from .experts import HashMixtureOfExperts, MixtureOfExperts
from .feed_forward import DenseChannelMixer
from .hyper_connections import HyperConnection
from .layer_operator import decode_in_graph, know
from .native_compressed import decode_compressed
from .native_step import decode_channels, decode_layer, remember_but_last
from .normalization import FathomRMSNorm
from .residual import ResidualConnection
from .sparse_attention import DeepseekSparseAttention

TOKEN_MIXERS: dict[str, type[nn.Module]] = {
    "mha": MultiHeadAttention,
    "mla": MultiHeadLatentAttention,
    "dsa": DeepseekSparseAttention,
    "swa": SlidingWindowAttention,
    "csa": CompressedSparseAttention,
    "hca": HeavilyCompressedAttention,
}
CHANNEL_MIXERS: dict[str, type[nn.Module]] = {
    "dense": DenseChannelMixer,
    "moe": MixtureOfExperts,
    "hash": HashMixtureOfExperts,
}


def connection(config) -> nn.Module:
    """A sub-layer's connection to the residual stream, or to the streams."""
    return ResidualConnection() if config.hc_mult == 1 else HyperConnection(config)


class LayerOutput(NamedTuple):
    """What a decoder layer returns. Statistics are returned, not stored: gradient checkpointing runs a layer twice."""

    hidden_states: torch.Tensor  # [B, T, d], or with n > 1 residual streams [B, T, n, d]
    expert_counts: torch.Tensor | None = None  # the fields of `LayerStatistics`
    balance_loss: torch.Tensor | None = None
    indexer_report: torch.Tensor | None = None


class LayerStatistics(NamedTuple):
    """What a decoder layer found out about its tokens."""

    expert_counts: torch.Tensor | None = None  # [E], tokens per routed expert
    balance_loss: torch.Tensor | None = None  # scalar, weighted; in training only
    indexer_report: torch.Tensor | None = None  # [F, B, T], of the token mixer's indexer, where asked for (`indexing`)


class FathomDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = TOKEN_MIXERS[config.token_mixer(layer_idx)](config, layer_idx)
        self.mlp = CHANNEL_MIXERS[config.channel_mixer(layer_idx)](config, layer_idx)
        self.input_layernorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_hc = connection(config)
        self.ffn_hc = connection(config)
        know(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        know(self)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        token_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> LayerOutput:
        """Residual stream [B, T, d] (or streams [B, T, n, d]) in and out.

        Args:
            token_mask: [B, T], True for tokens that are no padding. None: all are real.
            input_ids: [B, T], for channel mixers that route by token id.
            position_embeddings, attention_mask, cache, **kwargs: go to the token mixer.
        """
        if not kwargs.get("report_indexer"):
            decoded = self.decoded(
                hidden_states, position_embeddings, attention_mask, cache, token_mask, input_ids, **kwargs
            )
            if decoded is not None:
                return LayerOutput(*decoded)
        mixer_input, mixing = self.attn_hc(hidden_states)
        mixed, _, indexer_report = self.self_attn(
            self.input_layernorm(mixer_input),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = self.attn_hc.write(hidden_states, mixed, mixing)
        del mixer_input, mixed  # each as large as the stream of a long text, which is at its largest further down
        decoded = decode_channels(self, hidden_states, token_mask, input_ids)
        if decoded is not None:
            return LayerOutput(*decoded, None, indexer_report)
        mixer_input, mixing = self.ffn_hc(hidden_states)
        mixed, expert_counts, balance_loss = self.mlp(
            self.post_attention_layernorm(mixer_input), token_mask=token_mask, input_ids=input_ids
        )
        del mixer_input
        hidden_states = self.ffn_hc.write(hidden_states, mixed, mixing)
        return LayerOutput(hidden_states, expert_counts, balance_loss, indexer_report)

    def remember_but_last(self, hidden_states: torch.Tensor, **inputs) -> None:
        """Caches what later tokens need of all of these, [B, T, d] or [B, T, n, d], but the last; computes no output.

        Args:
            inputs: as in `forward`, with a cache.
        """
        if remember_but_last(self, hidden_states, **inputs):
            return
        mixer_input, _ = self.attn_hc(hidden_states)
        self.self_attn.remember_but_last(self.input_layernorm(mixer_input), **inputs)

    def decoded(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None,
        token_mask: torch.Tensor | None,
        input_ids: torch.Tensor | None,
        places: torch.Tensor | None = None,
        rotations: dict | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Output and expert counts by native calls; None where modules are to be called."""
        compiles = torch.compiler.is_compiling()
        if places is not None:
            shared = places, cache, token_mask, input_ids, rotations
            return None if compiles else decode_compressed(self, hidden_states, *shared)
        if kwargs.get("is_causal") is False:
            return None
        decode = decode_in_graph if compiles else decode_layer
        shared = position_embeddings, attention_mask, cache, token_mask, input_ids
        return decode(self, hidden_states, *shared)

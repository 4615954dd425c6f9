"""One decoder layer: a token mixer and a channel mixer, each between a norm and a residual connection.

The layer is composed from what the config says for its index; no generation has a layer of its own.
"""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import MultiHeadAttention, MultiHeadLatentAttention
from .experts import MixtureOfExperts
from .feed_forward import DenseChannelMixer
from .normalization import FathomRMSNorm
from .residual import ResidualConnection
from .sparse_attention import DeepseekSparseAttention

TOKEN_MIXERS: dict[str, type[nn.Module]] = {
    "mha": MultiHeadAttention,
    "mla": MultiHeadLatentAttention,
    "dsa": DeepseekSparseAttention,
}
CHANNEL_MIXERS: dict[str, type[nn.Module]] = {"dense": DenseChannelMixer, "moe": MixtureOfExperts}


class LayerOutput(NamedTuple):
    """What a decoder layer returns. Statistics are returned, not stored: gradient checkpointing runs a layer twice."""

    hidden_states: torch.Tensor  # [B, T, d]
    expert_counts: torch.Tensor | None = None  # [E], tokens per routed expert
    balance_loss: torch.Tensor | None = None  # scalar, weighted; in training only


class FathomDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.self_attn = TOKEN_MIXERS[config.token_mixer(layer_idx)](config, layer_idx)
        self.mlp = CHANNEL_MIXERS[config.channel_mixer(layer_idx)](config)
        self.input_layernorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_residual = ResidualConnection()
        self.mlp_residual = ResidualConnection()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> LayerOutput:
        """Hidden states [B, T, d] in and out; `token_mask` [B, T] is True for tokens that are no padding."""
        mixed, _ = self.self_attn(
            self.input_layernorm(self.attn_residual.read(hidden_states)),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = self.attn_residual.write(hidden_states, mixed)
        mixed, expert_counts, balance_loss = self.mlp(
            self.post_attention_layernorm(self.mlp_residual.read(hidden_states)), token_mask=token_mask
        )
        return LayerOutput(self.mlp_residual.write(hidden_states, mixed), expert_counts, balance_loss)

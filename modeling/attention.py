"""Token mixing by dense attention: multi-head attention (MHA) and multi-head latent attention (MLA).

MHA (arXiv 1706.03762, section 3.2): `softmax(Q K^T / sqrt(d_k)) V` per head; with fewer key/value heads it is
grouped-query attention (arXiv 2305.13245).

MLA (DeepSeek-V2, arXiv 2405.04434, eqs 9-19): keys and values of all heads are expanded from one small latent
per token, and only the latent and one shared rotary key are cached:

    c_q = norm(W_DQ h),  q = W_UQ c_q = [q_nope | q_pe]         c = norm(W_DKV h),  k_pe = rope(W_KR h)
    k_nope, v = W_UK c, W_UV c                                   o = softmax((q_nope k_nope + q_pe k_pe) s) v

For few queries over a long cache the expansion is the whole cost. It can be moved to the other side of the
product, `q_nope (W_UK c) = (W_UK^T q_nope) c`, and attention runs on the latents themselves ("absorbed").

Shapes: B batch, T query tokens, S key tokens, H heads, D head width, R latent width, P rotary width,
Q query latent width, d width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blockwise_attention import causal_attention, serves
from .cache import FathomCache
from .fused import PLAIN, is_plain, kernels_for, kernels_of, one_for_all_heads
from .memory import give_back_freed_memory
from .normalization import FathomRMSNorm
from .products import mapped, project
from .rotary import apply_rotary, yarn_softmax_scale

# Of longer texts MLA has the queries, keys and values of fewer heads at a time, where no gradient is asked for.
TOKENS_OF_ALL_HEADS = 8192


def is_read_by_heads(tokens: int) -> bool:
    return tokens > TOKENS_OF_ALL_HEADS


class MixerOutput(NamedTuple):
    """What a token mixer returns."""

    hidden_states: torch.Tensor  # [B, T, d]
    weights: torch.Tensor | None  # [B, H, T, S], where the attention backend has them
    indexer_report: torch.Tensor | None = None  # [F, B, T], of mixers with an indexer, where asked for (`indexing`)


class FathomAttention(nn.Module):
    """What every token mixer has in common; output recording and attention backends know mixers by this class."""

    is_causal = True

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.num_key_value_groups = 1

    def remember_but_last(self, hidden_states: torch.Tensor, cache: FathomCache, **inputs) -> None:
        """Caches what later queries need of hidden states [B, T, d] but the last, and computes no output.

        Args:
            inputs: as in `forward`, of which a mask is not needed.
        """
        raise NotImplementedError("a token mixer caches what it needs")

    def update_but_last(self, cache: FathomCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Caches keys and values [B, H, T, D] of all tokens but the last, for which there is room."""
        cache.update(keys, values, self.layer_idx)
        cache.layer(self.layer_idx).crop(-1)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled dot-product attention through the backend that `config._attn_implementation` names.

        Args:
            query: [B, H, T, D]. key: [B, H_kv, S, D]. value: [B, H_kv, S, D_v].
            attention_mask: as made by transformers' `create_causal_mask` for that backend.

        Returns:
            Output [B, T, H * D_v]; attention weights [B, H, T, S] where the backend has them, else None.
        """
        if self.trains_causally(attention_mask, **kwargs) and serves(query, key, value):
            return causal_attention(query, key, value, self.scaling).flatten(2), None
        output = self.read_text(query, key, value, attention_mask, **kwargs)
        if output is not None:
            return output.flatten(2), None
        interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return output.flatten(2), weights

    def read_text(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        is_causal: bool | None = None,
        **_,
    ) -> torch.Tensor | None:
        """Attention as `attend` by the native function, [B, T, H, D_v]; None where it cannot be called."""
        if self.config._attn_implementation != "sdpa":
            return None
        # Without a mask all new tokens are all there are, and causal, or a single one sees everything.
        if attention_mask is None and (query.shape[2] not in (1, key.shape[2]) or is_causal is False):
            return None
        visible = one_for_all_heads(attention_mask)
        if attention_mask is not None and visible is None:
            return None
        kernels = kernels_of(self.training, query)
        return kernels and kernels.attend_text(query, key, value, visible, self.scaling)

    def trains_causally(self, attention_mask: torch.Tensor | None, is_causal: bool | None = None, **_) -> bool:
        """Whether this is training by SDPA without padding, packed documents or dropout."""
        plain = self.training and attention_mask is None and is_causal is not False and not self.attention_dropout
        return plain and self.config._attn_implementation == "sdpa"


def eager_attention(
    module: FathomAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: softmax in fp32 over `scaling * Q K^T` plus an additive mask. Shapes as in `attend`."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling  # [B, H, T, S]
    weights = masked_softmax(scores, attention_mask).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights  # [B, T, H, D_v]


def masked_softmax(scores: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """fp32 softmax of `scores` [B, H, T, S] under a boolean (True = visible) or additive mask [B, 1, T, S].

    A query that may see nothing (left padding) gets finite weights: its output is never used, but a NaN would be.
    """
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(dim=-1, dtype=torch.float32)


class MultiHeadAttention(FathomAttention):
    """Classic multi-head or grouped-query attention, with rotary positions or none."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.rope_interleave = config.rope_interleave
        self.scaling = self.head_dim**-0.5 * yarn_softmax_scale(config)
        query_width = config.num_attention_heads * self.head_dim
        key_width = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MixerOutput:
        """Mixes the tokens of hidden states [B, T, d]."""
        query = self.heads(mapped(hidden_states, self.q_proj), position_embeddings)  # [B, H, T, D]
        key, value = self.keys_and_values(hidden_states, position_embeddings)
        if cache is not None:
            # transformers' paged cache reads and writes the attention's arguments.
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        output, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return MixerOutput(mapped(output, self.o_proj), weights)

    def remember_but_last(self, hidden_states, cache, position_embeddings=None, **_) -> None:
        self.update_but_last(cache, *self.keys_and_values(hidden_states, position_embeddings))

    def keys_and_values(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached of hidden states [B, T, d]: keys and values, [B, H_kv, T, D]."""
        key = self.heads(mapped(hidden_states, self.k_proj), position_embeddings)
        return key, self.heads(mapped(hidden_states, self.v_proj), None)

    def heads(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """[B, T, H D] -> [B, H, T, D], rotated where positions are given."""
        x = x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if position_embeddings is None:
            return x
        return apply_rotary(x, *position_embeddings, interleaved=self.rope_interleave)


class MultiHeadLatentAttention(FathomAttention):
    """MLA with the compressed cache: per token and layer R + P numbers, whatever the number of heads."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.qk_head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.rope_interleave = config.rope_interleave
        self.scaling = self.qk_head_dim**-0.5 * yarn_softmax_scale(config)

        query_width = self.num_heads * self.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = FathomRMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.compresses_queries = config.q_lora_rank is not None

        self.kv_a_proj_with_mqa = nn.Linear(
            config.hidden_size, self.kv_lora_rank + self.qk_rope_head_dim, bias=config.attention_bias
        )
        self.kv_a_layernorm = FathomRMSNorm(self.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MixerOutput:
        """Mixes the tokens of hidden states [B, T, d]."""
        q_latent, latents = self.compress(hidden_states)
        by_heads = attention_mask is None and self.reads_by_heads(q_latent.shape[1])
        if by_heads:
            latents = self.normed_latents(latents, position_embeddings)
        else:
            query, latents = self.queries_and_latents(q_latent, latents, position_embeddings)
        if cache is not None:
            # They are all that is kept: the layer's values are empty.
            latents, _ = cache.update(latents, latents[..., :0], self.layer_idx)
        if by_heads:
            output, weights = self.attend_by_heads(q_latent, latents, position_embeddings, **kwargs), None
        else:
            output, weights = self.attend_latents(query, latents, attention_mask, **kwargs)
        return MixerOutput(project(output, self.o_proj)[0], weights)

    def remember_but_last(self, hidden_states, cache, position_embeddings=None, **_) -> None:
        latents = self.latents(hidden_states, position_embeddings)
        self.update_but_last(cache, latents, latents[..., :0])

    def latents(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """What is cached of hidden states [B, T, d], as `queries_and_latents` says it."""
        (latents,) = project(hidden_states, self.kv_a_proj_with_mqa)
        return self.normed_latents(latents, position_embeddings)

    def compress(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries, and what keys and values are expanded from.

        Returns:
            The normed query latent [B, T, Q], or without one the hidden states [B, T, d] themselves; and latent and
            rotary key side by side [B, T, R + P], neither normed nor rotated.
        """
        if not self.compresses_queries:
            return hidden_states, self.kv_a_proj_with_mqa(hidden_states)
        q_latent, latents = project(hidden_states, self.q_a_proj, self.kv_a_proj_with_mqa)
        return self.q_a_layernorm(q_latent), latents

    def queries_and_latents(
        self, q_latent: torch.Tensor, latents: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What attends and what is attended to.

        Args:
            q_latent, latents: see `compress`.

        Returns:
            Queries [B, H, T, D + P]; and what is cached, normed latent and rotated key side by side [B, 1, T, R + P].
            (Transformers' cache layers want the dimension of 1.)
        """
        (query,) = project(q_latent, self.q_b_proj if self.compresses_queries else self.q_proj)
        query = query.view(*q_latent.shape[:-1], self.num_heads, self.qk_head_dim)  # [B, T, H, D + P]
        norm, rank = self.kv_a_layernorm, self.kv_lora_rank
        given = query, latents, norm.weight, *position_embeddings
        kernels = kernels_for(self.training, q_latent.shape[:2].numel(), *given, any_text=True)
        if kernels is not None:
            rotate = partial(kernels.norm_rotate, interleaved=self.rope_interleave, rotary=self.qk_rope_head_dim)
            rotated = rotate(query, *position_embeddings, first=self.qk_nope_head_dim)
            normed = {"norm_width": rank, "norm": norm.weight, "eps": norm.eps}
            cached = rotate(latents.unsqueeze(2), *position_embeddings, first=rank, **normed)
            if rotated is not None and cached is not None:
                return rotated.transpose(1, 2), cached.transpose(1, 2)
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_pe = self.split_latents(latents)
        # The key is rotated as one more head: a rotation is many small operations.
        unrotated = torch.cat((q_pe, k_pe.unsqueeze(2)), dim=2)  # [B, T, H + 1, P]
        rotated = apply_rotary(unrotated, *position_embeddings, interleaved=self.rope_interleave, heads=2)
        q_pe, k_pe = rotated.to(query.dtype).split([self.num_heads, 1], dim=2)
        latents = torch.cat((norm(latent), k_pe.squeeze(2)), dim=-1)
        return torch.cat((q_nope, q_pe), dim=-1).transpose(1, 2), latents.unsqueeze(1)

    def normed_latents(
        self, latents: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """What `queries_and_latents` says is cached, without queries."""
        latent, k_pe = self.split_latents(latents.unsqueeze(1))
        k_pe = apply_rotary(k_pe, *position_embeddings, interleaved=self.rope_interleave)
        return torch.cat((self.kv_a_layernorm(latent), k_pe.to(latents.dtype)), dim=-1)

    def reads_by_heads(self, tokens: int) -> bool:
        """Whether a text of so many tokens is long enough, and the maps plain enough, for `attend_by_heads`."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not is_read_by_heads(tokens):
            return False
        queries = self.q_b_proj if self.compresses_queries else self.q_proj
        plain = is_plain(queries) and type(queries.weight) in PLAIN and not queries.weight.is_meta
        return plain and self.knows_expansion() and self.config._attn_implementation == "sdpa"

    def attend_by_heads(
        self,
        q_latent: torch.Tensor,
        latents: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        **kwargs,
    ) -> torch.Tensor:
        """Causal `expanded_attention` for some heads at a time, whose queries, keys and values alone are there.

        Args:
            q_latent: [B, T, Q], see `compress`.
            latents: [B, 1, S, R + P], what is cached.

        Returns:
            [B, T, H * D_v].
        """
        tokens = q_latent.shape[1]
        give_back_freed_memory(tokens)
        of_queries = (self.q_b_proj if self.compresses_queries else self.q_proj).weight
        of_queries = of_queries.unflatten(0, (self.num_heads, -1))  # [H, D + P, Q]
        expansion = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))  # [H, D + D_v, R]
        output = q_latent.new_empty(*q_latent.shape[:2], self.num_heads * self.v_head_dim)
        count = max(1, self.num_heads * TOKENS_OF_ALL_HEADS // tokens)
        maps = of_queries.split(count), expansion.split(count), output.split(count * self.v_head_dim, dim=-1)
        for of_query, of_key_and_value, attended in zip(*maps, strict=True):
            how = position_embeddings, of_query, of_key_and_value
            attended.copy_(self.attend_some_heads(q_latent, latents, *how, **kwargs))
            give_back_freed_memory(tokens)
        return output

    def attend_some_heads(
        self,
        q_latent: torch.Tensor,
        latents: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        of_queries: torch.Tensor,
        expansion: torch.Tensor,
        **kwargs,
    ) -> torch.Tensor:
        """`attend_by_heads` of h heads, whose maps are given, [h, D + P, Q] and [h, D + D_v, R] -> [B, T, h * D_v]."""
        query = F.linear(q_latent, of_queries.flatten(0, 1)).unflatten(-1, (-1, self.qk_head_dim))
        query[..., self.qk_nope_head_dim :] = apply_rotary(
            query[..., self.qk_nope_head_dim :], *position_embeddings, interleaved=self.rope_interleave, heads=2
        )
        key, value = self.expand(latents, expansion)
        return self.attend_expanded(query.transpose(1, 2), key, value, None, **kwargs)[0]

    def split_latents(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., R + P] -> latent [..., R] and rotary key [..., P], without a copy."""
        return latents.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)

    def attend_latents(self, query, latents, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention in the cheaper of the two ways below. Returns [B, T, H * D_v] and weights."""
        # Without a mask several queries are causal (the prompt of a static cache), which SDPA knows and absorbing not.
        masked = attention_mask is not None or query.shape[2] == 1
        absorbs = masked and self.absorbing_pays(query.shape[2], latents.shape[2]) and self.knows_expansion()
        attend = self.absorbed_attention if absorbs else self.expanded_attention
        return attend(query, latents, attention_mask, **kwargs)

    def absorbing_pays(self, new_tokens: int, all_tokens: int) -> bool:
        """Whether attention over the latents needs fewer multiplications than expanding them first.

        Per key token and head, expanding costs R (D + D_v) once; a query costs 2 R + P absorbed and D + P + D_v
        expanded. Only eager and SDPA masks are understood by the absorbed path, and a training step expands.
        """
        if new_tokens == all_tokens or self.config._attn_implementation not in ("eager", "sdpa"):
            return False
        expanded_width = self.qk_nope_head_dim + self.v_head_dim
        return new_tokens * (2 * self.kv_lora_rank - expanded_width) < self.kv_lora_rank * expanded_width

    def knows_expansion(self) -> bool:
        """Whether `kv_b_proj` multiplies by its weight and no more, so that the product can be moved.

        With an adapter (PEFT) or a quantised weight it does something else, and offloaded (accelerate) it has its
        weight only while it is called.
        """
        weight = self.kv_b_proj.weight
        return type(self.kv_b_proj) is nn.Linear and type(weight) in PLAIN and not weight.is_meta

    def expanded_attention(self, query, latents, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Expands keys and values of every head, then attends as usual. Returns [B, T, H * D_v] and weights."""
        return self.attend_expanded(query, *self.expand(latents), attention_mask, **kwargs)

    def attend_expanded(self, query, key, value, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Queries [B, H, T, D + P] over keys and values as `expand` returns them -> [B, T, H * D_v] and weights."""
        # PyTorch's fused kernels need keys and values of one width; zeros on the values are exact and cheap.
        padding = self.qk_head_dim - self.v_head_dim
        blockwise = self.trains_causally(attention_mask, **kwargs) and serves(query, key, value)
        if blockwise or self.config._attn_implementation != "sdpa" or padding <= 0:
            return self.attend(query, key, value, attention_mask, **kwargs)
        output, weights = self.attend(query, key, F.pad(value, (0, padding)), attention_mask, **kwargs)
        return output.unflatten(-1, (query.shape[1], -1))[..., : self.v_head_dim].flatten(2), weights

    def expand(self, latents: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What is cached, [B, 1, S, R + P] -> keys [B, H, S, D + P] and values [B, H, S, D_v].

        Args:
            weight: [H, D + D_v, R] of some heads, which alone are expanded then.
        """
        latent, k_pe = self.split_latents(latents.squeeze(1))  # [B, S, R], [B, S, P]
        expanded = mapped(latent, self.kv_b_proj) if weight is None else F.linear(latent, weight.flatten(0, 1))
        expanded = expanded.unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)  # [B, S, H, D], [B, S, H, D_v]
        key = torch.cat((k_nope, k_pe.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)), dim=-1)
        return key.transpose(1, 2), value.transpose(1, 2)

    def absorbed_attention(self, query, latents, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same numbers as `expanded_attention`, computed on the latents. Returns [B, T, H * D_v] and weights."""
        if self.config._attn_implementation == "sdpa":
            output = self.fused_attention(query, latents, None if attention_mask is None else attention_mask[:, 0])
            if output is not None:
                return output, None
        w_uk, w_uv = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=1
        )  # [H, D, R], [H, D_v, R]
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((q_nope @ w_uk, q_pe), dim=-1)  # [B, H, T, R + P]
        attend = sdpa_with_shared_key if self.config._attn_implementation == "sdpa" else eager_with_shared_key
        output, weights = attend(query, latents, attention_mask, self.scaling)
        output = output[..., : self.kv_lora_rank] @ w_uv.transpose(-1, -2)  # [B, H, T, D_v]
        return output.transpose(1, 2).flatten(2), weights

    def fused_attention(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        visible: torch.Tensor | None,
        chosen: torch.Tensor | None = None,
        most: float | None = None,
    ) -> torch.Tensor | None:
        """Absorbed attention by the native function, [B, T, H * D_v]; None where it cannot be called.

        Args:
            visible: bool [B or 1, T, S], or [B, T, K] with `chosen`; None: every query sees every key.
            chosen: int64 [B, T, K], the keys that a query reads; None: all.
            most: see `kernels_for`.
        """
        query, cache = query.transpose(1, 2).contiguous(), latents.squeeze(1)
        kernels = kernels_for(self.training, query.shape[:2].numel(), query, self.kv_b_proj.weight, most=most)
        sizes = self.scaling, self.kv_lora_rank, self.qk_nope_head_dim
        return kernels and kernels.attend_latents(query, cache, self.kv_b_proj.weight, *sizes, visible, chosen)


def eager_with_shared_key(
    query: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all heads to one key, which is also the value.

    Args:
        query: [B, H, T, D].
        keys: [B, 1, S, D].
        attention_mask: [B or 1, 1, T, S], boolean or additive, or None: every query sees every key.

    Returns:
        Output [B, H, T, D] and weights [B, H, T, S].
    """
    keys = keys.squeeze(1)
    # One product per sequence, with heads and queries side by side, instead of one per head.
    scores = (query.flatten(1, 2) @ keys.transpose(-1, -2) * scaling).unflatten(1, query.shape[1:3])
    weights = masked_softmax(scores, attention_mask).to(query.dtype)
    return (weights.flatten(1, 2) @ keys).unflatten(1, query.shape[1:3]), weights


def sdpa_with_shared_key(
    query: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, None]:
    """The same output by PyTorch's fused kernels: all heads' queries stand in line, as if they were of one head.

    So keys are read once and copied never. Plain products in bf16 on a CPU would, moreover, be prepared anew for every
    length of the cache, which takes longer than they do.
    """
    heads, queries = query.shape[1:3]
    if attention_mask is not None and queries > 1:
        attention_mask = attention_mask.repeat(1, 1, heads, 1)
    line = query.flatten(1, 2).unsqueeze(1)  # [B, 1, H T, D]
    output = F.scaled_dot_product_attention(line, keys, keys, attn_mask=attention_mask, scale=scaling)
    return output.squeeze(1).unflatten(1, (heads, queries)), None

"""Token mixing by DeepSeek Sparse Attention (DSA): MLA over the few keys that a lightning indexer selects.

DeepSeek-V3.2 (arXiv 2512.02556, section 2.1) gives every layer a second, very small attention whose scores only
choose. It has J heads for queries, from MLA's query latent c_q, and one key per token:

    q = W_q c_q,   k = LayerNorm(W_k h),   w = W_w h
    I_ts = sum_j w_tj relu(q_tj k_s) / sqrt(J D)         S_t = the K visible keys s with the largest I_ts
    MLA of query t over the keys in S_t

Rotated are the first P of the D dimensions, as halves; MLA rotates neighbours in its last P (deepseek-ai/
DeepSeek-V3.2-Exp, inference/model.py since 2025-11-17; the code before mixed them up). That code also multiplies q and
k by a Hadamard matrix, which changes no product and serves only to quantise them to FP8.

Ties, and how an indexer is trained: see `indexing`.

Cache. One latent, one rotary key and one indexer key per token: R + P + D numbers. The first two are MLA's `keys` in
transformers' ordinary cache layers, the third their `values`, so that each of those and all they can do (crop, beam
reorder, offload, preallocation) holds for sparse attention.

Shapes: B batch, T query tokens, S key tokens, K chosen keys, H heads, J indexer heads, D indexer head width,
R latent width, P rotary width, d width, Q query latent width.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .attention import MixerOutput, MultiHeadLatentAttention, eager_with_shared_key
from .fused import is_plain, kernels_for
from .host import host_can_read
from .indexing import (
    TrainableIndexer,
    best_keys,
    best_of,
    head_summed_attention,
    head_weights,
    index_scores,
    indexer_report,
    rows_at,
)
from .precision import Float32Linear
from .products import project
from .rotary import apply_rotary

# Queries that are read at a time where a text is long.
QUERIES_AT_ONCE = 256
# Numbers of chosen latents that are held at a time: on a CPU what its cache holds, elsewhere 128 MiB in bf16.
LATENTS_IN_CACHE = 2**20
LATENTS_AT_ONCE = 2**26


class Chosen(NamedTuple):
    """Keys that queries read, int64 [B, T, K], and which of them they see, bool [B, T, K]."""

    indices: torch.Tensor
    visible: torch.Tensor


class IndexerInputs(NamedTuple):
    """What an indexer chooses by; see `LightningIndexer.scores`."""

    hidden_states: torch.Tensor
    q_latent: torch.Tensor
    keys: torch.Tensor
    position_embeddings: tuple[torch.Tensor, torch.Tensor]

    def part(self, queries: slice, keys: int) -> "IndexerInputs":
        """The same of some queries and of the first keys."""
        cos, sin = self.position_embeddings
        rotation = cos[:, queries], sin[:, queries]
        return IndexerInputs(
            self.hidden_states[:, queries], self.q_latent[:, queries], self.keys[:, :, :keys], rotation
        )


class LightningIndexer(TrainableIndexer):
    """Scores every key for every query. Computes in fp32: rounding would choose other keys."""

    def __init__(self, config):
        super().__init__()
        self.n_heads = config.index_n_heads
        self.head_dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = Float32Linear(config.hidden_size, self.n_heads)

    def keys(self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Hidden states [B, T, d] -> keys [B, 1, T, D]."""
        (keys,) = project(hidden_states, self.wk)
        return self.rotate(self.k_norm(keys).unsqueeze(1), position_embeddings)

    def scores(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        keys: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Scores of all keys for all queries.

        Args:
            hidden_states: [B, T, d]. q_latent: MLA's normed query latent [B, T, Q].
            keys: [B, 1, S, D], cached ones included.

        Returns:
            [B, T, S] in fp32. Keys that a query may not see are scored as well.
        """
        query = self.queries(q_latent, position_embeddings)
        return index_scores(query, keys.squeeze(1), head_weights(self.weights_proj, hidden_states, self.head_dim))

    def queries(self, q_latent: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Query latent [B, T, Q] -> queries [B, J, T, D]."""
        (query,) = project(q_latent, self.wq_b)
        query = query.unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        return self.rotate(query, position_embeddings)

    def choose(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        keys: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        top_k: int,
        most: float | None = None,
    ) -> Chosen | None:
        """The `top_k` best visible keys of every query by the native function; None where it cannot be called.

        Args:
            attention_mask: [B or 1, 1, T, S], boolean, or None: every query sees every key. The others: see `scores`.
            most: see `kernels_for`.
        """
        keys, visible = keys.squeeze(1), None if attention_mask is None else attention_mask[:, 0]
        hidden_states = hidden_states.contiguous()
        weight = self.weights_proj.weight
        kernels = kernels_for(self.training, hidden_states.shape[:2].numel(), hidden_states, weight, most=most)
        if kernels is None or not is_plain(self.weights_proj, Float32Linear):
            return None
        query = self.queries(q_latent, position_embeddings).transpose(1, 2)
        choice = kernels.choose_keys(query, keys, hidden_states, weight, visible, top_k)
        return choice and Chosen(*choice)

    def rotate(self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Rotates the first P dimensions of [B, J, T, D], paired as halves."""
        kernels = kernels_for(self.training, x.shape[0] * x.shape[2], x.transpose(1, 2), *position_embeddings)
        turned = kernels and kernels.norm_rotate(x.transpose(1, 2), *position_embeddings, interleaved=False)
        if turned is not None:
            return turned.transpose(1, 2)
        rotary, rest = x.split([self.rope_dim, self.head_dim - self.rope_dim], dim=-1)
        return torch.cat((apply_rotary(rotary, *position_embeddings, interleaved=False), rest), dim=-1)


class DeepseekSparseAttention(MultiHeadLatentAttention):
    """MLA in which a query reads at most `index_topk` keys."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.index_topk = config.index_topk
        self.index_dense = config.index_dense
        self.indexer = LightningIndexer(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        report_indexer: bool = False,
        mask_is_causal: bool = False,
        **kwargs,
    ) -> MixerOutput:
        """Mixes the tokens of hidden states [B, T, d].

        Args:
            report_indexer: whether the output is to have the indexer's report.
            mask_is_causal: whether `attention_mask` is known to show no query a key behind its own.
        """
        q_latent, latents = self.compress(hidden_states)
        query, latents = self.queries_and_latents(q_latent, latents, position_embeddings)
        reports = report_indexer and self.indexer.has_report()
        # A choice has no gradient: without the indexer's own loss nothing is to be kept for one.
        learns = reports and torch.is_grad_enabled()
        with torch.set_grad_enabled(learns):
            index_keys = self.indexer.keys(hidden_states.detach(), position_embeddings)
        if cache is not None:
            latents, index_keys = cache.update(latents, index_keys, self.layer_idx)

        attend, report = self.attend_latents, None
        selects = latents.shape[2] > self.index_topk and not self.index_dense
        if selects and not reports and self.reads_chosen(query, attention_mask):
            chosen = self.indexer.choose(
                hidden_states, q_latent, index_keys, position_embeddings, attention_mask, self.index_topk
            )
            output = None if chosen is None else self.fused_attention(query, latents, chosen.visible, chosen.indices)
            if output is not None:
                return MixerOutput(project(output, self.o_proj)[0], None)
        if selects and not reports and self.parts_pay(query):
            given = IndexerInputs(hidden_states, q_latent, index_keys, position_embeddings)
            choice, read = partial(self.choice, given), partial(self.read_part, query, latents, given)
            parts = partial(visible_to_part, attention_mask, mask_is_causal, query.shape[2], latents)
            output, weights = self.attend_in_parts(query, latents, parts, choice, read, **kwargs)
            return MixerOutput(self.o_proj(output), weights)
        if selects or reports:
            with torch.set_grad_enabled(learns):
                scores = self.indexer.scores(hidden_states.detach(), q_latent.detach(), index_keys, position_embeddings)
            best_mask = keep_best(scores.detach(), attention_mask, self.index_topk)
            if reports:
                report = self.report(query, latents, attention_mask, best_mask, scores)
            if selects:
                attention_mask = best_mask
                if self.gathering_pays(query, latents):
                    attend = self.gathered_attention
        output, weights = attend(query, latents, attention_mask, **kwargs)
        return MixerOutput(project(output, self.o_proj)[0], weights, report)

    def remember_but_last(self, hidden_states, cache, position_embeddings=None, **_) -> None:
        latents = self.latents(hidden_states, position_embeddings)
        self.update_but_last(cache, latents, self.indexer.keys(hidden_states, position_embeddings))

    def reads_chosen(self, query: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
        """Whether native functions may choose keys and attend to them."""
        # Without a mask several queries are causal, which they do not know.
        masked = attention_mask is not None or query.shape[2] == 1
        return masked and self.config._attn_implementation == "sdpa" and self.knows_expansion()

    def report(
        self, query, latents, attention_mask: torch.Tensor | None, best_mask, scores: torch.Tensor
    ) -> torch.Tensor:
        """The indexer's scores against MLA's attention, with the masks before and after its choice: [F, B, T]."""
        visible = visible_keys(attention_mask, scores)
        selected = visible & visible_keys(best_mask, scores)
        with torch.no_grad():
            keys, _ = self.expand(latents)
        attention = partial(head_summed_attention, query, keys, scaling=self.scaling)
        return indexer_report(
            scores, visible, selected, attention, self.index_dense, not self.training, self.index_topk
        )

    def parts_pay(self, query: torch.Tensor) -> bool:
        """Whether a text is so long that it is read in parts. `eager` is the reference, and has all weights at once.

        Nor does a compiled graph: which keys a part needs depends on the data.
        """
        sdpa = self.config._attn_implementation == "sdpa"
        return sdpa and not torch.compiler.is_compiling() and query.shape[2] > QUERIES_AT_ONCE

    @torch.no_grad()
    def choice(self, inputs: IndexerInputs, part: slice, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a `part` of the queries reads of its `visible` keys, bool [B or 1, t, S], as `best_keys` says it."""
        scores = self.indexer.scores(*inputs.part(part, visible.shape[-1]))
        return best_keys(scores.masked_fill_(~visible, float("-inf")), self.index_topk)

    def read_part(
        self,
        query: torch.Tensor,
        latents: torch.Tensor,
        inputs: IndexerInputs,
        part: slice,
        visible: torch.Tensor,
    ) -> torch.Tensor | None:
        """Chooses and attends for a `part` of the queries by native functions, [B, t, H * D_v]; None without them."""
        some = inputs.part(part, visible.shape[-1])
        chosen = self.indexer.choose(*some, visible.unsqueeze(1), self.index_topk, most=math.inf)
        if chosen is None:
            return None
        return self.fused_attention(query[:, :, part], latents, chosen.visible, chosen.indices, most=math.inf)

    def attend_in_parts(
        self, query, latents, visible_to, choice, read, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Chooses and attends for some queries at a time, among the keys up to the last that they may see.

        So neither scores nor masks grow with the square of T. Returns [B, T, H * D_v] and None.

        Args:
            visible_to: the keys that a part of the queries may see, see `visible_to_part`.
            choice, read: see `choice` and `read_part`; for a part of the queries and the keys that they see.
        """
        expanded = None
        outputs = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            part = slice(start, min(start + QUERIES_AT_ONCE, query.shape[2]))
            visible = visible_to(part)
            seen = visible.shape[-1]
            mask = visible.unsqueeze(1)
            if seen > self.index_topk:
                alone = self.reading_alone_pays(seen)
                output = read(part, visible) if alone else None
                if output is not None:
                    outputs.append(output)
                    continue
                indices, hidden = choice(part, visible)
                if alone:
                    outputs.append(self.read_chosen(query[:, :, part], latents, indices, hidden))
                    continue
                added = torch.zeros_like(hidden, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
                mask = added.new_full((*added.shape[:-1], seen), float("-inf")).scatter_(-1, indices, added)
                mask = mask.unsqueeze(1)
            if expanded is None:
                expanded = self.expand(latents)
            key, value = expanded
            output, _ = self.attend_expanded(query[:, :, part], key[:, :, :seen], value[:, :, :seen], mask, **kwargs)
            outputs.append(output)
        return torch.cat(outputs, dim=1), None

    def reading_alone_pays(self, seen: int) -> bool:
        """Whether queries rather read their chosen latents, each its own, than all `seen` keys under a mask.

        A chosen latent is copied and multiplied by its query alone: measured at nano's and at DeepSeek's proportions of
        the widths, a number of it costs about twice one of a key that all queries read. A gradient would have to be
        added up row by row.
        """
        if torch.is_grad_enabled() or not self.knows_expansion():
            return False
        return 2 * self.index_topk * (self.kv_lora_rank + self.qk_rope_head_dim) < seen * self.qk_head_dim

    def read_chosen(self, query, latents, indices: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Attention of every query to latents of its own.

        Args:
            query: [B, H, T, D + P]. latents: [B, 1, S, R + P].
            indices: [B, T, K], of latents. hidden: bool [B, T, K], which of those are not to be seen.

        Returns:
            [B, T, H * D_v].
        """
        w_uk, w_uv = self.kv_b_proj.weight.view(self.num_heads, -1, self.kv_lora_rank).split(
            [self.qk_nope_head_dim, self.v_head_dim], dim=1
        )  # [H, D, R], [H, D_v, R]
        q_nope, q_pe = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        query = torch.cat((q_nope @ w_uk, q_pe), dim=-1).transpose(1, 2)  # [B, T, H, R + P]
        batch, _, _, width = latents.shape
        latents = latents.squeeze(1).contiguous()
        at_once = LATENTS_IN_CACHE if latents.device.type == "cpu" else LATENTS_AT_ONCE
        rows = max(1, at_once // (indices[:, 0].numel() * width))
        outputs = []
        for some_queries, some, unseen in zip(
            query.split(rows, dim=1), indices.split(rows, dim=1), hidden.split(rows, dim=1), strict=True
        ):
            chosen = rows_at(latents, some).flatten(0, 1).unsqueeze(1)  # [B t, 1, K, R + P]
            visible = ~unseen.flatten(0, 1)[:, None, None]
            output, _ = eager_with_shared_key(some_queries.flatten(0, 1).unsqueeze(2), chosen, visible, self.scaling)
            outputs.append(output[..., 0, : self.kv_lora_rank].unflatten(0, (batch, -1)))  # [B, t, H, R]
        output = torch.cat(outputs, dim=1).transpose(1, 2)
        return (output @ w_uv.transpose(-1, -2)).transpose(1, 2).flatten(2)

    def gathering_pays(self, query: torch.Tensor, latents: torch.Tensor) -> bool:
        """Whether the chosen latents of all queries are fewer than the cached ones.

        Then reading them alone saves products and memory traffic alike. `eager` is the reference and never gathers.
        """
        if self.config._attn_implementation != "sdpa" or not self.knows_expansion():
            return False
        return query.shape[2] * self.index_topk < latents.shape[2]

    def gathered_attention(self, query, latents, attention_mask, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same numbers as `attend_latents`, from the chosen latents alone. Returns [B, T, H * D_v] and None.

        Args:
            attention_mask: [B, 1, T, S] that leaves at most K keys visible to a query.
        """
        batch, _, queries, _ = query.shape
        visible = visible_keys(attention_mask, attention_mask[:, 0])
        # The visible keys of each query; where they are fewer than K, hidden ones fill up and stay masked.
        indices = visible.int().topk(self.index_topk, dim=-1, sorted=False).indices  # [B, T, K]
        sequences = torch.arange(batch, device=indices.device)[:, None, None]
        chosen_mask = attention_mask[:, 0].gather(-1, indices)  # [B, T, K]

        def alone(x: torch.Tensor) -> torch.Tensor:
            """[B, h, T, n] -> [B T, h, 1, n]: every query with keys of its own is a sequence of its own."""
            return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)

        output, _ = self.absorbed_attention(
            alone(query),
            latents[sequences, 0, indices].flatten(0, 1).unsqueeze(1),  # [B T, 1, K, R + P]
            chosen_mask.flatten(0, 1)[:, None, None],
        )
        return output.view(batch, queries, -1), None


def keep_best(scores: torch.Tensor, attention_mask: torch.Tensor | None, top_k: int) -> torch.Tensor:
    """Hides all keys from a query but the `top_k` best of those it may see.

    Args:
        scores: [B, T, S].
        attention_mask: boolean (True = visible) or additive, [B or 1, 1, T, S]; None as PyTorch's SDPA has it: a
            single query sees every key, several see those up to their own, counted from the first.

    Returns:
        A mask of the same kind, [B, 1, T, S].
    """
    if attention_mask is None:
        attention_mask = visible_keys(None, scores).unsqueeze(1)
    scores = scores.unsqueeze(1)
    if attention_mask.dtype == torch.bool:
        return attention_mask & best_of(scores.masked_fill(~attention_mask, float("-inf")), top_k)
    return attention_mask.masked_fill(~best_of(scores + attention_mask, top_k), _hidden(attention_mask))


def visible_to_part(
    attention_mask: torch.Tensor | None, mask_is_causal: bool, queries: int, latents: torch.Tensor, part: slice
) -> torch.Tensor:
    """The keys that a part of the queries may see, bool [B or 1, t, S'], without those beyond the last of them.

    Where the host cannot read the mask (`host`), those beyond are known of a causal one alone.

    Args:
        attention_mask: as in `keep_best`. mask_is_causal: see `DeepseekSparseAttention.forward`.
        queries: their number T. latents: all keys, [B, 1, S, R + P]. part: of the queries.
    """
    if attention_mask is None:
        visible = torch.ones(part.stop - part.start, part.stop, dtype=torch.bool, device=latents.device)
        return visible.tril_(part.start).unsqueeze(0)
    visible = attention_mask[:, 0, part]
    if visible.dtype != torch.bool:
        visible = visible > _hidden(visible)
    if not host_can_read(visible):
        keys = visible.shape[-1]
        return visible[..., : keys - queries + part.stop] if mask_is_causal else visible
    seen = visible.any(dim=0).any(dim=0).nonzero()
    return visible[..., : int(seen[-1]) + 1 if len(seen) else 1]


def visible_keys(attention_mask: torch.Tensor | None, scores: torch.Tensor) -> torch.Tensor:
    """The keys that queries may see, bool [B, T, S], by a mask as in `keep_best` and scores of that shape."""
    if attention_mask is None:
        everything = torch.ones(1, *scores.shape[1:], dtype=torch.bool, device=scores.device)
        return (everything if scores.shape[1] == 1 else everything.tril()).expand_as(scores)
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask > _hidden(attention_mask)
    return attention_mask[:, 0].expand_as(scores)


def _hidden(additive_mask: torch.Tensor) -> float:
    """What an additive mask adds to the score of a hidden key."""
    return torch.finfo(additive_mask.dtype).min

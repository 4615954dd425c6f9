"""Token mixing by a window and a compressed past: DeepSeek-V4's attention (its report, section 2.3).

All heads share one key, which is also the value. A query sees the newest tokens one by one, and in `csa` and `hca`
layers older ones as compressed entries, each made of a block of m tokens:

    q_h = rope(norm(W_QB norm(W_QA x))_h),   k = v = rope(norm(W_KV x))
    p_h = softmax([q_h k_s / sqrt(D) for visible s, sink_h]),   o_h = rope^-1(sum_s p_hs v_s)
    y = W_OB concat_g(W_OA,g o_g)                               o_g: the heads of group g

The values carry the rotation of their own position; turning the output back by the query's leaves their distance. The
sink is a logit without a value: a head may attend to nothing.

    swa   the window only
    hca   + every entry of the document, m = 128:     e_i = norm(sum_j softmax_j(Z_j + B_j) * C_j)
    csa   + the best entries, m = 4, chosen by the indexer; an entry reads its own block and the one before

C = W_C x and Z = W_Z x are per channel, B is a bias per place in the block, j runs over the block. In csa layers both
have twice the channels: the first half is what a token tells the next block's entry, the second half its own's. An
entry is rotated by its block's first position, and visible from its block's last token on.

The indexer has small entries of its own, scores them and chooses among them as `indexing` says.

Blocks are counted from the beginning of every document. Where tokens and entries stand is said by places
(`compressed_cache`).

`eager` attention is the definition. `sdpa` runs PyTorch's fused kernels (`sdpa_with_sinks`), a part of a long text at a
time; for a single query, the definition over the window and the chosen entries alone. Flash and flex attention take
neither sinks nor places, and transformers refuses them.

Shapes: B batch, T query tokens, S tokens of the window, N entries, m block, H heads, D head width, P rotary width.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import logging

from .attention import FathomAttention, MixerOutput
from .compressed_cache import DOCUMENT, NOWHERE, CompressedCacheLayer, take_rows
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
from .normalization import FathomRMSNorm
from .precision import Float32Linear
from .rotary import FathomRotaryEmbedding, apply_rotary

logger = logging.get_logger(__name__)

# Queries that SDPA is given at a time: of long texts only the keys around them are read, and masked.
QUERIES_AT_ONCE = 256
# Keys that a single query is given are a multiple of this many.
LENGTHS = 64


class GroupedLinear(nn.Module):
    """A linear map per group, [B, T, G, in] -> [B, T, G, out]; the weight is [G out, in], group after group.

    No `nn.Linear`, which it is stored like: adapters and quantisers replace every one of those by a single product.
    """

    def __init__(self, in_features: int, out_features: int, groups: int):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(groups * out_features, in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("btgi,goi->btgo", x, self.weight.unflatten(0, (self.groups, -1)))


class Compressor(nn.Module):
    """Makes entries of width D out of blocks of m tokens.

    Its parameters stand in the module that uses it (`self_attn.compressor`, `self_attn.compressor.indexer`), as in
    transformers' layout.
    """

    def __init__(self, config, width: int, block: int, overlap: bool):
        super().__init__()
        self.width = width
        self.block = block
        self.overlap = overlap
        channels = 2 * width if overlap else width
        self.kv_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, channels, bias=False)
        self.position_bias = nn.Parameter(torch.empty(block, channels))
        self.kv_norm = FathomRMSNorm(width, eps=config.rms_norm_eps)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.position_bias)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a token contributes, values and gates side by side: [B, T, d] -> [B, T, 2 D] or, overlapping, 4 D."""
        return torch.cat((self.kv_proj(hidden_states), self.gate_proj(hidden_states)), dim=-1)

    def forward(
        self, contributions: torch.Tensor, places: torch.Tensor, after: torch.Tensor, most_blocks: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the blocks that are completed by tokens beyond a place.

        Args:
            contributions: [B, S, 2 D or 4 D], of the new tokens and of those before that may share blocks with them.
            places: [B, S].
            after: [B, 1], place of the newest token whose entries exist already.
            most_blocks: as in `blocks`.

        Returns:
            Entries [B, M, D], not yet rotated, and their places [B, M]; NOWHERE where there is none.
        """
        grid, places = blocks(contributions, places, self.block, most_blocks)  # [B, M, m, W], [B, M, m]
        values, gates = grid.float().chunk(2, dim=-1)
        # A block's missing tokens, those before its document's first included, have no weight.
        missing = (places == NOWHERE).unsqueeze(-1)
        least = torch.finfo(gates.dtype).min
        gates = (gates + self.position_bias.float()).masked_fill(missing, least)
        if self.overlap:
            number = block_number(places.amax(dim=-1), self.block)  # [B, M]
            follows = F.pad(number[:, 1:] == number[:, :-1] + 1, (1, 0))
            values, gates = with_block_before(values, 0.0, follows), with_block_before(gates, least, follows)
        pooled = (gates.softmax(dim=2) * values).sum(dim=2)  # [B, M, D]
        last = places[..., -1]  # NOWHERE where the block's last token is still to come
        return self.kv_norm(pooled.to(contributions.dtype)), last.masked_fill(last <= after, NOWHERE)


def block_number(places: torch.Tensor, block: int) -> torch.Tensor:
    """Number of a place's block: blocks of a document follow one another, those of two documents never do."""
    positions = places % DOCUMENT
    return places - positions + positions // block


def blocks(
    tokens: torch.Tensor, places: torch.Tensor, block: int, most_blocks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts tokens into their blocks.

    Args:
        tokens: [B, S, W].
        places: [B, S].
        block: m.
        most_blocks: M, for shapes that do not depend on places; of more blocks the newest are taken.

    Returns:
        Tokens [B, M, m, W] and their places [B, M, m], with zeros and NOWHERE where a block has no token. Without
        `most_blocks`, M is the largest number of blocks that a row touches; rows that touch fewer begin with empty
        ones.
    """
    real = places != NOWHERE
    number = block_number(places, block)
    # Places never decrease but for padding: a token begins a block if none before it is in a block as high.
    highest = F.pad(number.cummax(dim=1).values[:, :-1], (1, 0), value=NOWHERE)
    ordinal = (real & (number > highest)).cumsum(dim=1) - 1  # [B, S]
    count = max(int(ordinal.max()) + 1, 1) if most_blocks is None else most_blocks
    ordinal = ordinal - ordinal[:, -1:] + count - 1  # the newest block is the last
    # One slot more than there are takes the rest.
    slot = torch.where(real & (ordinal >= 0), ordinal * block + places % DOCUMENT % block, count * block)
    batch, _, width = tokens.shape
    grid = tokens.new_zeros(batch, count * block + 1, width)
    grid = grid.scatter(1, slot.unsqueeze(-1).expand(-1, -1, width), tokens)
    grid_places = places.new_full((batch, count * block + 1), NOWHERE).scatter(1, slot, places)
    return grid[:, :-1].unflatten(1, (count, block)), grid_places[:, :-1].unflatten(1, (count, block))


def with_block_before(grid: torch.Tensor, fill: float, follows: torch.Tensor) -> torch.Tensor:
    """Puts the block before in front of every block.

    Args:
        grid: [B, M, m, 2 D]; the first half of the channels is meant for the next block, the second for its own.
        fill: value in place of a block before that is not there.
        follows: [B, M], whether the block before in the row is also the one before in the document.

    Returns:
        [B, M, 2 m, D].
    """
    for_next, for_own = grid.chunk(2, dim=-1)
    before = F.pad(for_next[:, :-1], (0, 0, 0, 0, 1, 0), value=fill)
    return torch.cat((before.masked_fill(~follows[..., None, None], fill), for_own), dim=2)


class IndexerScorer(nn.Module):
    """The scores of `indexing`; the weights of the heads stand here in transformers' layout."""

    def __init__(self, config):
        super().__init__()
        self.weights_proj = Float32Linear(config.hidden_size, config.index_n_heads)

    def forward(self, query: torch.Tensor, entries: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Queries [B, H, T, D], entries [B, N, D] and hidden states [B, T, d] -> fp32 scores [B, T, N]."""
        return index_scores(query, entries, head_weights(self.weights_proj, hidden_states, query.shape[-1]))


class Indexer(Compressor, TrainableIndexer):
    """Chooses the entries that a query of a `csa` layer sees, by small entries of its own."""

    def __init__(self, config):
        super().__init__(config, config.index_head_dim, config.compress_rate_csa, overlap=True)
        self.num_heads = config.index_n_heads
        self.index_topk = config.index_topk
        self.q_b_proj = nn.Linear(config.q_lora_rank, self.num_heads * self.width, bias=False)
        self.scorer = IndexerScorer(config)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As every compressor's, but without a gradient to what it reads."""
        return super().project(hidden_states.detach())

    def scores(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        entries: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Scores of all entries for all queries.

        Args:
            hidden_states: [B, T, d].
            q_latent: [B, T, q_lora_rank], the attention's compressed queries.
            entries: [B, N, index_head_dim].
            rotation: cosines and sines of the queries' positions.

        Returns:
            [B, T, N] in fp32.
        """
        query = self.q_b_proj(q_latent.detach()).unflatten(-1, (self.num_heads, self.width)).transpose(1, 2)
        return self.scorer(rotate_end(query, *rotation), entries, hidden_states.detach())


class CompressedSparseCompressor(Compressor):
    """The compressor of a `csa` layer, which the indexer belongs to in transformers' layout."""

    def __init__(self, config):
        super().__init__(config, config.head_dim, config.compress_rate_csa, overlap=True)
        self.indexer = Indexer(config)


class SlidingWindowAttention(FathomAttention):
    """Shared-key attention over the newest tokens, and what `csa` and `hca` have in common with it."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.head_dim = config.head_dim
        self.window = config.sliding_window
        self.o_groups = config.o_groups
        self.norm_eps = config.rms_norm_eps
        self.scaling = self.head_dim**-0.5
        query_width = self.num_heads * self.head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_norm = FathomRMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
        self.q_b_proj = nn.Linear(config.q_lora_rank, query_width, bias=False)
        self.kv_proj = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.kv_norm = FathomRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.o_a_proj = GroupedLinear(query_width // config.o_groups, config.o_lora_rank, config.o_groups)
        self.o_b_proj = nn.Linear(config.o_groups * config.o_lora_rank, config.hidden_size, bias=False)
        self.sinks = nn.Parameter(torch.empty(self.num_heads))
        self.index_dense = config.index_dense
        self.index_topk = config.index_topk
        self.compressor = self.make_compressor(config)
        self.rotary_emb = FathomRotaryEmbedding(rotary_config(config, compressed=self.compressor is not None))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.sinks)

    def make_compressor(self, config) -> Compressor | None:
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        places: torch.Tensor,
        past_key_values: Cache | None = None,
        report_indexer: bool = False,
        **kwargs,
    ) -> MixerOutput:
        """Mixes tokens.

        Args:
            hidden_states: [B, T, d].
            places: [B, T], where the tokens stand (`compressed_cache.token_places`); this takes the part of a mask.
            past_key_values: a `FathomCache` whose layer is a `CompressedCacheLayer`.
            report_indexer: whether the output is to have the indexer's report, where there is an indexer.

        Returns:
            Attention weights are [B, H, T, S + N], the window's tokens first, then the entries; None with SDPA.
        """
        rotation = self.rotary_emb(hidden_states, places % DOCUMENT)
        q_latent = self.q_a_norm(self.q_a_proj(hidden_states))
        query = self.q_b_proj(q_latent).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        query = F.rms_norm(query.float(), query.shape[-1:], eps=self.norm_eps).to(query.dtype)
        query = rotate_end(query, *rotation)  # [B, H, T, D]
        key = rotate_end(self.kv_norm(self.kv_proj(hidden_states)).unsqueeze(1), *rotation).squeeze(1)  # [B, T, D]

        layer = None if past_key_values is None else past_key_values.fetch(self.layer_idx, places.device)
        streams = {"places": places, "window": key, **self.contributions(hidden_states)}
        if layer is not None:
            streams = layer.append_tokens(**streams)
        keys = streams["window"]  # [B, S, D]
        key_places = streams["places"][:, -keys.shape[1] :]
        entries = {"compressor": keys[:, :0], "places": key_places[:, :0]}
        if self.compressor is not None:
            entries = self.entries(streams, places, layer)
        if past_key_values is not None:
            past_key_values.release(self.layer_idx)

        report = None
        select = partial(self.select, hidden_states, q_latent, rotation, places, entries)
        if self.parts_pay(query) and not report_indexer:
            output, weights = self.attend_in_parts(query, places, keys, key_places, entries, select), None
        else:
            read = entries["compressor"]
            visible, scores = select(slice(None), read.shape[1], report_indexer)
            chosen = visible if scores is None else self.choose(scores, visible)
            if report_indexer and scores is not None and self.has_report():
                report = self.report(query, places, keys, key_places, read, visible, chosen, scores)
            if self.index_dense:
                chosen = visible
            elif scores is not None and self.reads_one_query(query):
                read, chosen = only_chosen(read, chosen, self.index_topk)
            if self.parts_pay(query):
                selected = partial(part_of_selection, chosen)
                output, weights = self.attend_in_parts(query, places, keys, key_places, entries, selected), None
            else:
                output, weights = self.attend_with_sinks(query, places, keys, key_places, read, chosen)
        if weights is None and kwargs.get("output_attentions"):
            logger.warning_once(
                "SDPA gives no attention weights; set attn_implementation to 'eager' for output_attentions=True"
            )
        cos, sin = rotation
        output = rotate_end(output, cos, -sin).transpose(1, 2).flatten(2)  # [B, T, H D]
        output = self.o_a_proj(output.unflatten(-1, (self.o_groups, -1))).flatten(2)
        return MixerOutput(self.o_b_proj(output), weights, report)

    def attend_with_sinks(
        self,
        query: torch.Tensor,
        places: torch.Tensor,
        keys: torch.Tensor,
        key_places: torch.Tensor,
        entries: torch.Tensor,
        chosen: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention to the keys of the window, to the chosen entries and to the sinks.

        Args:
            query: [B, H, T, D] at `places` [B, T].
            keys: [B, S, D] at `key_places` [B, S].
            entries: [B, N, D].
            chosen: bool [B, T, N], the entries that a query sees.

        Returns:
            Output [B, H, T, D]; weights [B, H, T, S + N], None with SDPA.
        """
        visible = torch.cat((self.near(places, key_places), chosen), dim=2)  # [B, T, S + N]
        dropout = self.attention_dropout if self.training else 0.0
        both = torch.cat((keys, entries), dim=1)
        if self.reads_one_query(query):
            # By the definition, in two small products: no second copy of the keys is needed to put the sink in. The
            # lengths are rounded up: products in bf16 on a CPU are prepared anew for every one, which takes longer.
            missing = -both.shape[1] % LENGTHS
            both, visible = F.pad(both, (0, 0, 0, missing)), F.pad(visible, (0, missing))
            return eager_with_sinks(query, both, visible, self.sinks, self.scaling, dropout)[0], None
        attend = sdpa_with_sinks if self.config._attn_implementation == "sdpa" else eager_with_sinks
        return attend(query, both, visible, self.sinks, self.scaling, dropout)

    def near(self, places: torch.Tensor, key_places: torch.Tensor) -> torch.Tensor:
        """Which keys at `key_places` [B, S] are in the windows of queries at `places` [B, T]: bool [B, T, S]."""
        distance = places.unsqueeze(2) - key_places.unsqueeze(1)
        return (distance >= 0) & (distance < self.window)

    def reads_one_query(self, query: torch.Tensor) -> bool:
        """Whether this is a step of decoding, of which no weights are asked."""
        return self.config._attn_implementation == "sdpa" and query.shape[2] == 1

    def parts_pay(self, query: torch.Tensor) -> bool:
        """Whether a text is so long that it is read in parts. `eager` is the definition, and has all weights at once.

        Nor does a compiled graph: which keys a part needs depends on the data.
        """
        sdpa = self.config._attn_implementation == "sdpa"
        return sdpa and not torch.compiler.is_compiling() and query.shape[2] > QUERIES_AT_ONCE

    def attend_in_parts(
        self,
        query: torch.Tensor,
        places: torch.Tensor,
        keys: torch.Tensor,
        key_places: torch.Tensor,
        entries: dict[str, torch.Tensor],
        select: Callable[[slice, int], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> torch.Tensor:
        """The same as `attend_with_sinks`, for some queries at a time, the keys near them and the entries before them.

        So neither scores nor products nor masks grow with the square of T.

        Args:
            query, places, keys, key_places: as in `attend_with_sinks`.
            entries: as `self.entries` returns them.
            select: see there; for a part of the queries and a number of entries.

        Returns:
            [B, H, T, D].
        """
        outputs = []
        for start in range(0, query.shape[2], QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            near = reach(places[:, part], key_places, self.window)
            count = reach(places[:, part], entries["places"], window=None).stop
            read = entries["compressor"][:, :count]
            some = query[:, :, part], places[:, part], keys[:, near], key_places[:, near], read
            visible, scores = select(part, count)
            if scores is None:
                output, _ = self.attend_with_sinks(*some, visible)
            else:
                indices, hidden = best_keys(scores.masked_fill(~visible, float("-inf")), self.index_topk)
                if self.reading_alone_pays(count):
                    output = self.attend_alone(*some, indices, hidden)
                else:
                    output, _ = self.attend_with_sinks(*some, torch.zeros_like(visible).scatter_(-1, indices, ~hidden))
            outputs.append(output)
        return torch.cat(outputs, dim=2)

    def reading_alone_pays(self, entries: int) -> bool:
        """Whether queries rather read their chosen entries, each its own, than all that any of them sees.

        A chosen entry is copied and multiplied by its query alone, which costs more per number. A gradient would have
        to be added up row by row, and weights that are dropped out are those of the other way.
        """
        return not torch.is_grad_enabled() and 4 * self.index_topk < entries

    def attend_alone(self, query, places, keys, key_places, entries, indices, hidden) -> torch.Tensor:
        """As `attend_with_sinks` by the definition, with entries of every query's own.

        Args:
            indices: [B, T, K], of entries. hidden: bool [B, T, K], which of those are not to be seen.

        Returns:
            [B, H, T, D].
        """
        by_query = query.transpose(1, 2)  # [B, T, H, D]
        alone = rows_at(entries, indices)  # [B, T, K, D]
        near = (query.flatten(1, 2) @ keys.transpose(-1, -2)).unflatten(1, query.shape[1:3])  # [B, H, T, S]
        far = (by_query @ alone.transpose(-1, -2)).transpose(1, 2)  # [B, H, T, K]
        sinks = self.sinks.view(1, -1, 1, 1).expand(*near.shape[:-1], 1)
        visible = torch.cat((self.near(places, key_places), ~hidden), dim=2).unsqueeze(1)
        scores = torch.cat((near, far), dim=-1).float() * self.scaling
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
        weights = torch.cat((scores, sinks.float()), dim=-1).softmax(dim=-1).to(query.dtype)
        near, far, _ = weights.split([keys.shape[1], indices.shape[-1], 1], dim=-1)
        output = (near.flatten(1, 2) @ keys).unflatten(1, query.shape[1:3])
        return output + (far.transpose(1, 2) @ alone).transpose(1, 2)

    def contributions(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the new tokens contribute to entries, by compressor: {name: [B, T, W]}."""
        return {name: compressor.project(hidden_states) for name, compressor in self.compressors().items()}

    def compressors(self) -> dict[str, Compressor]:
        return {} if self.compressor is None else {"compressor": self.compressor}

    def entries(
        self, streams: dict[str, torch.Tensor], places: torch.Tensor, layer: CompressedCacheLayer | None
    ) -> dict[str, torch.Tensor]:
        """All entries so far, by compressor [B, N, D], and their `places` [B, N].

        Args:
            streams: [B, S, ...], what the new tokens and those before contribute, and the `places` of all of them.
            places: [B, T], of the new tokens.
            layer: what has the entries of the tokens before.
        """
        # Most steps of decoding complete no block.
        if layer is not None and not layer.gains_entries(places, self.compressors()["compressor"].block):
            return layer.entries
        past = streams["places"][:, : -places.shape[1]]
        after = F.pad(past, (1, 0), value=NOWHERE).amax(dim=1, keepdim=True)
        new: dict[str, torch.Tensor] = {}
        for name, compressor in self.compressors().items():
            contributions = streams[name]
            tokens, block = contributions.shape[1], compressor.block
            most_blocks = None if layer is None else layer.most_blocks(tokens, block)
            entries, places = compressor(contributions, streams["places"][:, -tokens:], after, most_blocks)
            first = (places % DOCUMENT - (block - 1)).clamp(min=0)
            rotation = self.rotary_emb(entries, first)
            new[name] = rotate_end(entries.unsqueeze(1), *rotation).squeeze(1)
            new["places"] = places
        return new if layer is None else layer.append_entries(**new)

    def visible_entries(self, places: torch.Tensor, entry_places: torch.Tensor) -> torch.Tensor:
        """Entries of the query's own document that are complete: bool [B, T, N]."""
        query, entry = places.unsqueeze(2), entry_places.unsqueeze(1)
        # A padding token stands NOWHERE as well; it must not see the gaps, whose number depends on other rows.
        return (entry <= query) & (entry >= query - query % DOCUMENT) & (entry != NOWHERE)

    def select(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
        entries: dict[str, torch.Tensor],
        part: slice,
        count: int,
        report_indexer: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What a part of the queries may see of the first `count` entries, and the scores to choose by, if any.

        Returns:
            Bool [B, t, N]; fp32 [B, t, N], or None if all that is visible is read.
        """
        visible = self.visible_entries(places[:, part], entries["places"][:, :count])
        if self.compressor is None:
            return visible, None
        first = {name: each[:, :count] for name, each in entries.items()}
        cos, sin = rotation
        # A choice has no gradient: without the indexer's own loss nothing is to be kept for one.
        with torch.set_grad_enabled(report_indexer and torch.is_grad_enabled()):
            some = hidden_states[:, part], q_latent[:, part], first, (cos[:, part], sin[:, part])
            return visible, self.scores(*some, report_indexer)

    def scores(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        entries: dict[str, torch.Tensor],
        rotation: tuple[torch.Tensor, torch.Tensor],
        report_indexer: bool,
    ) -> torch.Tensor | None:
        """What the entries are chosen by, [B, T, N]; None if all visible ones are read."""
        return None

    def has_report(self) -> bool:
        """Whether there is an indexer with a loss that is of use."""
        return False

    def choose(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Which of the visible entries [B, T, N] a query reads."""
        raise NotImplementedError("a layer that scores entries chooses among them")


class HeavilyCompressedAttention(SlidingWindowAttention):
    """The window and all entries of large blocks."""

    def make_compressor(self, config) -> Compressor:
        return Compressor(config, config.head_dim, config.compress_rate_hca, overlap=False)


class CompressedSparseAttention(SlidingWindowAttention):
    """The window and the best entries of small, overlapping blocks."""

    compressor: CompressedSparseCompressor

    def make_compressor(self, config) -> Compressor:
        return CompressedSparseCompressor(config)

    def compressors(self) -> dict[str, Compressor]:
        return {"compressor": self.compressor, "indexer": self.compressor.indexer}

    def scores(self, hidden_states, q_latent, entries, rotation, report_indexer) -> torch.Tensor | None:
        """The indexer's, unless all visible entries are read anyway and nobody asks."""
        indexer = self.compressor.indexer
        all_are_read = self.index_dense or entries["indexer"].shape[1] <= indexer.index_topk
        if all_are_read and not report_indexer:
            return None
        return indexer.scores(hidden_states, q_latent, entries["indexer"], rotation)

    def has_report(self) -> bool:
        return self.compressor.indexer.has_report()

    def choose(self, scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        scores = scores.detach().masked_fill(~visible, float("-inf"))
        return best_of(scores, self.index_topk) & visible

    def report(
        self,
        query: torch.Tensor,
        places: torch.Tensor,
        keys: torch.Tensor,
        key_places: torch.Tensor,
        entries: torch.Tensor,
        visible: torch.Tensor,
        chosen: torch.Tensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """The indexer against the attention to entries, among window and sinks. Arguments as in `attend_in_parts`."""
        near = self.near(places, key_places)
        both = torch.cat((keys, entries), dim=1).unsqueeze(1).detach()

        def attention(attended: torch.Tensor) -> torch.Tensor:
            seen = torch.cat((near, attended), dim=2)
            return head_summed_attention(query.detach(), both, seen, self.scaling, self.sinks)[..., near.shape[2] :]

        return indexer_report(scores, visible, chosen, attention, self.index_dense, not self.training)


def part_of_selection(chosen: torch.Tensor, part: slice, count: int) -> tuple[torch.Tensor, None]:
    """What is selected already, bool [B, T, N], as `SlidingWindowAttention.select` returns it."""
    return chosen[:, part, :count], None


def reach(places: torch.Tensor, key_places: torch.Tensor, window: int | None) -> slice:
    """The range of keys, in `key_places` [B, S], outside of which no query at `places` [B, T] sees any.

    Without a window queries see everything before them.
    """
    newest = places.amax(dim=1, keepdim=True)
    near = (key_places <= newest) & (key_places != NOWHERE)  # [B, S]
    if window is not None:
        oldest = places.where(places != NOWHERE, newest).amin(dim=1, keepdim=True)
        near &= key_places > oldest - window
    indices = near.any(dim=0).nonzero().flatten().tolist()
    return slice(indices[0], indices[-1] + 1) if indices else slice(0)


def only_chosen(entries: torch.Tensor, chosen: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries [B, N, D] that a single query reads, at most `most` of them as `chosen` [B, 1, N] says; in any order.

    Returns:
        Entries [B, M, D], M = `most` if there are so many, and which of them were chosen [B, 1, M].
    """
    chosen, order = chosen.squeeze(1).byte().topk(min(most, chosen.shape[-1]), sorted=False)
    return take_rows(entries, order), chosen.bool().unsqueeze(1)


def eager_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: softmax in fp32 over the visible keys and one more logit per head, whose value is 0.

    Args:
        query: [B, H, T, D].
        keys: [B, S, D], values at the same time.
        visible: bool [B, T, S]. A query that sees nothing gives all its weight to the sink.
        sinks: [H].

    Returns:
        Output [B, H, T, D] and weights [B, H, T, S] without the sink's.
    """
    scores = (query.flatten(1, 2) @ keys.transpose(-1, -2) * scaling).unflatten(1, query.shape[1:3]).float()
    scores = scores.masked_fill(~visible.unsqueeze(1), torch.finfo(scores.dtype).min)
    sinks = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1].to(query.dtype)
    weights = F.dropout(weights, p=dropout)
    return (weights.flatten(1, 2) @ keys).unflatten(1, query.shape[1:3]), weights


def sdpa_with_sinks(
    query: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """The same output as `eager_with_sinks`, by PyTorch's fused kernels, which know no sinks.

    The sink becomes a key that all see, in a dimension of its own: `[q_h, sink_h / scaling] [0, 1] scaling = sink_h`,
    while the other keys are 0 there. As a value it is 0 where the output is read.
    """
    width = query.shape[-1]
    # The sink's dimension, and zeros up to the next multiple of 8, which fused kernels on a GPU ask for.
    added = 8 - width % 8
    sink_query = (sinks / scaling).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:-1], 1)
    query = F.pad(torch.cat((query, sink_query), dim=-1), (0, added - 1))  # [B, H, T, D'], D' = D + added
    sink_key = (torch.arange(width + added, device=keys.device) == width).to(keys.dtype).expand(len(keys), 1, -1)
    keys = torch.cat((F.pad(keys, (0, added)), sink_key), dim=1).unsqueeze(1)  # [B, 1, S + 1, D']
    visible = F.pad(visible, (0, 1), value=True).unsqueeze(1)  # [B, 1, T, S + 1]
    keys = keys.expand(-1, query.shape[1], -1, -1)
    output = F.scaled_dot_product_attention(query, keys, keys, attn_mask=visible, dropout_p=dropout, scale=scaling)
    return output[..., :width], None


def rotate_end(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the last P dimensions of `x` [B, H, T, D], neighbours as pairs, in fp32; `cos`, `sin` are [B, T, P/2]."""
    still, turned = x.split([x.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    turned = apply_rotary(turned.float(), cos, sin, interleaved=True)
    return torch.cat((still, turned.to(x.dtype)), dim=-1)


def rotary_config(config, compressed: bool):
    """The configuration of one of V4's two rotary embeddings, in the form that transformers' rotary code reads.

    Layers with a compressed past have a larger base, and YaRN; DeepSeek's code does not scale cosines and sines by
    YaRN's attention factor, which transformers would derive if it were not said. Windows are short, and have neither.
    """
    view = copy.copy(config)
    view.head_dim = config.qk_rope_head_dim
    rope = config.rope_parameters
    if compressed:
        view.rope_parameters = {**rope, "rope_theta": config.compress_rope_theta}
        if rope["rope_type"] == "yarn":
            view.rope_parameters["attention_factor"] = 1.0
    else:
        view.rope_parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return view

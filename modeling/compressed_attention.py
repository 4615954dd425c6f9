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

How entries are made: `compressor`. An entry is rotated by its block's first position, and visible from its block's last
token on. The indexer has small entries of its own, scores them and chooses among them as `indexing` says.

Blocks are counted from the beginning of every document. Where tokens and entries stand is said by places
(`compressed_cache`).

`eager` attention is the definition. `sdpa` runs PyTorch's fused kernels (`sdpa_with_sinks`), a part of a long text at a
time; for a single query, the definition over the window and the chosen entries alone. Flash and flex attention take
neither sinks nor places, and transformers refuses them.

Shapes: B batch, T query tokens, S tokens of the window, N entries, m block, H heads, D head width, P rotary width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import logging

from .attention import FathomAttention, MixerOutput
from .compressed_cache import DOCUMENT, NOWHERE, CompressedCacheLayer, padding_first, take_rows
from .compressor import CompressedSparseCompressor, Compressor
from .fused import is_plain, kernels_for
from .host import host_can_read
from .indexing import (
    best_keys,
    best_of,
    head_summed_attention,
    indexer_report,
    rows_at,
)
from .normalization import FathomRMSNorm
from .precision import Float32Linear
from .products import project
from .rotary import FathomRotaryEmbedding, rotate_end, window_rotary_config
from .sinks import eager_with_sinks, sdpa_with_sinks
from .text_parts import (
    Queries,
    counted_entries,
    counted_reach,
    only_chosen,
    padding_before_tokens,
    part_of_selection,
    put_back,
    reach,
)

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
        kernels = kernels_for(self.training, x.shape[:2].numel(), x, self.weight)
        output = kernels and kernels.project_groups(x, self.weight)
        if output is not None:
            return output
        return torch.einsum("btgi,goi->btgo", x, self.weight.unflatten(0, (self.groups, -1)))


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
        self.rotary_emb = FathomRotaryEmbedding(window_rotary_config(config, compressed=self.compressor is not None))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.sinks)

    def make_compressor(self, config) -> Compressor | None:
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        places: torch.Tensor,
        cache: Cache | None = None,
        report_indexer: bool = False,
        rotations: dict | None = None,
        padded: bool = False,
        **kwargs,
    ) -> MixerOutput:
        """Mixes tokens.

        Args:
            hidden_states: [B, T, d].
            places: [B, T], where the tokens stand (`compressed_cache.token_places`); this takes the part of a mask.
            cache: a `FathomCache` whose layer is a `CompressedCacheLayer`.
            report_indexer: whether the output is to have the indexer's report, where there is an indexer.
            rotations: what layers share of the cosines and sines of `places`; the first of a kind puts them in.
            padded: whether there may be padding among the tokens; asked for where `places` cannot be read (`host`).

        Returns:
            Attention weights are [B, H, T, S + N], the window's tokens first, then the entries; None with SDPA.
        """
        rotation = self.rotation(hidden_states, places, rotations)
        q_latent, key = project(hidden_states, self.q_a_proj, self.kv_proj)
        q_latent = self.q_a_norm(q_latent)
        (query,) = project(q_latent, self.q_b_proj)
        query = query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        query = rotate_end(query, *rotation, training=self.training, norm_eps=self.norm_eps)  # [B, H, T, D]
        keys, key_places, entries = self.keys_and_entries(hidden_states, key, rotation, places, cache, padded)
        queries, order = Queries(hidden_states, q_latent, query, places, *rotation), None
        if self.counts_columns(query, places) and (padded or self.has_padded_past(cache)):
            order = padding_before_tokens(places)
            queries = queries.ordered(order)
            sorted_keys = padding_first({"places": key_places, "window": keys})
            keys, key_places = sorted_keys["window"], sorted_keys["places"]

        output, weights, report = self.read(queries, keys, key_places, entries, report_indexer)
        if weights is None and kwargs.get("output_attentions"):
            logger.warning_once(
                "SDPA gives no attention weights; set attn_implementation to 'eager' for output_attentions=True"
            )
        output = rotate_end(output, queries.cos, queries.sin, training=self.training, backwards=True)
        output = output.transpose(1, 2).flatten(2).unflatten(-1, (self.o_groups, -1))  # [B, T, G, H D / G]
        (output,) = project(self.o_a_proj(output).flatten(2), self.o_b_proj)
        if order is not None:
            output = put_back(output, order)
            report = None if report is None else put_back(report.movedim(0, -1), order).movedim(-1, 0)
        return MixerOutput(output, weights, report)

    def read(
        self,
        queries: Queries,
        keys: torch.Tensor,
        key_places: torch.Tensor,
        entries: dict[str, torch.Tensor],
        report_indexer: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Attention to the window and to the entries that are chosen.

        Args:
            keys, key_places, entries: as `keys_and_entries` returns them. report_indexer: see `forward`.

        Returns:
            Output [B, H, T, D], weights as `forward` returns them, and the indexer's report.
        """
        query, places = queries.query, queries.places
        report = None
        rotation = queries.cos, queries.sin
        select = partial(self.select, queries.hidden_states, queries.q_latent, rotation, places, entries)
        if self.parts_pay(query) and not report_indexer:
            return self.attend_in_parts(query, places, keys, key_places, entries, select), None, None
        few = None
        if self.reads_one_query(query) and not (report_indexer or self.index_dense):
            few = self.fused_choice(queries.hidden_states, queries.q_latent, rotation, places, entries)
        if few is not None:
            read, chosen = few
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
            return self.attend_in_parts(query, places, keys, key_places, entries, selected), None, report
        return *self.attend_with_sinks(query, places, keys, key_places, read, chosen), report

    def remember_but_last(self, hidden_states, cache, places=None, padded=False, **_) -> None:
        # A window cannot forget a token: what it lets go for it is gone.
        hidden_states, places = hidden_states[:, :-1], places[:, :-1]
        rotation = self.rotation(hidden_states, places, None)
        (key,) = project(hidden_states, self.kv_proj)
        self.keys_and_entries(hidden_states, key, rotation, places, cache, padded)

    def keys_and_entries(
        self,
        hidden_states: torch.Tensor,
        key: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
        cache: Cache | None,
        padded: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What queries at `places` [B, T] read, with what is cached; the new tokens' part of it is cached as well.

        Args:
            hidden_states: [B, T, d]. key: their keys, neither normed nor rotated [B, T, D]. padded: see `forward`.

        Returns:
            Keys [B, S, D], their places [B, S], and entries as `entries` returns them.
        """
        key = rotate_end(self.kv_norm(key).unsqueeze(1), *rotation, training=self.training).squeeze(1)  # [B, T, D]
        layer = None if cache is None else cache.fetch(self.layer_idx, places.device)
        streams = {"places": places, "window": key, **self.contributions(hidden_states)}
        if layer is not None:
            if padded and not host_can_read(places):
                layer.expect_padding()
            streams = layer.append_tokens(**streams)
        keys = streams["window"]
        key_places = streams["places"][:, -keys.shape[1] :]
        entries = {"compressor": keys[:, :0], "places": key_places[:, :0]}
        if self.compressor is not None:
            entries = self.entries(streams, places, layer)
        if cache is not None:
            cache.release(self.layer_idx)
        return keys, key_places, entries

    def rotation(
        self, hidden_states: torch.Tensor, places: torch.Tensor, rotations: dict | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions of `places` [B, T]; layers with and without entries have their own."""
        kind = self.compressor is None, places.device
        if rotations is None or kind not in rotations:
            rotation = self.rotary_emb(hidden_states, places % DOCUMENT)
            if rotations is None:
                return rotation
            rotations[kind] = rotation
        return rotations[kind]

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
        if self.config._attn_implementation == "sdpa":
            kernels = kernels_for(self.training, places.numel(), query.transpose(1, 2), both, self.sinks)
            output = kernels and kernels.attend_shared(query.transpose(1, 2), both, visible, self.sinks, self.scaling)
            if output is not None:
                return output.transpose(1, 2), None
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

    def counts_columns(self, query: torch.Tensor, places: torch.Tensor) -> bool:
        """Whether a part's keys and entries are found by counting columns (`text_parts`)."""
        return self.parts_pay(query) and not host_can_read(places)

    def has_padded_past(self, cache: Cache | None) -> bool:
        return cache is not None and cache.layer(self.layer_idx).may_hold_padding

    def seen_by_part(
        self, part: slice, places: torch.Tensor, key_places: torch.Tensor, entry_places: torch.Tensor
    ) -> tuple[slice, int]:
        """The keys that a part of the queries may see, and how many of the first entries. Arguments as below."""
        if host_can_read(places):
            some = places[:, part]
            return reach(some, key_places, self.window), reach(some, entry_places, window=None).stop
        queries, entries = places.shape[1], entry_places.shape[1]
        block = 1 if self.compressor is None else self.compressor.block
        near = counted_reach(part, queries, key_places.shape[1], self.window)
        return near, counted_entries(part, queries, entries, block)

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
            near, count = self.seen_by_part(part, places, key_places, entries["places"])
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
        if layer is not None and not layer.gains_entries(places):
            return layer.entries
        past = streams["places"][:, : -places.shape[1]]
        after = F.pad(past, (1, 0), value=NOWHERE).amax(dim=1, keepdim=True)
        new: dict[str, torch.Tensor] = {}
        for name, compressor in self.compressors().items():
            contributions = streams[name]
            tokens = contributions.shape[1]
            entries, places = compressor(contributions, streams["places"][:, -tokens:], after)
            first = (places % DOCUMENT - (compressor.block - 1)).clamp(min=0)
            rotation = self.rotary_emb(entries, first)
            new[name] = rotate_end(entries.unsqueeze(1), *rotation, training=self.training).squeeze(1)
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
        if self.compressor is None:
            return places.new_zeros((*places[:, part].shape, 0), dtype=torch.bool), None
        visible = self.visible_entries(places[:, part], entries["places"][:, :count])
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

    def fused_choice(
        self,
        hidden_states: torch.Tensor,
        q_latent: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        places: torch.Tensor,
        entries: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The entries that a single query reads, chosen by the native function; None where it cannot be called.

        Returns:
            Entries [B, K, D], and which of them it sees, bool [B, 1, K].
        """
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

    def fused_choice(self, hidden_states, q_latent, rotation, places, entries):
        indexer, keys = self.compressor.indexer, entries["indexer"]
        if keys.shape[1] <= self.index_topk:
            return None
        weight = indexer.scorer.weights_proj.weight
        kernels = kernels_for(self.training, places.numel(), hidden_states, weight, keys)
        if kernels is None or not is_plain(indexer.scorer.weights_proj, Float32Linear):
            return None
        visible = self.visible_entries(places, entries["places"])
        query = indexer.queries(q_latent, rotation).transpose(1, 2)
        choice = kernels.choose_keys(query, keys, hidden_states, weight, visible, self.index_topk)
        if choice is None:
            return None
        chosen, sees = choice
        return take_rows(entries["compressor"], chosen.squeeze(1)), sees

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

        return indexer_report(scores, visible, chosen, attention, self.index_dense, not self.training, self.index_topk)

"""Compressed entries of DeepSeek-V4's attention, and the indexer that chooses among them (its report, section 2.3).

A block of m tokens becomes one entry, `e_i = norm(sum_j softmax_j(Z_j + B_j) * C_j)` with C = W_C x and Z = W_Z x per
channel, B a bias per place in the block, and j running over the block. Where blocks overlap, C and Z have twice the
channels: the first half is what a token tells the next block's entry, the second half its own's.

Which layers use which entries: `compressed_attention`.

Shapes: B batch, T tokens, S tokens with those before, N entries, M blocks of m tokens, H heads, D an entry's width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .compressed_cache import DOCUMENT, NOWHERE
from .host import host_can_read
from .indexing import TrainableIndexer, head_weights, index_scores
from .normalization import FathomRMSNorm
from .precision import Float32Linear
from .products import project
from .rotary import rotate_end


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
        return torch.cat(project(hidden_states, self.kv_proj, self.gate_proj), dim=-1)

    def forward(
        self, contributions: torch.Tensor, places: torch.Tensor, after: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entries of the blocks that are completed by tokens beyond a place.

        Args:
            contributions: [B, S, 2 D or 4 D], of the new tokens and of those before that may share blocks with them.
            places: [B, S].
            after: [B, 1], place of the newest token whose entries exist already.

        Returns:
            Entries [B, M, D], not yet rotated, and their places [B, M]; NOWHERE where there is none.
        """
        grid, places = blocks(contributions, places, self.block)  # [B, M, m, W], [B, M, m]
        values, gates = grid.float().chunk(2, dim=-1)
        missing = (places == NOWHERE).unsqueeze(-1)
        least = torch.finfo(gates.dtype).min
        gates = (gates + self.position_bias.float()).masked_fill(missing, least)
        if self.overlap:
            number = block_number(places.amax(dim=-1), self.block)  # [B, M]
            follows = F.pad(number[:, 1:] == number[:, :-1] + 1, (1, 0))
            values, gates = with_block_before(values, 0.0, follows), with_block_before(gates, least, follows)
        pooled = (gates.softmax(dim=2) * values).sum(dim=2)  # [B, M, D]
        last = places[..., -1]
        return self.kv_norm(pooled.to(contributions.dtype)), last.masked_fill(last <= after, NOWHERE)


def block_number(places: torch.Tensor, block: int) -> torch.Tensor:
    """Number of a place's block: blocks of a document follow one another, those of two documents never do."""
    positions = places % DOCUMENT
    return places - positions + positions // block


def blocks(tokens: torch.Tensor, places: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorts tokens into the blocks that are there as a whole; others make no entry.

    Args:
        tokens: [B, S, W].
        places: [B, S].
        block: m.

    Returns:
        Tokens [B, M, m, W] and their places [B, M, m]. M is the largest number of whole blocks in a row, at least 1;
        rows with fewer begin with empty ones, of zeros that stand NOWHERE. Where the host cannot read places M is
        S / m, which no row exceeds, and rows end with empty ones.
    """
    ordinal, count = _whole_blocks(places, block)
    # Slot 0 takes the rest.
    slot = torch.where(ordinal >= 0, ordinal * block + places % DOCUMENT % block + 1, 0)
    batch, _, width = tokens.shape
    grid = tokens.new_zeros(batch, count * block + 1, width)
    grid = grid.scatter(1, slot.unsqueeze(-1).expand(-1, -1, width), tokens)
    grid_places = places.new_full((batch, count * block + 1), NOWHERE).scatter(1, slot, places)
    return grid[:, 1:].unflatten(1, (count, block)), grid_places[:, 1:].unflatten(1, (count, block))


def _whole_blocks(places: torch.Tensor, block: int) -> tuple[torch.Tensor, int]:
    """Which of M whole blocks the tokens at `places` [B, S] are in, [B, S], -1 for none; and M."""
    number, real = block_number(places, block), places != NOWHERE
    ends = real & (places % DOCUMENT % block == block - 1)
    # Places never decrease but for padding: a token is in the block that ends next, or in none that ends.
    next_end = ends.cumsum(dim=1) - ends.long() + 1  # [B, S], 1 to S + 1
    of_ends = number.new_full((len(number), number.shape[1] + 2), NOWHERE)
    of_ends = of_ends.scatter(1, torch.where(ends, next_end, 0), number)
    within = real & (of_ends.gather(1, next_end) == number)
    whole = torch.zeros_like(of_ends).scatter_add(1, next_end, within.long()) == block  # [B, S + 2]
    ordinal, count = whole.cumsum(dim=1) - 1, max(places.shape[1] // block, 1)
    if host_can_read(places):
        found = ordinal[:, -1:] + 1
        count = max(int(found.max()), 1)
        # The newest block is the last: rows that gain an entry in the same step gain it in the same place.
        ordinal = ordinal + count - found
    within &= whole.gather(1, next_end)
    return torch.where(within, ordinal.gather(1, next_end), -1), count


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
        return self.scorer(self.queries(q_latent.detach(), rotation), entries, hidden_states.detach())

    def queries(self, q_latent: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, T, q_lora_rank] -> [B, H, T, index_head_dim]."""
        (query,) = project(q_latent, self.q_b_proj)
        query = query.unflatten(-1, (self.num_heads, self.width)).transpose(1, 2)
        return rotate_end(query, *rotation, training=self.training)


class CompressedSparseCompressor(Compressor):
    """The compressor of a `csa` layer, which the indexer belongs to in transformers' layout."""

    def __init__(self, config):
        super().__init__(config, config.head_dim, config.compress_rate_csa, overlap=True)
        self.indexer = Indexer(config)

"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more token per depth, trained along.

At depth k the layer joins the hidden state of position i with the embedding of token i + k and predicts token
i + k + 1 through the shared head:

    h^k_i = norm(Layer(W [norm(emb(t_{i+k})); norm(h^{k-1}_i)])),     p(t_{i+k+1}) = softmax(head(h^k_i))

The released weights put the embedding first, where the paper's figure puts it second. h^0 is the main model's
output after its final norm, as in transformers and vLLM. On disk the layer of depth k is
`model.layers.{num_hidden_layers + k - 1}`.

With n > 1 residual streams (DeepSeek-V4, `MTPBlock` of its inference code) h is the streams before they are
collapsed, each of them joined with the embedding by two products, and every depth collapses its own streams:

    X^k = Layer(W_e norm(emb(t_{i+k})) + W_h norm(X^{k-1})),    p(t_{i+k+1}) = softmax(head(norm(collapse(X^k))))

Shapes: B batch, T tokens, n streams, d width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .decoder_layer import FathomDecoderLayer
from .hyper_connections import StreamCollapse
from .normalization import FathomRMSNorm
from .products import project


class SharedHead(nn.Module):
    """The norm before the head that a draft shares with the model (`shared_head.norm` in DeepSeek's layout)."""

    def __init__(self, config):
        super().__init__()
        self.norm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DraftOutput(NamedTuple):
    """What an MTP layer returns; the statistics are those of `LayerStatistics`."""

    hidden_states: torch.Tensor  # [B, T, d], input of the shared head
    states: torch.Tensor  # what the next depth continues from: the same, or with streams [B, T, n, d]
    expert_counts: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    indexer_report: torch.Tensor | None = None


class MultiTokenPredictionLayer(FathomDecoderLayer):
    """A decoder layer that takes the next token's embedding along."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.has_streams = config.hc_mult > 1
        self.enorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.has_streams:
            self.e_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.h_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.hc_head = StreamCollapse(config)
        else:
            self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = SharedHead(config)

    def forward(  # type: ignore[override]
        self, states: torch.Tensor, next_embeds: torch.Tensor, **kwargs
    ) -> DraftOutput:
        """Previous depth's states, and embeddings of the tokens k ahead [B, T, d] -> states and what they predict."""
        # The unwrapped forward: this layer as a whole is what gradient checkpointing recomputes.
        output = FathomDecoderLayer.forward(self, self.join(states, next_embeds), **kwargs)
        states = output.hidden_states
        if self.has_streams:
            hidden_states = self.shared_head.norm(self.hc_head(states))
        else:
            hidden_states = states = self.shared_head.norm(states)
        return DraftOutput(hidden_states, states, *output[1:])

    def join(self, states: torch.Tensor, next_embeds: torch.Tensor) -> torch.Tensor:
        """Input of the decoder layer, in the shape of `states`."""
        embeds, states = self.enorm(next_embeds), self.hnorm(states)
        if self.has_streams:
            return self.e_proj(embeds).unsqueeze(2) + self.h_proj(states)
        return project(torch.cat((embeds, states), dim=-1), self.eh_proj)[0]


def look_ahead(values: torch.Tensor, steps: int, fill: float = 0) -> torch.Tensor:
    """Moves dimension 1 of [B, T, ...] `steps` to the left, so that index i holds what stood at i + steps."""
    padding = (0, 0) * (values.dim() - 2) + (0, min(steps, values.shape[1]))
    return F.pad(values[:, steps:], padding, value=fill)


def targets_ahead(labels: torch.Tensor, position_ids: torch.Tensor, depth: int) -> torch.Tensor:
    """Targets of depth `depth`: the label of token i + depth + 1, or -100 across a document boundary.

    In a packed row position ids restart at every document, so a token of the same document at distance n has a
    position id that is larger by exactly n.

    Args:
        labels, position_ids: [B, T] (position ids may be [1, T]).
    """
    distance = depth + 1
    ahead = look_ahead(labels, distance, fill=-100)
    same_document = look_ahead(position_ids, distance, fill=-1) - position_ids == distance
    return ahead.masked_fill(~same_document, -100)

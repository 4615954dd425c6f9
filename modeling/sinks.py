"""Attention with sinks: a logit per head that takes weight from the keys and has no value (DeepSeek-V4, section 2.3).

All heads share one key per token, which is its value too, as in DeepSeek-V4 (`compressed_attention`).

Shapes: B batch, T query tokens, S keys, H heads, D head width.
"""

import torch
import torch.nn.functional as F


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

"""Which keys a query sees."""

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .cache import FathomDynamicCache
from .fused import FEW_TOKENS


def causal_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor,
) -> torch.Tensor | None:
    """transformers' causal mask for `config._attn_implementation`, of new tokens [B, T, d] behind those in the cache.

    In a step of decoding it is made here, by one or two operations: what to look out for elsewhere (packed documents,
    sliding layers, other backends) takes longer than they do.

    Args:
        attention_mask: [B, S], 1 for real tokens; one of four dimensions is the mask, already made.
        position_ids: [B, T].

    Returns:
        With SDPA bool [B or 1, 1, T, S], or None where every query sees every key, or T = S and it is causal.
    """
    tokens = inputs_embeds.shape[1]
    if (
        isinstance(cache, FathomDynamicCache)
        and tokens <= FEW_TOKENS
        and not torch.compiler.is_compiling()
        and config._attn_implementation == "sdpa"
        and (length := cache.get_seq_length())
        and (attention_mask is None or attention_mask.shape == (len(inputs_embeds), length + tokens))
    ):
        return _step_mask(tokens, length + tokens, attention_mask, inputs_embeds.device)
    return create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        cache=cache,
        position_ids=position_ids,
    )


def _step_mask(
    tokens: int, keys: int, attention_mask: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    visible = None
    if attention_mask is not None:
        real = attention_mask.to(device=device, dtype=torch.bool)
        # An accelerator would have to be waited for.
        visible = None if device.type == "cpu" and real.all() else real[:, None, None]  # [B, 1, 1, S]
    if tokens == 1:
        return visible
    columns = torch.arange(keys, device=device)
    causal = (columns <= columns[keys - tokens :, None])[None, None]
    return causal if visible is None else causal & visible

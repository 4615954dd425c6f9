"""Which keys a query sees."""

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .cache import FathomDynamicCache
from .fused import FEW_TOKENS
from .host import host_can_read


def causal_mask(
    config,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None,
) -> torch.Tensor | None:
    """transformers' causal mask for `config._attn_implementation`, of new tokens [B, T, d] behind those in the cache.

    In a step of decoding it is made here, by one or two operations: what to look out for elsewhere (packed documents,
    sliding layers, other backends) takes longer than they do.

    So it is in training on an accelerator: transformers looks whether there is padding, and whether positions restart,
    and an accelerator is waited for at every forward. A prompt it may look at, once: if nothing is padding, attention
    needs no mask, and PyTorch's fastest kernels take none.

    Args:
        attention_mask: [B, S], 1 for real tokens; one of four dimensions is the mask, already made.
        position_ids: [B or 1, T], as the caller gave them; None: he gave none, so that nothing is packed.

    Returns:
        With SDPA bool [B or 1, 1, T, S], or None where every query sees every key, or T = S and it is causal.
    """
    rows, tokens = inputs_embeds.shape[:2]
    if (
        isinstance(cache, FathomDynamicCache)
        and tokens <= FEW_TOKENS
        and not torch.compiler.is_compiling()
        and config._attn_implementation == "sdpa"
        and (length := cache.get_seq_length())
        and (attention_mask is None or attention_mask.shape == (rows, length + tokens))
    ):
        return _step_mask(tokens, length + tokens, attention_mask, inputs_embeds.device)
    if (
        cache is None
        and torch.is_grad_enabled()
        and not host_can_read(inputs_embeds)
        and not torch.compiler.is_compiling()
        and config._attn_implementation in ("eager", "sdpa")
        and (attention_mask is None or attention_mask.shape == (rows, tokens))
    ):
        return _text_mask(tokens, attention_mask, position_ids, inputs_embeds.device)
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
        visible = None if host_can_read(real) and real.all() else real[:, None, None]  # [B, 1, 1, S]
    if tokens == 1:
        return visible
    columns = torch.arange(keys, device=device)
    causal = (columns <= columns[keys - tokens :, None])[None, None]
    return causal if visible is None else causal & visible


def _text_mask(
    tokens: int, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """The mask of whole rows: causal, and within a document. As in transformers, padded rows are not packed."""
    if attention_mask is None and position_ids is None:
        return None
    visible = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril_()[None, None]
    if attention_mask is not None:
        return visible & attention_mask.to(device=device, dtype=torch.bool)[:, None, None]
    # A document begins where a position does not follow the one before.
    assert position_ids is not None
    document = F.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0)).cumsum(dim=1)  # [B, T]
    return visible & (document[:, None, :, None] == document[:, None, None])

"""What the models return.

Shapes: B batch, T tokens, d width, n residual streams, V vocabulary, E routed experts, M layers with experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput


class FathomOutput(ModelOutput):
    """transformers' output, set faster: transformers lists all fields of the class whenever one of them is set.

    The cache's old names (`past_key_values`, `cache_params`) can be read and set, as in transformers.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        name = self._replace_old_cache_name(name)
        if value is not None and name in self.__dataclass_fields__:
            self[name] = value  # sets the attribute, too
        else:
            object.__setattr__(self, name, value)


@dataclass
class FathomModelOutput(FathomOutput):
    """Output of `FathomModel`.

    Args:
        last_hidden_state: [B, T, d], after the final norm; [B, 1, d] where the last token's alone was wanted.
        cache: the cache, where one is used.
        hidden_states, attentions, router_logits: one tensor per layer, where asked for.
        expert_counts: tokens per routed expert of this forward, int64 [M, E]; padding is not counted, nor what a last
            layer did not read (`only_last`).
        balance_loss: sum over layers of the weighted balance losses; in training only.
        indexer_reports: figures of every indexer and query [L, F, B, T] (`indexing.REPORT`), where asked for.
        final_states: what MTP layers continue from: `last_hidden_state`, or with n > 1 residual streams the streams
            [B, T, n, d] before they are collapsed.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    expert_counts: torch.Tensor | None = None
    balance_loss: torch.Tensor | None = None
    indexer_reports: torch.Tensor | None = None
    final_states: torch.Tensor | None = None


@dataclass
class FathomCausalLMOutput(FathomOutput):
    """Output of `FathomForCausalLM`.

    Args:
        loss: next-token cross-entropy; in training plus `mtp_loss_weight * mtp_loss + balance_loss
            + indexer_loss_coef * indexer_loss`.
        logits: [B, T, V].
        mtp_loss: mean over the MTP depths of their cross-entropy, unweighted, where labels are given.
        indexer_figures: figures of the indexers by name (`indexing.REPORT`), means over the indexers; normalised over
            tokens as `loss` is, where labels are given. `indexer_figures["loss"]` is the indexer loss, unweighted.
        balance_loss, expert_counts: as in `FathomModelOutput`, MTP layers included in training.
        cache, hidden_states, attentions, router_logits: as in `FathomModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    mtp_loss: torch.Tensor | None = None
    indexer_figures: dict[str, torch.Tensor] | None = None
    balance_loss: torch.Tensor | None = None
    expert_counts: torch.Tensor | None = None

"""Fathom: DeepSeek's language models as one Hugging Face model.

    tokens -> embeddings -> num_hidden_layers x (token mixer, channel mixer) -> norm -> head -> next token
                                                                               \\-> MTP layers -> later tokens

What a layer mixes by is said by the config (`configuration_fathom`) and composed in `decoder_layer`. This file
is the frame: embedding, loop over the layers, heads, losses and registration.

Shapes: B batch, T tokens, d width, V vocabulary, E routed experts, M layers with experts.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import FathomAttention
from .cache import adopt_cache, empty_cache
from .compressed_attention import GroupedLinear, SlidingWindowAttention
from .compressed_cache import token_places
from .compressor import Compressor
from .configuration_fathom import FathomConfig
from .conversion import OfficialCheckpoints
from .decoder_layer import FathomDecoderLayer, LayerStatistics
from .experts import ExpertRouter, HashRouter, RoutedExperts, TopKRouter
from .fused import project
from .generation import FathomGenerationMixin
from .hyper_connections import HyperConnection, StreamCollapse, split_streams
from .idle_parameters import take_part
from .indexing import TrainableIndexer
from .int8 import is_quantized, quantize
from .last_token import of_last, reads_last_alone
from .losses import IGNORED, LossTerms, divisor, head_cross_entropy, indexer_figures, share_of_batch
from .masks import causal_mask
from .memory import keep_freed_memory
from .multi_token_prediction import DraftOutput, MultiTokenPredictionLayer, look_ahead, targets_ahead
from .native_layer import forget
from .normalization import FathomRMSNorm
from .outputs import FathomCausalLMOutput, FathomModelOutput
from .presets import UNSAID
from .rotary import FathomRotaryEmbedding, sinusoidal_positions


class FathomPreTrainedModel(OfficialCheckpoints):
    config: FathomConfig
    config_class = FathomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FathomDecoderLayer", "MultiTokenPredictionLayer"]
    _skip_keys_device_placement = ["cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(FathomDecoderLayer, index=0),
        "attentions": OutputRecorder(FathomAttention, index=1),
        "router_logits": OutputRecorder(ExpertRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config: FathomConfig, *args, **kwargs):
        if config.uses("dsa"):
            # A choice of keys per query is a mask, which these backends cannot be given as a tensor.
            self._supports_flash_attn = self._supports_flex_attn = False
        if config.compresses:
            # Only eager and SDPA attention know about sinks, places and entries (`compressed_attention`).
            self._supports_flash_attn = self._supports_flex_attn = False
        if config.topk_method != "noaux_tc" or not config.uses("moe"):
            self._keep_in_fp32_modules_strict = []  # no routing bias
        super().__init__(config, *args, **kwargs)
        if not config.num_nextn_predict_layers:
            # accelerate refuses to shard a model that lacks a class named here.
            self._no_split_modules = ["FathomDecoderLayer"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, which makes every loaded parameter trainable, those that no loss reaches too."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.freeze_untrained()
        model.copy_router_buffers()
        return loaded

    def post_init(self) -> None:
        super().post_init()
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freezes indexers that have no loss: distributed training waits for the gradient of everything else."""
        if not self.config.indexer_loss_coef:
            for module in self.modules():
                if isinstance(module, TrainableIndexer):
                    module.requires_grad_(False)

    def copy_router_buffers(self) -> None:
        """Lets go of the file that a model was loaded from in another dtype, and looks at the tables that are from it.

        Weights are converted, but routing biases (fp32) and tables (int64) stay as they are, and as long as they are
        parts of the mapped file all of it stays in memory.

        Raises:
            ValueError: a table that names experts there are not.
        """
        for path, module in self.named_modules():
            if isinstance(module, ExpertRouter):
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.clone())
            if isinstance(module, HashRouter):
                module.check_table(path)

    # transformers decides both by searching the text of this file, for `@use_experts_implementation` and the call of
    # its attention interface; they stand in `experts` and `attention`.
    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """By default products of sorted tokens, on every device and for every width (`sorted_mm_experts_forward`)."""
        return super().get_correct_experts_implementation(requested_experts or "sorted_mm")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ExpertRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, TopKRouter) and module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
            elif isinstance(module, HashRouter):
                module.reset_table()
        elif isinstance(module, GroupedLinear):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RoutedExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, HyperConnection | StreamCollapse):
            module.reset_parameters(std)
        elif isinstance(module, SlidingWindowAttention | Compressor):
            module.reset_parameters()

    def quantize_int8(self):
        """Puts the weights of linear maps and experts into int8, in place, for generation alone; returns the model.

        Half the bytes of bf16, and on a CPU faster steps (`int8`). Nothing of it is saved: call this after loading.

        Raises:
            ValueError: a weight is not in memory.
        """
        forget(self)
        quantize(self)
        return self

    def save_pretrained(self, *args, **kwargs):
        """As in transformers. The config names the classes of all Auto classes, not only of the one saved here.

        Raises:
            ValueError: the weights are in int8.
        """
        if is_quantized(self):
            raise ValueError("weights in int8 are not saved; call save_pretrained before quantize_int8")
        self.config.auto_map = dict(AUTO_MAP)
        actual = type(self)
        if actual.__name__.startswith("FSDP"):
            # A class that torch made of itself and ours; transformers would save torch's file as the model's code.
            self.__class__ = actual.__mro__[2]
        try:
            return super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = actual

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers. New token ids also get experts in layers that route by id."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, HashRouter):
                module.resize_table(embeddings.num_embeddings)
        return embeddings

    @torch.no_grad()
    def update_router_bias(self) -> torch.Tensor | None:
        """Moves every routing bias by one step towards equal load; call it once per optimizer step.

        The load is summed over all forwards in training mode since the last call (gradient accumulation) and over
        all ranks; an expert's tokens are counted once, also under gradient checkpointing. Evaluation counts nothing.

        Returns:
            The load [routers, E] that was used, or None if the model has no router. A router that counted nothing
            (that of an MTP layer, where no labels were given) has load 0 and its bias stays. So does that of a frozen
            router: what is trained beside it, adapters for example, is saved without it. Greedy routers and hash
            routers have no bias; their load is reported all the same.
        """
        routers = self.routers()
        if not routers:
            return None
        # Zeros instead of an early return: on another rank the same router may have counted.
        load = torch.stack(
            [
                torch.zeros(router.num_experts, device=router.weight.device)
                if router.expert_load is None
                else router.expert_load
                for router in routers
            ]
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        for router, router_load in zip(routers, load, strict=True):
            if isinstance(router, TopKRouter) and router.weight.requires_grad:
                router.update_bias(router_load, self.config.router_bias_update_speed, self.config.router_bias_recenter)
            router.expert_load = None
        return load

    def routers(self) -> list[ExpertRouter]:
        """All routers in the order of the layers; of one that PEFT trains as a copy (`modules_to_save`) the copy."""
        return [
            module
            for name, module in self.named_modules()
            if isinstance(module, ExpertRouter) and not name.endswith(".original_module")
        ]

    def add_expert_load(self, expert_counts: torch.Tensor, first: int = 0) -> None:
        """Adds a training forward's counts [routers, E] to the routers from the `first` on, in the layers' order."""
        for router, counts in zip(self.routers()[first:], expert_counts, strict=False):
            router.add_load(counts)

    def parameter_counts(self) -> dict[str, int]:
        """Numbers of parameters, from shapes alone (works on the meta device).

        Returns:
            `total`: all, without MTP layers, as DeepSeek reports it. `active`: those that one token uses, embedding
            and head included; from V2 on DeepSeek leaves the input embedding out (V3: 36.6 B, printed as 37 B, of
            37.6 B). `embedding`: embedding and head. `mtp`: MTP layers.
        """
        unused = mtp = 0
        first_mtp = self.config.num_hidden_layers
        for name, module in self.named_modules():
            if isinstance(module, MultiTokenPredictionLayer):
                mtp += sum(parameter.numel() for parameter in module.parameters())
            elif isinstance(module, RoutedExperts) and int(name.split("layers.")[1].split(".")[0]) < first_mtp:
                experts = sum(parameter.numel() for parameter in module.parameters())
                unused += experts - experts * self.config.num_experts_per_tok // module.num_experts
        ends = (self.get_input_embeddings(), self.get_output_embeddings())
        embedding = sum({end.weight: end.weight.numel() for end in ends if end is not None}.values())
        total = sum(parameter.numel() for parameter in self.parameters()) - mtp
        return {"total": total, "active": total - unused, "embedding": embedding, "mtp": mtp}


class FathomModel(FathomPreTrainedModel):
    """Embedding, decoder layers and final norm. MTP layers are kept at the end of `layers`, and run by the LM head."""

    def __init__(self, config: FathomConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        last = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [FathomDecoderLayer(config, i) for i in range(last)]
            + [MultiTokenPredictionLayer(config, i) for i in range(last, last + config.num_nextn_predict_layers)]
        )
        self.hc_head = StreamCollapse(config) if config.hc_mult > 1 else nn.Identity()
        self.norm = FathomRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Layers with a compressed past have rotary embeddings of their own, of two bases.
        shares_rope = config.position_embedding_type == "rope" and not config.compresses
        self.rotary_emb = FathomRotaryEmbedding(config) if shares_rope else None
        self.routes_by_id = config.uses("hash")
        self.chooses_keys = config.uses("dsa")
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def mtp_layers(self) -> nn.ModuleList:
        return self.layers[self.config.num_hidden_layers :]

    @merge_with_config_defaults
    @capture_outputs
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        only_last: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FathomModelOutput:
        """Runs the main layers.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, d] instead. Layers of the kind `hash` route by token id:
                with them, give both, and `inputs_embeds` is what is embedded.
            attention_mask: [B, S], 1 for real tokens, where rows are padded.
            position_ids: [B, T]; rows whose positions restart are packed documents that do not see each other,
                unless a filled cache or an attention mask is given.
            cache: cache of the tokens before these. Its old name `past_key_values` is deprecated, as in transformers.
            use_cache: return a cache; never in training.
            only_last: of the output only the last token's is wanted. Where it can, the last layer then reads that one
                alone (`last_token`), and the output has T = 1.
            report_indexer (in kwargs): also return what `indexing.REPORT` says of the indexers.
        """
        self.check_inputs(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        keep_freed_memory(inputs_embeds)

        if cache is not None:
            adopt_cache(cache, self.config)
        layer_inputs = self.layer_inputs(inputs_embeds, attention_mask, position_ids, cache)
        # Made after the mask: transformers looks for packed documents only where there is no cache.
        if use_cache and cache is None and not self.training:
            cache = empty_cache(self.config)

        hidden_states = self.embed_positions(inputs_embeds, layer_inputs.pop("position_ids"))
        del inputs_embeds  # of a long text, nothing else holds them
        hidden_states = split_streams(hidden_states, self.config.hc_mult)
        inputs = {"cache": cache, "input_ids": input_ids, **layer_inputs, **kwargs}
        statistics: list[LayerStatistics] = []
        last = self.layers[self.config.num_hidden_layers - 1]
        for layer in islice(self.layers, self.config.num_hidden_layers):
            if only_last and layer is last and reads_last_alone(self, hidden_states, **inputs):
                layer.remember_but_last(hidden_states, **inputs)
                hidden_states, inputs = hidden_states[:, -1:].contiguous(), of_last(inputs)
            # A list of all that layers return would hold every layer's hidden states, which are long where texts are.
            hidden_states, *found = layer(hidden_states, **inputs)
            statistics.append(LayerStatistics(*found))

        expert_counts, balance_loss = self.collect_routing(statistics)
        if self.training and expert_counts is not None and torch.is_grad_enabled():
            # Here, not in the language model: TRL's trainers call this model and compute their loss from its output.
            self.add_expert_load(expert_counts)
        if self.training:
            hidden_states = take_part(hidden_states, self.parameters_of_other_losses())
        last_hidden_state = self.norm(self.hc_head(hidden_states))
        return FathomModelOutput(
            last_hidden_state=last_hidden_state,
            cache=cache,
            expert_counts=expert_counts,
            balance_loss=balance_loss,
            indexer_reports=stack_reports(statistics),
            final_states=hidden_states if self.config.hc_mult > 1 else last_hidden_state,
        )

    def parameters_of_other_losses(self) -> Iterator[nn.Parameter]:
        """Those that the next token's loss does not reach: of MTP layers and of indexers."""
        for layer in self.mtp_layers:
            yield from layer.parameters()
        for module in self.modules():
            if isinstance(module, TrainableIndexer):
                yield from module.parameters()

    def check_inputs(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
        """Raises unless there is exactly one of the two, or what hash routing needs."""
        if self.routes_by_id and input_ids is None and inputs_embeds is not None:
            raise ValueError("layers of the kind 'hash' route by token id: pass input_ids along with inputs_embeds")
        if (input_ids is None and inputs_embeds is None) or (
            not self.routes_by_id and input_ids is not None and inputs_embeds is not None
        ):
            raise ValueError("give either input_ids or inputs_embeds, not both or neither")

    def layer_inputs(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
    ) -> dict[str, Any]:
        """What all layers share.

        Returns:
            `position_ids` [B, T] and `token_mask` [B, T]; and by the kind of token mixers either
            `position_embeddings` and a causal `attention_mask`, or the `places` of tokens in documents
            (see `compressed_cache`) and room for their `rotations`.
        """
        length = inputs_embeds.shape[1]
        token_mask = None
        # A mask made beforehand (for a static cache) is 4-D, and with flex attention no tensor.
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -length:].bool()
        given_positions = position_ids
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0) + past
            if attention_mask is not None and token_mask is not None:
                # Positions count from the first real token, so that a padded row is what it is alone; unless the mask
                # is that of the new tokens alone.
                whole = attention_mask.shape[1] - length == past
                counted = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
                if isinstance(whole, torch.Tensor):
                    # A static cache's length is a tensor, which no branch may depend on.
                    position_ids = torch.where(whole, counted, position_ids)
                elif whole:
                    position_ids = counted
        shared = {"position_ids": position_ids, "token_mask": token_mask}
        if self.config.compresses:
            if attention_mask is not None and token_mask is None:
                raise ValueError("swa, csa and hca layers take a 2-D attention_mask [batch, tokens], 1 for real tokens")
            last = cache.layers[0].last_places if cache is not None else None
            places = token_places(position_ids.expand(inputs_embeds.shape[:2]), token_mask, last)
            return {**shared, "places": places, "rotations": {}, "padded": token_mask is not None}
        visible = causal_mask(self.config, inputs_embeds, attention_mask, cache, given_positions)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids) if self.rotary_emb else None
        if self.chooses_keys:
            # A mask that was made beforehand need not be causal.
            shared["mask_is_causal"] = attention_mask is None or token_mask is not None
        return {**shared, "position_embeddings": position_embeddings, "attention_mask": visible}

    def embed_positions(self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Adds sinusoids to embeddings scaled by sqrt(d) (arXiv 1706.03762, 3.4 and 3.5); nothing with RoPE."""
        if self.config.position_embedding_type == "rope":
            return inputs_embeds
        width = inputs_embeds.shape[-1]
        return inputs_embeds * width**0.5 + sinusoidal_positions(position_ids, width).to(inputs_embeds.dtype)

    def collect_routing(
        self, outputs: list[LayerStatistics] | list[DraftOutput]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Stacks the layers' expert counts [M, E] and adds their balance losses; None where there are none."""
        counts = [output.expert_counts for output in outputs if output.expert_counts is not None]
        losses = [output.balance_loss for output in outputs if output.balance_loss is not None]
        return torch.stack(counts) if counts else None, torch.stack(losses).sum() if losses else None


def stack_reports(outputs: list[LayerStatistics] | list[DraftOutput]) -> torch.Tensor | None:
    """The indexers' reports of some layers [L, F, B, T]; None where there are none."""
    reports = [output.indexer_report for output in outputs if output.indexer_report is not None]
    return torch.stack(reports) if reports else None


class FathomForCausalLM(FathomPreTrainedModel, FathomGenerationMixin):
    """The language model: `FathomModel`, a head, and in training the MTP and balance losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: FathomConfig):
        super().__init__(config)
        self.model = FathomModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.learns_to_select = bool(config.indexer_loss_coef) and (config.uses("dsa") or config.uses("csa"))
        self.post_init()

    @can_return_tuple
    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FathomCausalLMOutput:
        """Predicts the next token at every position.

        Args:
            labels: [B, T], aligned with `input_ids` (shifted here); -100 is ignored.
            logits_to_keep: compute the last n positions' logits only, or those of an index tensor.
            skip_logits: with labels, compute the loss in chunks of tokens and return no logits. The loss and its
                gradients are the same; what the logits of all tokens would take of memory and time is saved.
            num_items_in_batch (in kwargs): number of targets over all micro-batches and ranks of the optimizer
                step. Given it, all terms of the loss are sums divided by it, so that gradient accumulation and the
                number of processes do not change the gradient.
            The others are as in `FathomModel`.
        """
        if labels is not None and self.learns_to_select:
            kwargs["report_indexer"] = True
        outputs: FathomModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            only_last=labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1,
            **kwargs,
        )
        hidden_states, expert_counts = outputs.last_hidden_state, outputs.expert_counts
        if labels is None or not skip_logits:
            (logits,) = project(slice_logits_to_keep(hidden_states, logits_to_keep), self.lm_head)
        else:
            logits = None
        terms = LossTerms()
        if labels is not None:
            embeds = inputs_embeds if inputs_embeds is not None else self.model.embed_tokens(input_ids)
            terms = self.loss_terms(
                outputs, logits, labels, embeds, attention_mask, position_ids, input_ids=input_ids, **kwargs
            )
            if self.training and terms.draft_counts is not None:
                drafts = terms.draft_counts
                if torch.is_grad_enabled():
                    self.add_expert_load(drafts, first=0 if expert_counts is None else len(expert_counts))
                expert_counts = drafts if expert_counts is None else torch.cat((expert_counts, drafts))

        return FathomCausalLMOutput(
            loss=terms.weighed(self.config) if self.training else terms.next_token,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=terms.mtp_loss,
            indexer_figures=terms.indexer_figures,
            balance_loss=outputs.balance_loss if labels is None else terms.balance_loss,
            expert_counts=expert_counts,
        )

    def loss_terms(
        self,
        outputs: FathomModelOutput,
        logits: torch.Tensor | None,
        labels: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs,
    ) -> LossTerms:
        """All that is known of the loss: next token, MTP, balance, indexers. Without `logits` in chunks of tokens."""
        num_items = kwargs.pop("num_items_in_batch", None)
        targets = kwargs.get("shift_labels")
        targets = look_ahead(labels, 1, fill=IGNORED) if targets is None else targets
        if logits is None:
            next_token = head_cross_entropy(self.lm_head, outputs.last_hidden_state, targets, num_items)
        else:
            how = {"vocab_size": self.config.vocab_size, "num_items_in_batch": divisor(targets, num_items), **kwargs}
            next_token = self.loss_function(logits=logits, labels=labels, **how)
        terms = LossTerms(next_token, balance_loss=outputs.balance_loss, share=share_of_batch(targets, num_items))
        reports = [(outputs.indexer_reports, targets)]
        if self.config.num_nextn_predict_layers:
            drafts, losses = [], []
            # The loss of a depth before the next depth: gradients add up in the same order when a layer is recomputed.
            for draft, ahead in self.drafts(
                outputs.final_states, inputs_embeds, attention_mask, position_ids, labels, **kwargs
            ):
                drafts.append(draft)
                losses.append(head_cross_entropy(self.lm_head, draft.hidden_states, ahead, num_items))
                reports.append((stack_reports([draft]), ahead))
            counts, balance_loss = self.model.collect_routing(drafts)
            if balance_loss is not None:
                balance_loss = balance_loss if terms.balance_loss is None else terms.balance_loss + balance_loss
            terms = terms._replace(mtp_loss=torch.stack(losses).mean(), draft_counts=counts, balance_loss=balance_loss)
        return terms._replace(indexer_figures=indexer_figures(reports, num_items))

    def drafts(
        self,
        states: torch.Tensor,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        labels: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> Iterator[tuple[DraftOutput, torch.Tensor]]:
        """Runs the MTP layers on the main model's `final_states`: what each returns, and its targets [B, T]."""
        layer_inputs = self.model.layer_inputs(inputs_embeds, attention_mask, position_ids, None)
        position_ids = layer_inputs.pop("position_ids")
        if (token_mask := layer_inputs["token_mask"]) is not None:
            # What a row's last tokens find behind it is nothing, padded or not.
            inputs_embeds = inputs_embeds.masked_fill(~token_mask.unsqueeze(-1), 0)
        for depth, layer in enumerate(self.model.mtp_layers, start=1):
            output = DraftOutput(
                *layer(
                    states,
                    look_ahead(inputs_embeds, depth),
                    input_ids=None if input_ids is None else look_ahead(input_ids, depth),
                    **layer_inputs,
                    **kwargs,
                )
            )
            states = output.states
            yield output, targets_ahead(labels, position_ids, depth)


def _classifier_config(config: FathomConfig) -> FathomConfig:
    """A classifier predicts no tokens, and has no loss for MTP layers and indexers."""
    config = copy.deepcopy(config)
    config.drop_mtp_layers()
    config.indexer_loss_coef = 0.0
    return config


def _only_in_language_models(config: FathomConfig) -> list[str]:
    """What a language model's checkpoint has and a classifier has not: patterns of the head and of the MTP layers."""
    first = config.num_hidden_layers
    mtp_layers = range(first, first + config.num_nextn_predict_layers)
    return [r"^lm_head\.", *(rf"layers\.{i}\." for i in mtp_layers)]


class FathomClassifier(FathomPreTrainedModel):
    """What both classifiers have before their head: `FathomModel` without MTP layers."""

    # The loss is a mean per micro-batch; Trainer divides it by the accumulation steps only if told so.
    accepts_loss_kwargs = False

    def __init__(self, config: FathomConfig):
        FathomPreTrainedModel.__init__(self, _classifier_config(config))
        self._keys_to_ignore_on_load_unexpected += _only_in_language_models(config)
        self.num_labels = config.num_labels
        self.model = FathomModel(self.config)

    @property
    def loss_function(self) -> Callable[..., torch.Tensor]:
        """transformers', or the one that has been set; of labels that are all ignored the mean would be NaN."""
        function = super().loss_function
        return function if hasattr(self, "_loss_function") else partial(mean_over_labels, function)

    @loss_function.setter
    def loss_function(self, function: Callable[..., torch.Tensor]) -> None:
        self._loss_function = function


def mean_over_labels(function: Callable[..., torch.Tensor], logits, labels, config, **kwargs) -> torch.Tensor:
    """A classifier's loss by transformers' function, whose sum over labels is divided here; 0 if all are ignored."""
    return function(logits=logits, labels=labels, config=config, num_items_in_batch=divisor(labels, None), **kwargs)


class FathomForSequenceClassification(GenericForSequenceClassification, FathomClassifier):
    """`FathomModel` with a linear classifier on the last token that is no padding. Has no MTP layers."""

    def __init__(self, config: FathomConfig):
        FathomClassifier.__init__(self, config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class FathomForTokenClassification(GenericForTokenClassification, FathomClassifier):
    """`FathomModel` with dropout and a linear classifier on every token. Has no MTP layers."""

    def __init__(self, config: FathomConfig):
        FathomClassifier.__init__(self, config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


AUTO_MAP = {
    "AutoConfig": "configuration_fathom.FathomConfig",
    "AutoModel": "modeling_fathom.FathomModel",
    "AutoModelForCausalLM": "modeling_fathom.FathomForCausalLM",
    "AutoModelForSequenceClassification": "modeling_fathom.FathomForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_fathom.FathomForTokenClassification",
}


def _register() -> None:
    """Makes transformers know Fathom. Runs at import, also as remote code, and may run more than once."""
    AutoConfig.register("fathom", FathomConfig, exist_ok=True)
    FathomConfig.register_for_auto_class()
    for auto_class, model_class in (
        (AutoModel, FathomModel),
        (AutoModelForCausalLM, FathomForCausalLM),
        (AutoModelForSequenceClassification, FathomForSequenceClassification),
        (AutoModelForTokenClassification, FathomForTokenClassification),
    ):
        auto_class.register(FathomConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    # Trainer's label smoothing shifts labels only for class names in this table.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["fathom"] = "FathomForCausalLM"


def register_deepseek() -> None:
    """Lets transformers' Auto classes make Fathom models of DeepSeek's own checkpoints.

    After it, `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and the classifiers read folders of the types
    `deepseek`, `deepseek_v2`, `deepseek_v3`, `deepseek_v32` and `deepseek_v4`. It holds for the whole process, so
    nothing calls it by itself; transformers' classes can still be used by their names.
    """
    for model_type in UNSAID:
        reader = type("DeepseekConfigReader", (_DeepseekConfigReader,), {"model_type": model_type})
        AutoConfig.register(model_type, reader, exist_ok=True)


class _DeepseekConfigReader(PreTrainedConfig):
    """Stands for a DeepSeek `model_type` in `AutoConfig`, and reads it as a `FathomConfig`."""

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        return FathomConfig.from_dict(config_dict, **kwargs)


_register()

__all__ = [
    "FathomConfig",
    "FathomForCausalLM",
    "FathomForSequenceClassification",
    "FathomForTokenClassification",
    "FathomModel",
    "FathomPreTrainedModel",
    "register_deepseek",
]

"""What `generate()` does otherwise than in transformers: shared batches, drafts, caches of ours, checks.

Shapes: B batch, T tokens.
"""

import copy
import functools
import sys

import torch
from packaging.version import parse
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode
from transformers.generation.utils import GenerateNonBeamOutput
from transformers.masking_utils import create_masks_for_generate

from .batch_rows import Row
from .cache import adopt_cache, check_paging, offloaded_where_it_can_be
from .configuration_fathom import FathomConfig
from .continuous_batching import SharedBatch
from .draft_rules import check_draft_decoding, check_drafts_of_others
from .drafting import DraftDecoder, DraftDecodingOutput

ONE_GROWING_TEXT = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)


class FathomGenerationMixin(GenerationMixin):
    """`generate()` of `FathomForCausalLM`."""

    config: FathomConfig
    shared_batch: SharedBatch | None = None

    def share_batch(self, **limits: int) -> SharedBatch:
        """Lets calls of `generate()` from several threads share forwards from now on, until `close()` of the result.

        Args:
            limits: of `SharedBatch`.
        """
        if self.shared_batch is not None:
            self.shared_batch.close()
        self.shared_batch = SharedBatch(self, **limits)
        return self.shared_batch

    def init_continuous_batching(self, *args, **kwargs):
        """As in transformers, of models with multi-head attention; others would fail in the batch's thread."""
        check_paging(self.config)
        return super().init_continuous_batching(*args, **kwargs)

    def _prepare_model_inputs(self, *args, **kwargs) -> tuple[torch.Tensor, str | None, dict]:
        """As in transformers, which goes on with a prompt of no tokens or no rows until a forward fails."""
        inputs, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        if 0 in inputs.shape[:2]:
            raise ValueError(
                f"the prompt is empty: {name} has shape {list(inputs.shape)}; every row needs at least one token, the "
                f"begin-of-sentence token for example"
            )
        return inputs, name, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs) -> None:
        """As in transformers, which lets a streamer wait for ever where beams are sampled."""
        if generation_mode_kwargs.get("streamer") is not None and generation_mode not in ONE_GROWING_TEXT:
            raise ValueError(
                f"a streamer takes the tokens of one growing text, which {generation_mode.value} has not (num_beams="
                f"{generation_config.num_beams}); leave the streamer or num_beams out"
            )
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs) -> tuple[GenerationConfig, dict]:
        """As in transformers, where a `max_new_tokens` that was stored with the model beats a caller's `max_length`."""
        prepared, rest = super()._prepare_generation_config(generation_config, **kwargs)

        def asks_for(limit: str) -> bool:
            return any(said is not None for said in (kwargs.get(limit), getattr(generation_config, limit, None)))

        if asks_for("max_length") and not asks_for("max_new_tokens"):
            prepared.max_new_tokens = None
        return prepared, rest

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs) -> None:
        """As in transformers. The cache becomes ours before anything is asked of it."""
        config = offloaded_where_it_can_be(generation_config)
        super()._prepare_cache_for_generation(config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("cache")
        if cache is not None:
            adopt_cache(cache, self.config)
            if generation_config.is_assistant:
                cache.activate_past_recording()

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the signature
    def prepare_inputs_for_generation(self, *args, **kwargs) -> dict:
        """As in transformers; for PEFT's prompt learning with the cache under its old name.

        PEFT before 0.22 puts its own function in this one's place, calls this one, and takes a result without
        `past_key_values` for the first step: in every step it would put the virtual tokens before the text again.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        replaced = vars(self).get("prepare_inputs_for_generation")
        if replaced is not None and "cache" in inputs:
            peft = sys.modules.get("peft")
            if peft is not None and parse(peft.__version__) < parse("0.22.dev0"):
                inputs["past_key_values"] = inputs.pop("cache")
        return inputs

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **kwargs,
    ) -> GenerateNonBeamOutput | torch.LongTensor:
        """As in transformers; of a text that can share a batch, as one row of it (`continuous_batching`)."""
        batch = self.shared_batch
        how = (logits_processor, stopping_criteria, generation_config)
        if batch is None or not batch.carries(input_ids, generation_config, synced_gpus, kwargs):
            return super()._sample(input_ids, *how, synced_gpus=synced_gpus, streamer=streamer, **kwargs)
        return batch.generate(Row(input_ids, kwargs["position_ids"], kwargs["cache"], *how), streamer)

    def _assisted_decoding(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, **kwargs
    ) -> DraftDecodingOutput | torch.Tensor:
        """Drafts by the model's own MTP layers with `use_mtp` (`drafting`), else as in transformers."""
        if not generation_config.use_mtp:
            check_drafts_of_others(logits_processor)
            everything = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus)
            return super()._assisted_decoding(*everything, **kwargs)
        check_draft_decoding(self, input_ids, logits_processor, stopping_criteria, generation_config, kwargs)
        if synced_gpus:
            raise ValueError(
                "use_mtp=True does not run with sharded parameters; gather them first, or generate without"
            )
        prompt = ("cache", "position_ids", "attention_mask", "inputs_embeds")
        decoder = DraftDecoder(
            self,
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            **{name: kwargs[name] for name in prompt if kwargs.get(name) is not None},
        )
        output = decoder.run(kwargs.get("streamer"))
        return output if generation_config.return_dict_in_generate else output.sequences

    def _get_candidate_generator(self, generation_config: GenerationConfig, *args, **kwargs):
        """As in transformers. With `assistant_early_exit` a view of the model drafts (`early_exit_view`)."""
        layers = generation_config.assistant_early_exit
        if layers is None:
            return super()._get_candidate_generator(generation_config, *args, **kwargs)
        if not 1 <= layers < self.config.num_hidden_layers:
            raise ValueError(
                f"assistant_early_exit={layers} must be at least 1 and less than num_hidden_layers="
                f"{self.config.num_hidden_layers}"
            )
        return GenerationMixin._get_candidate_generator(early_exit_view(self), generation_config, *args, **kwargs)

    def _get_static_cache_init_shape(self) -> None:
        """No shapes for transformers to fill a static cache with: layers start with their first tokens."""
        return

    def create_masks_for_generate(
        self, config: FathomConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor | None:
        """The mask that a step with a static cache gets: causal, or for places which of the new tokens are real."""
        if config.compresses:
            return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]
        return create_masks_for_generate(config, inputs_embeds, attention_mask, **kwargs)


def early_exit_view(model):
    """A model with the same layers and weights, whose number of layers can be changed without changing `model`.

    transformers drafts with fewer layers by changing the config of the model that drafts. Were that the model itself,
    forwards of other threads would lose layers meanwhile.
    """

    def shallow(module: torch.nn.Module) -> torch.nn.Module:
        view = module.__class__.__new__(module.__class__)
        vars(view).update(vars(module))
        view._modules = dict(module._modules)
        view.config = copy.deepcopy(model.config)
        return view

    view = shallow(model)
    view.model = shallow(model.model)
    view.model.config = view.config
    view.generation_config = copy.deepcopy(model.generation_config)
    view.shared_batch = None
    return view

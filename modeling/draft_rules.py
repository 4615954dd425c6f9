"""What draft decoding may call as it likes, what it refuses, and when its texts end.

Drafts that are not kept must leave no trace. A logits processor that remembers what it was called with would be changed
by them, and the text would be another one, silently.

Shapes: B rows, T tokens.
"""

import torch
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
)

from .batch_rows import Cancellation
from .cache import FathomDynamicCache

# Of transformers' logits processors those whose result depends on the text and the scores alone, row by row. Not among
# them: guidance (a cache of its own), SynthID's watermark (a history) and functions of the caller's (`prefix_allowed_
# tokens_fn`). A subclass may do anything, so the class itself counts.
STATELESS_PROCESSORS = {
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    WatermarkLogitsProcessor,
}
STATELESS_CRITERIA = {Cancellation, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria}


class Stops:
    """When a text ends. The lengths and tokens that end one are looked up, as tensors would cost more than a draft."""

    def __init__(self, criteria: StoppingCriteriaList):
        self.lengths = [each for each in criteria if type(each) is MaxLengthCriteria]
        self.tokens = {
            token
            for each in criteria
            if type(each) is EosTokenCriteria
            for token in each.eos_token_id.flatten().tolist()
        }
        known = (MaxLengthCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList(each for each in criteria if type(each) not in known)

    def __call__(self, text: torch.Tensor, token: int) -> bool:
        """Whether a text [1, T] ends with its last token."""
        length = text.shape[1]
        for each in self.lengths:
            if each.max_position_embeddings is not None and length > each.max_position_embeddings:
                each(text, None)  # it warns
        ends = token in self.tokens or any(length >= each.max_length for each in self.lengths)
        # Called at the last token too, as in plain decoding: a criterion may count.
        others = bool(self.others) and bool(self.others(text, None).item())
        return ends or others


def with_state(calls: list, stateless: set[type]) -> list[str]:
    """Class names of those processors or criteria that may remember what they were called with."""
    return [type(each).__name__ for each in calls if type(each) not in stateless]


def check_draft_decoding(
    model, input_ids: torch.Tensor, logits_processor, stopping_criteria, generation_config, model_kwargs: dict
) -> None:
    """Raises ValueError for what draft decoding cannot do, with what can be done instead."""
    if not model.config.num_nextn_predict_layers:
        raise ValueError("use_mtp=True needs MTP layers: this model has num_nextn_predict_layers=0")
    if not isinstance(model_kwargs.get("cache"), FathomDynamicCache):
        raise ValueError(
            "use_mtp=True needs a cache that can be cropped: leave cache_implementation and use_cache alone"
        )
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    for name in wanted:
        if getattr(generation_config, name, None):
            raise ValueError(f"{name}=True is not returned with use_mtp=True; generate without one of them")
    if "prepare_inputs_for_generation" in vars(model):
        raise ValueError("use_mtp=True does not know the virtual tokens of PEFT's prompt learning; leave use_mtp out")
    if len(input_ids) > 1:
        stateful = [
            *with_state(logits_processor, STATELESS_PROCESSORS),
            *with_state(stopping_criteria, STATELESS_CRITERIA),
        ]
        if stateful:
            raise ValueError(
                f"use_mtp=True with several rows cannot call {', '.join(stateful)} as plain decoding does, since rows "
                f"keep different numbers of drafts; generate row by row, or leave use_mtp out"
            )


def check_drafts_of_others(logits_processor: LogitsProcessorList) -> None:
    """The same for transformers' assisted decoding, which calls processors also for drafts that are not kept.

    Raises:
        ValueError: a processor may remember those calls, and the text would be another one.
    """
    stateful = with_state(logits_processor, STATELESS_PROCESSORS)
    if stateful:
        raise ValueError(
            f"drafts of an assistant, of prompt lookup or of an early exit would change the state of "
            f"{', '.join(stateful)}, hence the text; leave the drafts out (assistant_model, prompt_lookup_num_tokens, "
            f"assistant_early_exit), or draft with use_mtp=True"
        )

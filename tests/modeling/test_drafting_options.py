"""Draft decoding beside every option of `generate()`: the text of plain greedy decoding, or a refusal.

The oracle is the same call without drafts. What a stateful processor or criterion was called with must be equal, too.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from drafters import NEW, VOCABULARY, drafted, drafter, prompts
from generations import model, save_with_tokenizer, tokens
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from fathom.modeling import drafting
from fathom.modeling.batch_rows import Cancellation
from fathom.modeling.draft_rules import STATELESS_PROCESSORS, with_state
from fathom.training.checkpoints import load_tokenizer

WATERMARKS = {
    "green list": WatermarkingConfig(bias=4.0, seeding_scheme="lefthash"),
    "synthid": SynthIDTextWatermarkingConfig(keys=[654, 400, 836, 123], ngram_len=3),
}
# Options that act on greedy texts.
EQUAL: dict[str, list[Any]] = {
    "bad_words_ids": [[[3], [5, 6]]],
    "begin_suppress_tokens": [[1, 2, 3, 4, 5, 6]],
    "encoder_no_repeat_ngram_size": [2],
    "encoder_repetition_penalty": [1.5],
    "eos_token_id": [[3]],
    "exponential_decay_length_penalty": [(4, 1.5)],
    "forced_bos_token_id": [4],
    "forced_eos_token_id": [4],
    "guidance_scale": [1.5, 3.0],
    "max_length": [25],
    "min_length": [30],
    "min_new_tokens": [20],
    "no_repeat_ngram_size": [2],
    "prefill_chunk_size": [5],
    "remove_invalid_values": [True],
    "renormalize_logits": [True],
    "repetition_penalty": [1.7],
    "sequence_bias": [[[[3], 5.0], [[5, 6], -9.0]]],
    "suppress_tokens": [[3, 5]],
    "watermarking_config": list(WATERMARKS.values()),
}
# Options of a part that drafts have nothing to do with, or that do not act on greedy texts of one row.
SAME: dict[str, Any] = {
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "dynamic",
    "disable_compile": True,
    "do_sample": False,
    "max_matching_ngram_size": 2,
    "max_time": 1000.0,
    "num_assistant_tokens": 3,
    "pad_token_id": 0,
    "prompt_lookup_num_tokens": 3,
    "return_dict_in_generate": False,
    "use_cache": True,
}
REFUSED: dict[str, Any] = {
    "cache_implementation": "static",
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_logits": True,
    "output_scores": True,
    "use_cache": False,
}
# Sampling's own (its distribution is tested elsewhere), beams', assistants', encoders', and what is no option.
ELSEWHERE = {
    *("temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("num_beams", "early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "constraints"),
    *("force_words_ids", "penalty_alpha", "dola_layers", "low_memory"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("num_assistant_tokens_schedule", "is_assistant", "speculation_type", "decoder_start_token_id", "bos_token_id"),
    *("cache_config", "max_cache_len", "compile_config", "continuous_batching_config", "_from_model_config"),
    *("transformers_version", "use_mtp", "max_new_tokens", "stop_strings", "token_healing"),
}
every_generation = pytest.mark.parametrize("generation", ["v3", "v3.2", "v4"])


@pytest.fixture(autouse=True)
def always_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock says: models this small have little to gain."""
    monkeypatch.setattr(drafting, "PLAIN_STEPS", 0)


def test_every_option_is_in_one_of_the_tables() -> None:
    """An option that a release of transformers adds has to be looked at."""
    assert set(vars(GenerationConfig())) == {*EQUAL, *SAME, *REFUSED, *ELSEWHERE}


def both(ours, ids: torch.Tensor, mask: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, Any]:
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    if "max_length" in settings:
        del plain["max_new_tokens"]
    expected = ours.generate(ids, attention_mask=mask, **plain)
    return expected, ours.generate(ids, attention_mask=mask, use_mtp=True, return_dict_in_generate=True, **plain)


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "batch"])
@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in EQUAL.items() for value in values], ids=str
)
@every_generation
def test_options_that_act(generation: str, name: str, value: Any, rows: int) -> None:
    ours, (ids, mask) = drafter(generation, 2), prompts(rows)
    stateful = name == "guidance_scale" or value is WATERMARKS["synthid"]
    needs_end = name in ("bad_words_ids", "exponential_decay_length_penalty", "min_length", "min_new_tokens")
    settings = {name: value, **({"eos_token_id": [3]} if needs_end else {})}
    if rows > 1 and stateful:
        with pytest.raises(ValueError, match=r"several rows cannot call .*; generate row by row, or leave use_mtp out"):
            drafted(ours, ids, mask, **settings)
        return
    expected, output = both(ours, ids, mask, **settings)
    assert torch.equal(output.sequences, expected)
    assert output.drafted_tokens > 0


@pytest.mark.parametrize(("name", "value"), SAME.items(), ids=str)
def test_options_that_do_not_act(name: str, value: Any) -> None:
    ours, (ids, mask) = drafter("v3", 2), prompts(1)
    plain = ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, name: value}
    assert torch.equal(ours.generate(ids, attention_mask=mask, use_mtp=True, **settings), plain)


@pytest.mark.parametrize(("name", "value"), REFUSED.items(), ids=str)
def test_options_that_are_refused(name: str, value: Any) -> None:
    ours, (ids, mask) = drafter("v3", 2), prompts(1)
    with pytest.raises(ValueError, match=name):
        drafted(ours, ids, mask, **{name: value})


def test_strings_end_texts(tmp_path: Path) -> None:
    save_with_tokenizer(tmp_path, "v3")
    tokenizer = load_tokenizer(str(tmp_path))
    ours = model("v3", vocab_size=len(tokenizer), num_nextn_predict_layers=2)
    ids = tokens(1)
    whole = ours.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    end = tokenizer.decode(whole[0, 24 + 20 : 24 + 22])
    assert end
    settings = {"stop_strings": [end], "tokenizer": tokenizer}
    expected, output = both(ours, ids, torch.ones_like(ids), **settings)
    assert expected.shape[1] < whole.shape[1]
    assert torch.equal(output.sequences, expected)


class Grammar(LogitsProcessor):
    """Has a state: the tokens it has been told, of which none may come a third time in a row of calls."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []
        self.counts = [0] * VOCABULARY

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        self.counts[self.texts[-1][-1]] += 1
        allowed = torch.tensor([count <= min(self.counts) + 1 for count in self.counts])
        return scores.masked_fill(~allowed, float("-inf"))


class Counting(StoppingCriteria):
    """Has a state: ends a text at its 25th call, whatever the text is then."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.texts.append(input_ids[0].tolist())
        return torch.full((len(input_ids),), len(self.texts) >= 25, dtype=torch.bool)


@pytest.mark.parametrize("eos", [None, [3, 7]], ids=["until its length", "until a token"])
@every_generation
def test_ones_own_processors_and_criteria_are_called_as_in_plain_decoding(generation: str, eos: Any) -> None:
    ours, (ids, mask), seen = drafter(generation, 2), prompts(1), []
    for drafts in (False, True):
        grammar, counting = Grammar(), Counting()
        text = ours.generate(
            ids,
            attention_mask=mask,
            use_mtp=drafts or None,
            logits_processor=[grammar],
            stopping_criteria=StoppingCriteriaList([counting]),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=0,
        )
        seen.append((text.tolist(), grammar.texts, counting.texts))
    assert seen[0] == seen[1]


@every_generation
def test_ones_own_grammar_as_a_function(generation: str) -> None:
    """`prefix_allowed_tokens_fn` is a function of the caller's, which may have a state."""
    ours, ids, texts = drafter(generation, 2), prompts(1)[0], []
    for drafts in (None, True):
        calls = 0

        def allowed(row: int, text: torch.Tensor) -> list[int]:
            nonlocal calls
            calls += 1
            return [1 + (calls + offset) % (VOCABULARY - 1) for offset in range(4)]

        settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        texts.append(ours.generate(ids, use_mtp=drafts, prefix_allowed_tokens_fn=allowed, **settings))
    assert torch.equal(*texts)


@pytest.mark.parametrize(("generation", "depths"), [("v3", 2), ("v4", 1)])
def test_a_processor_with_a_state_samples_the_same_distribution(generation: str, depths: int) -> None:
    """Of all texts of three tokens, of a vocabulary of four: within 4.5 sigma of their exact probabilities."""

    class Sharper(LogitsProcessor):
        """Has a state: every call divides by a smaller temperature."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return scores * self.calls / 2

    ours = model(generation, num_nextn_predict_layers=depths, vocab_size=4, pad_token_id=0, initializer_range=0.25)
    ids, mask, count = torch.tensor([[1, 2, 3, 1]]), torch.ones(1, 4, dtype=torch.long), 600
    torch.manual_seed(0)
    found, accepted = torch.zeros(4, 4, 4), 0
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 3, "pad_token_id": 0}
    for _ in range(count):
        output = drafted(ours, ids, mask, logits_processor=[Sharper()], **settings)
        found[tuple(output.sequences[0, 4:].tolist())] += 1
        accepted += output.accepted_tokens
    assert accepted > count / 10
    texts = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.no_grad():
        logits = ours(torch.cat((ids.repeat(64, 1), texts), dim=1)).logits[:, 3:6]
    chances = (logits * torch.arange(1, 4)[:, None] / 2).softmax(-1).gather(2, texts[..., None])[..., 0].prod(1)
    expected, found = chances * count, found.flatten()
    sigma = (expected * (1 - chances)).sqrt()
    assert ((found - expected).abs() <= 4.5 * sigma + 1).all(), (found, expected)


def test_several_rows_and_a_criterion_of_ones_own_are_refused() -> None:
    ours, (ids, mask) = drafter("v3", 1), prompts(4)
    with pytest.raises(ValueError, match="cannot call Grammar, Counting as plain decoding does"):
        drafted(ours, ids, mask, logits_processor=[Grammar()], stopping_criteria=StoppingCriteriaList([Counting()]))
    output = drafted(ours, ids, mask, stopping_criteria=StoppingCriteriaList([Cancellation()]))
    assert output.sequences.shape == (4, ids.shape[1] + NEW)


def test_a_subclass_may_have_a_state() -> None:
    class Remembering(next(iter(STATELESS_PROCESSORS))):  # type: ignore[misc]
        pass

    assert with_state([object.__new__(Remembering)], STATELESS_PROCESSORS) == ["Remembering"]


OTHERS: dict[str, dict[str, Any]] = {
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 3},
    "assistant_early_exit": {"assistant_early_exit": 1},
    "assistant_model": {"assistant_model": "another"},
}


@pytest.mark.parametrize("drafts", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.5},
        {"watermarking_config": WATERMARKS["synthid"]},
        {"logits_processor": [Grammar()]},
        {"prefix_allowed_tokens_fn": lambda row, text: [1, 2, 3]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_drafts_of_others_beside_processors_with_a_state_are_refused(drafts: dict, settings: dict) -> None:
    """transformers' assisted decoding shows processors drafts that it then drops."""
    ours, (ids, mask) = drafter("v3", 1), prompts(1)
    drafts = {
        name: model("v3", vocab_size=VOCABULARY) if value == "another" else value for name, value in drafts.items()
    }
    with pytest.raises(ValueError, match=r"would change the state of .*; leave the drafts out"):
        ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **drafts, **settings)


@pytest.mark.parametrize("drafts", OTHERS.values(), ids=OTHERS)
@every_generation
def test_drafts_of_others_beside_processors_without_one(generation: str, drafts: dict) -> None:
    ours, (ids, mask) = drafter(generation, 1), prompts(1)
    drafts = {
        name: model(generation, vocab_size=VOCABULARY) if value == "another" else value
        for name, value in drafts.items()
    }
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.5}
    expected = ours.generate(ids, attention_mask=mask, **plain)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **drafts, **plain), expected)


@pytest.mark.parametrize("layers", [0, 3, 7])
def test_early_exit_needs_fewer_layers(layers: int) -> None:
    ours, (ids, mask) = drafter("v3", 1), prompts(1)
    with pytest.raises(
        ValueError, match=f"assistant_early_exit={layers} must be at least 1 and less than num_hidden_l"
    ):
        ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, assistant_early_exit=layers)

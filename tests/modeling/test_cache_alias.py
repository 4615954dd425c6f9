"""The cache's old name `past_key_values`, which PEFT's prompt and prefix tuning still pass: a deprecated alias.

The oracle is the same call with the new name, and for outputs an output class of transformers.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generations import GENERATIONS, config, model, tokens
from transformers import DynamicCache, StaticCache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from fathom import (
    FathomForCausalLM,
    FathomForSequenceClassification,
    FathomForTokenClassification,
    FathomModel,
)
from fathom.modeling.outputs import FathomCausalLMOutput, FathomModelOutput

MODELS = [FathomModel, FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification]
every_generation = pytest.mark.parametrize("generation", GENERATIONS)
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def build(kind: type, generation: str) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config(generation)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
@every_generation
def test_the_old_name_is_the_new_one_and_warns(generation: str, kind: type) -> None:
    ours, ids, results = build(kind, generation), tokens(), []
    for name in ("cache", "past_key_values"):
        filled = DynamicCache(config=ours.config)
        ours(ids[:, :16], cache=filled)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(ours(ids[:, 16:], **{name: filled}))
        renamed = [str(each.message) for each in caught if issubclass(each.category, FutureWarning)]
        # transformers' classification heads hand the cache on by its new name: one warning each.
        assert len(renamed) == (name == "past_key_values")
        assert all("Use `cache` instead" in message for message in renamed)
        assert filled.get_seq_length() == 24
    first, second = (output[0] for output in results)
    assert torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_of_both_names_the_new_one_counts(kind: type) -> None:
    ours, ids = build(kind, "v3"), tokens()
    caches = [DynamicCache(config=ours.config) for _ in range(2)]
    with pytest.warns(FutureWarning, match="Both `past_key_values` and `cache` are set"):
        ours(ids, cache=caches[0], past_key_values=caches[1])
    assert [cache.get_seq_length() for cache in caches] == [24, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_the_signature_names_the_cache_alone(kind: type) -> None:
    """`generate` and Trainer read it."""
    names = inspect.signature(kind.forward).parameters
    assert "cache" in names
    assert "past_key_values" not in names


@every_generation
def test_generation_goes_on_from_a_cache_of_the_old_name(generation: str) -> None:
    ours, ids = model(generation), tokens(1)
    expected = ours.generate(ids, **GREEDY)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        ours(ids[:, :10], cache=cache)
    with pytest.warns(FutureWarning, match="past_key_values"):
        text = ours.generate(ids, past_key_values=cache, **GREEDY)
    assert torch.equal(text, expected)
    assert cache.get_seq_length() == text.shape[1] - 1


@torch.no_grad()
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_old_name_compiles_without_a_graph_break(return_dict: bool) -> None:
    ours, ids, results = model("v3"), tokens(), []
    torch._dynamo.reset()
    step = torch.compile(ours.forward, fullgraph=True, backend="eager")
    for forward, name in ((ours, "cache"), (step, "past_key_values")):
        cache = StaticCache(ours.config, max_cache_len=32)
        ours(ids[:, :16], cache=cache)
        results.append(forward(ids[:, 16:17], return_dict=return_dict, **{name: cache}))
    torch.testing.assert_close(results[1][0], results[0][0])
    assert type(results[1]) is type(results[0])


# What callers do with an output: a value, or an exception's type.
READS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda output: output.past_key_values,
    "other attribute": lambda output: output.cache_params,
    "item": lambda output: output["past_key_values"],
    "get": lambda output: output.get("past_key_values"),
    "get absent": lambda output: output.get("absent", "nothing"),
    "contains": lambda output: "past_key_values" in output,
    "keys": lambda output: list(output.keys()),
    "tuple": lambda output: output.to_tuple(),
    "new name": lambda output: (output.cache, output["cache"], output.get("cache"), "cache" in output),
}
WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "attribute": lambda output, value: setattr(output, "past_key_values", value),
    "other attribute": lambda output, value: setattr(output, "cache_params", value),
    "item": lambda output, value: output.__setitem__("past_key_values", value),
    "new attribute": lambda output, value: setattr(output, "cache", value),
    "nothing": lambda output, value: None,
}


def read(output: Any, how: Callable[[Any], Any]) -> Any:
    try:
        return how(output)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("value", [None, "another"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("initial", [{}, {"cache": "filled"}, {"past_key_values": "filled"}], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs", "first"),
    [
        (FathomModelOutput, MoeModelOutputWithPast, "last_hidden_state"),
        (FathomCausalLMOutput, MoeCausalLMOutputWithPast, "logits"),
    ],
    ids=["model", "causal"],
)
def test_outputs_answer_to_both_names_like_those_of_transformers(
    ours: type, theirs: type, first: str, initial: dict, write: str, value: str | None
) -> None:
    outputs = [kind(**{first: torch.ones(2)}, **initial) for kind in (ours, theirs)]
    errors = [read(output, lambda output: WRITES[write](output, value)) for output in outputs]
    assert errors[0] == errors[1]
    for name, how in READS.items():
        found, expected = (read(output, how) for output in outputs)
        if name == "tuple":
            found, expected = found[1:], expected[1:]
        assert found == expected, name


@pytest.mark.parametrize("kind", [FathomModelOutput, FathomCausalLMOutput])
def test_outputs_take_one_of_the_names(kind: type) -> None:
    with pytest.raises(ValueError, match="both `cache` and `past_key_values`"):
        kind(cache="one", past_key_values="other")

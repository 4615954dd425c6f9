"""Draft decoding: the text or the distribution of plain decoding, whatever is accepted; drafts as in training."""

import itertools

import pytest
import torch
from drafters import NEW, drafted, drafter, prompts
from generations import model
from transformers import DynamicCache
from transformers.generation import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fathom import FathomForCausalLM
from fathom.modeling import drafting

every_generation = pytest.mark.parametrize("generation", ["v3", "v3.2", "v4"])
every_depth = pytest.mark.parametrize("depths", [1, 2, 3])


@pytest.fixture(autouse=True)
def always_drafts(monkeypatch):
    """Whatever the clock says: models this small have little to gain."""
    monkeypatch.setattr(drafting, "PLAIN_STEPS", 0)


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "batch"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"eos_token_id": 3}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}],
    ids=["", "until a token", "processors"],
)
@every_depth
@every_generation
def test_greedy_text_is_the_same(generation, depths, settings, rows):
    ours, (ids, mask) = drafter(generation, depths), prompts(rows)
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **settings}
    expected = ours.generate(ids, attention_mask=mask, **plain)
    output = drafted(ours, ids, mask, **settings)
    assert torch.equal(output.sequences, expected)
    if "eos_token_id" not in settings:
        assert 0 < output.accepted_tokens <= output.drafted_tokens
        assert output.forwards < NEW
        if rows == 1:
            assert output.forwards + output.accepted_tokens == NEW


@torch.no_grad()
def drafts_without_cache(ours: FathomForCausalLM, text: list[int]) -> list[int]:
    """What the MTP layers guess after a text whose last token the main model has just chosen."""
    known = torch.tensor([text])
    states, read = ours.model(known[:, :-1], use_cache=False).final_states, len(text) - 1
    for depth, layer in enumerate(ours.model.mtp_layers, start=1):
        ahead = known[:, depth : depth + read]
        embeds = ours.model.embed_tokens(ahead)
        inputs = ours.model.layer_inputs(embeds, None, torch.arange(read)[None], None)
        inputs.pop("position_ids")
        output = layer(states, embeds, input_ids=ahead, **inputs)
        states = output.states
        known = torch.cat((known, ours.lm_head(output.hidden_states[:, -1:]).argmax(-1)), dim=1)
    return known[0, len(text) :].tolist()


@every_depth
@every_generation
def test_drafts_are_those_of_a_forward_without_caches(generation, depths):
    ours, (ids, mask) = drafter(generation, depths), prompts(1)
    output = drafted(ours, ids, mask, max_new_tokens=NEW)
    text, end = output.sequences[0].tolist(), ids.shape[1] + 1
    forwards = accepted = 0
    while end < len(text):
        guesses, truth = drafts_without_cache(ours, text[:end]), text[end:]
        kept = len(list(itertools.takewhile(lambda both: both[0] == both[1], zip(guesses, truth, strict=False))))
        # Drafts beyond the end of the text cannot be compared: there, stop counting.
        if end + depths >= len(text):
            break
        forwards, accepted, end = forwards + 1, accepted + kept, end + kept + 1
    stopped = drafted(ours, ids, mask, max_new_tokens=end - ids.shape[1])
    assert (stopped.forwards, stopped.accepted_tokens) == (forwards + 1, accepted)
    assert accepted > 0


@pytest.mark.parametrize(("generation", "depths"), [("v3", 1), ("v3.2", 2), ("v4", 1)])
def test_sampling_has_the_distribution_of_plain_sampling(generation, depths):
    """Chi-square of all texts of three tokens, of a vocabulary of five, against their exact probabilities."""
    ours = model(generation, num_nextn_predict_layers=depths, vocab_size=5, pad_token_id=0, initializer_range=0.25)
    ids, count = torch.tensor([[1, 2, 3, 4, 1, 2]]), 4000
    settings = {"do_sample": True, "max_new_tokens": 3, "temperature": 0.8, "top_k": 4}
    torch.manual_seed(0)
    rows = ids.repeat(count // 8, 1)
    outputs = [drafted(ours, rows, torch.ones_like(rows), **settings) for _ in range(8)]
    assert sum(output.accepted_tokens for output in outputs) > count / 10
    found = torch.cat([output.sequences[:, 6:] for output in outputs])

    texts = torch.tensor(list(itertools.product(range(5), repeat=3)))
    with torch.no_grad():
        logits = ours(torch.cat((ids.repeat(125, 1), texts), 1)).logits[:, 5:8] / 0.8
    smallest = logits.topk(4, dim=-1).values[..., -1:]
    chances = logits.masked_fill(logits < smallest, float("-inf")).softmax(-1)
    expected = chances.gather(2, texts[..., None])[..., 0].prod(1) * count
    observed = (found[:, None] == texts).all(-1).sum(0)
    assert observed[expected == 0].sum() == 0
    common = expected >= 5
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    observed = torch.cat((observed[common], observed[~common].sum()[None]))
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    # The normal approximation of Wilson and Hilferty, one-sided at 1 in 1000; the seed is fixed.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit, (statistic, limit)


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "batch"])
@pytest.mark.parametrize(("cost_of_a_draft", "pays"), [(0.0, True), (20.0, False)])
def test_drafting_ends_where_it_takes_longer(monkeypatch, cost_of_a_draft, pays, rows):
    """By a clock that a forward of the main model moves by 1 and by so much more for every draft that it reads."""
    ours, (ids, mask), now = drafter("v3", 2), prompts(rows), [0.0]
    embedded = ours.model.layers[0].register_forward_hook(
        lambda layer, inputs, output: now.append(now[-1] + 1 + cost_of_a_draft * (inputs[0].shape[1] - 1))
    )
    monkeypatch.setattr(drafting, "PLAIN_STEPS", 3)
    monkeypatch.setattr(drafting, "DRAFT_STEPS", 4)
    monkeypatch.setattr(drafting, "perf_counter", lambda: now[-1])
    try:
        output = drafted(ours, ids, mask)
    finally:
        embedded.remove()
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(output.sequences, ours.generate(ids, attention_mask=mask, **settings))
    if pays:
        assert output.drafted_tokens > (4 + drafting.FIRST_STEPS) * 2 * rows
        assert output.forwards < NEW
    else:
        assert output.drafted_tokens == (4 + drafting.FIRST_STEPS) * 2 * rows


class UntilRepeated(StoppingCriteria):
    """A criterion of a user's own: ends a text with two equal tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == input_ids[:, -2]


@every_generation
def test_a_criterion_of_ones_own_ends_a_text_where_it_would_without_drafts(generation):
    ours, (ids, mask) = drafter(generation, 2), prompts(1)
    settings = {"stopping_criteria": StoppingCriteriaList([UntilRepeated()]), "pad_token_id": 0, "eos_token_id": 3}
    expected = ours.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **settings)
    output = drafted(ours, ids, mask, **settings)
    assert torch.equal(output.sequences, expected)


def test_a_text_longer_than_the_model_knows_is_warned_of(monkeypatch):
    warned = []
    monkeypatch.setattr(MaxLengthCriteria, "__call__", lambda self, text, scores: warned.append(text.shape[1]))
    stops = drafting.Stops(StoppingCriteriaList([MaxLengthCriteria(max_length=9, max_position_embeddings=7)]))
    text = torch.ones(1, 9, dtype=torch.long)
    assert [stops(text[:, :length], 1) for length in (7, 8, 9)] == [False, False, True]
    assert warned == [8, 9]


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "batch"])
@every_depth
def test_caches_forget_what_windows_have_left(monkeypatch, depths, rows):
    """Those of the MTP layers too, although all drafts may be kept and nothing is cropped."""
    ours, (ids, mask), caches = drafter("v4", depths), prompts(rows), []

    class Seen(drafting.Columns):
        def __init__(self, cache, real):
            super().__init__(cache, real)
            caches.append(cache)

    monkeypatch.setattr(drafting, "Columns", Seen)
    drafted(ours, ids, mask)
    layers = [layer for cache in caches for layer in cache.layers]
    assert len(layers) == ours.config.num_hidden_layers + depths
    for layer in layers:
        for name, held in layer.tokens.items():
            assert held.shape[1] <= layer.needed(name) + depths + 1


class Pieces(BaseStreamer):
    def __init__(self):
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten())

    def end(self) -> None:
        self.ended = True


@every_generation
def test_streams_every_token_once(generation):
    ours, (ids, mask), streamer = drafter(generation, 2), prompts(1), Pieces()
    output = drafted(ours, ids, mask, streamer=streamer)
    assert streamer.ended
    assert torch.cat(streamer.pieces).tolist() == output.sequences[0].tolist()
    assert len(streamer.pieces) == output.forwards + 1


@every_generation
def test_goes_on_with_a_filled_cache_and_from_embeddings(generation):
    ours, (ids, mask) = drafter(generation, 2), prompts(1)
    expected = ours.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    cache = DynamicCache(config=ours.config)
    first = drafted(ours, ids, mask, cache=cache, max_new_tokens=15)
    assert first.cache is cache
    assert cache.get_seq_length() == ids.shape[1] + 14
    whole = drafted(ours, first.sequences, torch.ones_like(first.sequences), cache=cache, max_new_tokens=25)
    assert torch.equal(whole.sequences, expected)

    embeds = ours.model.embed_tokens(ids)
    if not ours.config.uses("hash"):
        alone = drafted(ours, None, mask, inputs_embeds=embeds).sequences
        assert torch.equal(alone, expected[:, ids.shape[1] :])


def test_what_it_cannot_do_is_said():
    ours, (ids, mask) = drafter("v3", 1), prompts(1)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        drafted(model("v3", num_nextn_predict_layers=0), ids, mask)
    with pytest.raises(ValueError, match="cache_implementation"):
        drafted(ours, ids, mask, cache_implementation="static")
    with pytest.raises(ValueError, match="output_scores=True"):
        drafted(ours, ids, mask, output_scores=True)

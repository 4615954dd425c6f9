"""No forward makes an accelerator wait, or mixes devices (see `device` for how that is seen without one).

Allowed are what transformers asks once per prompt: whether a mask hides anything, which spares attention the mask, and
whether a static cache is empty.
"""

from collections.abc import Iterator
from contextlib import nullcontext, suppress

import pytest
import torch
from device import fake_cuda, forbid_reading, reads
from generations import GENERATIONS, config, model
from transformers import DynamicCache, StaticCache

from fathom import FathomConfig, FathomForCausalLM, FathomForSequenceClassification, FathomForTokenClassification
from fathom.modeling import compressed_attention, host, sparse_attention

WAYS = ["fake CUDA", "unread CPU"]
LENGTH = 60  # many windows and blocks, and more keys and entries than are chosen
SHORTER = {"v3.2": {"index_topk": 8}, "v4": {"index_topk": 2, "token_mixers": ["swa", "csa", "hca", "csa", "swa"]}}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> Iterator[str]:
    """Everything runs as on an accelerator. Texts are read in small parts, as long ones are."""
    for module in (compressed_attention, sparse_attention):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 16)
    if request.param == "unread CPU":
        forbid_reading(monkeypatch)
    with fake_cuda() if request.param == "fake CUDA" else nullcontext():
        yield request.param


def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.arange(rows * length).view(rows, length) * 7 % 97


def left_padded(length: int) -> torch.Tensor:
    """The second of two rows begins with padding."""
    return (torch.arange(length) >= torch.tensor([[0], [5]])).long()


def documents(rows: int = 2) -> torch.Tensor:
    """Positions of packed documents; in the first row they fill blocks, in the second they do not."""
    return torch.stack([torch.arange(LENGTH) % 20, torch.arange(LENGTH) % 13])[:rows]


every_generation = pytest.mark.parametrize("generation", GENERATIONS)
padded_or_not = pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])


@torch.no_grad()
@padded_or_not
@every_generation
def test_prompts(way, generation, padded):
    ours, mask = model(generation), left_padded(LENGTH) if padded else None
    for settings in ({"use_cache": False}, {"use_cache": True}, {"logits_to_keep": 1}):
        with reads() as found:
            ours(ids(), attention_mask=mask, **settings)
        # Of fake tensors, transformers does not ask; of others first whether anything is padding, then which part.
        asks = padded and generation != "v4" and way == "unread CPU"
        assert found == ["aten::_local_scalar_dense"] * 2 * asks


@torch.no_grad()
@padded_or_not
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@every_generation
def test_steps_and_chunks_on_a_growing_cache(way, generation, attn_implementation, padded):
    ours = model(generation, attn_implementation=attn_implementation, **SHORTER.get(generation, {}))
    cache, length = ours(ids(), attention_mask=left_padded(LENGTH) if padded else None).cache, LENGTH
    for tokens in (1, 1, 1, 1, 1, 1, 1, 1, 1, 5, 40, 1):
        length += tokens
        text, mask = ids(length=tokens), left_padded(length) if padded else None
        with reads() as found:
            logits = ours(text, attention_mask=mask, cache=cache).logits
        assert found == []
    assert logits.shape == (2, 1, 97)
    assert cache.get_seq_length() == length
    assert type(cache.get_seq_length()) is int


@torch.no_grad()
@padded_or_not
@every_generation
def test_steps_on_a_static_cache(way, generation, padded):
    """With the masks that `generate` makes for it."""
    ours = model(generation)
    cache, length = StaticCache(ours.config, max_cache_len=LENGTH + 20), 0
    for tokens in (LENGTH, 1, 1, 1, 1, 1, 1, 1, 1, 7):
        length += tokens
        mask = left_padded(length) if padded else None
        with reads() as found:
            made = ours.create_masks_for_generate(
                ours.config, torch.zeros(2, tokens, 64), mask, cache=cache, position_ids=None
            )
            positions = torch.arange(length - tokens, length)[None]
            ours(ids(length=tokens), attention_mask=made, position_ids=positions, cache=cache)
        # transformers asks whether the cache is empty, and then what the mask hides; not in a step.
        assert len(found) <= (0 if tokens == 1 else 2)


@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "padded between", "checkpointed", "without logits"])
@every_generation
def test_training(way, generation, kind):
    """Next token, MTP, balance and indexer terms, and on a CPU the backward pass, which runs a layer again or not."""
    mask = left_padded(LENGTH)
    if kind == "padded between":
        mask[0, 20:31] = 0
    inputs = {
        "packed": {"position_ids": documents()},
        "padded": {"attention_mask": mask},
        "padded between": {"attention_mask": mask},
        "without logits": {"skip_logits": True},
    }.get(kind, {})
    ours = model(generation, **SHORTER.get(generation, {})).train()
    if kind == "checkpointed":
        ours.activation_checkpointing_enable()
    with reads() as found:
        loss = ours(ids(), labels=ids(), num_items_in_batch=torch.ones(()) * 100, **inputs).loss
        if way == "unread CPU":
            loss.backward()
    assert found == []


@pytest.mark.parametrize("learns", [False, True], ids=["frozen indexer", "learning indexer"])
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "warm-up"])
@pytest.mark.parametrize("generation", ["v3.2", "v4"])
def test_training_with_indexers_in_every_phase(way, generation, dense, learns):
    ours = model(generation, index_dense=dense, indexer_loss_coef=float(learns), **SHORTER[generation]).train()
    mask = left_padded(LENGTH)
    with reads() as found:
        loss = ours(ids(), labels=ids(), attention_mask=mask).loss
        if way == "unread CPU":
            loss.backward()
    assert found == []


@torch.no_grad()
@every_generation
def test_evaluation(way, generation):
    """With the figures of indexers, whose choice is measured there."""
    ours = model(generation, **SHORTER.get(generation, {}))
    with reads() as found:
        figures = ours(ids(), labels=ids(), num_items_in_batch=1, skip_logits=True).indexer_figures
    assert found == []
    assert (figures is not None) == (generation in SHORTER)


@every_generation
def test_classifiers(way, generation):
    for kind in (FathomForSequenceClassification, FathomForTokenClassification):
        ours = kind(config(generation, num_labels=3)).train()
        labels = ids(length=1)[:, 0] % 3 if kind is FathomForSequenceClassification else ids() % 3
        mask = left_padded(LENGTH)
        with reads() as found:
            ours(ids(), attention_mask=mask, labels=labels)
        assert found == []


@torch.no_grad()
@every_generation
def test_what_is_done_to_caches(way, generation):
    """Beams, rows that come and go, refused drafts."""
    ours = model(generation)
    cache, other = (
        ours(ids(), attention_mask=left_padded(LENGTH), cache=DynamicCache(), use_cache=True).cache for _ in "12"
    )
    order = torch.arange(1, -1, -1)
    with reads() as found:
        cache.reorder_cache(order)
        cache.batch_append(other)
        cache.batch_select_indices(torch.arange(2, 4))
        cache.batch_repeat_interleave(2)
        cache.activate_past_recording()
        ours(ids(4, 6), cache=cache)
        for layer in cache.layers:
            layer.hide(torch.arange(24).view(4, 6) % 6 > 3)
        cache.crop(-2)
        ours(ids(4, 3), cache=cache)
    assert found == []
    assert cache.get_seq_length() == LENGTH + 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_generation
def test_the_nano_preset_at_its_own_proportions(generation, dtype):
    """A prompt longer than all windows and choices, steps, and a training forward under autocast."""
    with fake_cuda():
        ours = FathomForCausalLM._from_config(FathomConfig.preset(generation, size="nano"), dtype=dtype).eval()
        text = torch.zeros(2, 700, dtype=torch.long)
        with reads() as found:
            with torch.no_grad():
                cache = ours(text, use_cache=True).cache
                for _ in range(3):
                    ours(text[:, :1], cache=cache)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                ours.train()(text, labels=text, skip_logits=True)
        assert found == []


def test_what_waits_is_found(way):
    """The harness itself: everything that was, or could be, in a forward."""
    numbers = torch.arange(4.0)
    asks = {
        "item": lambda: numbers.sum().item(),
        "bool": lambda: bool(numbers.any()),
        "list": lambda: numbers.tolist(),
        "nonzero": lambda: numbers.nonzero(),
        "mask": lambda: numbers[numbers > 1],
        "written under a mask": lambda: numbers.__setitem__(numbers > 1, numbers[:2]),
        "unique": lambda: numbers.unique(),
        "bincount": lambda: numbers.long().bincount(),
        "equal": lambda: torch.equal(numbers, numbers + 1),
    }
    if way == "fake CUDA":
        asks |= {
            "a list as a tensor": lambda: torch.tensor([1, 2]),
            "a list as an index": lambda: numbers[[0, 2]],
            "to the host": lambda: numbers.cpu(),
        }
    for name, ask in asks.items():
        with reads() as found, suppress(RuntimeError):  # fake tensors have no numbers
            ask()
        assert found, name
    if way == "fake CUDA":
        with pytest.raises(RuntimeError):
            numbers + torch.ones(4, device="cpu")


@pytest.mark.parametrize("kind", ["plain", "packed", "padded", "padded between", "padded behind"])
@every_generation
def test_losses_and_gradients_are_the_same_unread(generation, kind, monkeypatch):
    """Long texts, in parts: nothing of what a CPU finds out by reading changes a number."""
    for module in (compressed_attention, sparse_attention):
        monkeypatch.setattr(module, "QUERIES_AT_ONCE", 16)
    mask = left_padded(LENGTH)
    if kind == "padded between":
        mask[0, 20:31] = 0
    if kind == "padded behind":
        mask = mask.flip(1)
    inputs = {"position_ids": documents()} if kind == "packed" else {} if kind == "plain" else {"attention_mask": mask}
    labels = ids() if kind in ("plain", "packed") else ids().masked_fill(mask == 0, -100)
    results = []
    for unread in (False, True):
        if unread:
            forbid_reading(monkeypatch)
        # The indexers' own loss would have all scores at once, and no parts.
        for coefficient in (0.0, 1.0):
            ours = model(generation, indexer_loss_coef=coefficient, **SHORTER.get(generation, {})).train()
            output = ours(ids(), labels=labels, **inputs)
            output.loss.backward()
            gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
            results.append((output.loss, output.logits * (labels != -100).unsqueeze(-1), gradients))
    for expected, got in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
        assert any(gradient.any() for gradient in got[2].values())
    assert host.READABLE == ()

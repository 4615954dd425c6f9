"""`device_map="auto"`: with weights on disk until they are used, the same numbers, in training as in generation."""

from pathlib import Path

import pytest
import torch
from generations import GENERATIONS, config, model, tokens

from fathom import FathomForCausalLM, FathomForSequenceClassification

pytestmark = pytest.mark.usefixtures("long_texts")


def dispatched(folder: Path, memory: float, model_class: type = FathomForCausalLM, **settings):
    """Loaded with at most so many bytes in memory; the other weights stay on disk."""
    memory_map = {"device_map": "auto", "max_memory": {"cpu": int(memory)}, "offload_folder": str(folder / "offload")}
    return model_class.from_pretrained(folder, **memory_map, **settings)


def size(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.parametrize("share", [0.1, 0.9], ids=["all on disk", "some on disk"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_losses_and_texts(tmp_path, generation, tied, share):
    ours, ids = model(generation, tie_word_embeddings=tied), tokens()
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    ours.save_pretrained(tmp_path)
    loaded = dispatched(tmp_path, share * size(ours))
    on_disk = [parameter.is_meta for parameter in loaded.parameters()]
    assert all(on_disk) if share < 0.5 else 0 < sum(on_disk) < len(on_disk)

    with torch.no_grad():
        expected, got = (each(ids, attention_mask=mask, labels=ids) for each in (ours, loaded))
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.loss, expected.loss)
    assert (got.mtp_loss is None) == (expected.mtp_loss is None)
    if got.mtp_loss is not None:
        # By all logits at once: a head that is offloaded can only be called, not multiplied by in chunks.
        torch.testing.assert_close(got.mtp_loss, expected.mtp_loss, rtol=1e-6, atol=0)
    assert (got.indexer_figures is None) == (generation not in ("v3.2", "v4"))
    torch.testing.assert_close(got.indexer_figures, expected.indexer_figures, rtol=0, atol=0)
    for settings in ({}, {"num_beams": 2}, {"use_cache": False}):
        settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, **settings}
        expected, got = (each.generate(ids, attention_mask=mask, **settings) for each in (ours, loaded))
        assert torch.equal(got, expected), settings


@pytest.mark.parametrize("generation", [generation for generation in GENERATIONS if generation != "v4"])
def test_static_cache(tmp_path, generation):
    ours, ids = model(generation), tokens()
    ours.save_pretrained(tmp_path)
    settings = {"cache_implementation": "static", "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    got = dispatched(tmp_path, 0.9 * size(ours)).generate(ids, disable_compile=True, **settings)
    assert torch.equal(got, ours.generate(ids, disable_compile=True, **settings))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_offloaded_buffers_and_bf16(tmp_path, generation):
    """Frequencies and routing biases stay in fp32, tables of experts whole, also where buffers are put away."""
    ours, ids = model(generation), tokens()
    ours.save_pretrained(tmp_path)
    plain = FathomForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loaded = dispatched(tmp_path, 0.4 * size(ours), offload_buffers=True, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_classifier(tmp_path, generation):
    torch.manual_seed(0)
    ours, ids = FathomForSequenceClassification(config(generation, num_labels=3)).eval(), tokens()
    ours.save_pretrained(tmp_path)
    loaded = dispatched(tmp_path, 0.9 * size(ours), FathomForSequenceClassification)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)

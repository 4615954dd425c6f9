"""Prompts of which the last token's logits alone are wanted: the last layer reads it, and remembers the others."""

import pytest
import torch
from transformers import StaticCache

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import fused, last_token, memory
from fathom.modeling.decoder_layer import FathomDecoderLayer

LAYERS = 3
KINDS = {
    "classic": {},
    "moe": {},
    "v2": {},
    "v3": {"num_nextn_predict_layers": 1},
    "v3.2": {"index_topk": 20},
    "v3.2-dense": {"index_topk": 20, "index_dense": True},
    "v4-swa": {"token_mixers": ["csa", "hca", "swa"], "num_hash_layers": 0},
    "v4-csa": {"token_mixers": ["swa", "hca", "csa"], "channel_mixers": ["moe", "moe", "hash"]},
    "v4-hca": {"token_mixers": ["swa", "csa", "hca"], "num_hash_layers": 0},
}


def model(kind: str = "v3", attn_implementation: str = "sdpa", **settings) -> FathomForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": 97}
    how = {"num_nextn_predict_layers": 0, "index_topk": 8, "initializer_range": 0.15, "attn_implementation": None}
    overrides = {**sizes, **how, **KINDS[kind], **settings, "attn_implementation": attn_implementation}
    return FathomForCausalLM(FathomConfig.preset(kind.split("-")[0], **overrides)).eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture
def lengths(monkeypatch) -> list[int]:
    """Number of tokens that each layer is called with."""
    found: list[int] = []
    forward = FathomDecoderLayer.forward

    def spy(self, hidden_states, *args, **kwargs):
        found.append(hidden_states.shape[1])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(FathomDecoderLayer, "forward", spy)
    monkeypatch.setattr(last_token, "FEWEST_TOKENS", 16)
    return found


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("padding", [0, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_all_layers_with_all_tokens(
    kind, padding, native, attn_implementation, lengths, monkeypatch
):
    """Those of the prompt, of a second part of it, and of the token behind it."""
    if not native:
        monkeypatch.setattr(fused, "kernels_of", lambda *_: None)
    reader, ids = model(kind, attn_implementation), tokens(71)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    caches: list = [None, None]
    for start, end in ((0, 40), (40, 70), (70, 71)):
        logits = []
        for index, keep in enumerate((0, 1)):
            output = reader(
                ids[:, start:end],
                attention_mask=mask[:, :end] if padding else None,
                cache=caches[index],
                use_cache=True,
                logits_to_keep=keep,
            )
            caches[index] = output.cache
            logits.append(output.logits[:, -1])
        torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
    expected = [[40] * 3, [40, 40, 1], [30] * 3, [30, 30, 1], [1] * 6]
    assert lengths == [length for part in expected for length in part]
    assert caches[0].nbytes() == caches[1].nbytes()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_remembered_can_be_forgotten(kind, lengths):
    """As drafts are, token by token, also those of the prompt."""
    reader, ids = model(kind), tokens(50)
    logits = []
    for keep in (0, 1):
        cache = reader(ids[:, :1], use_cache=True).cache
        cache.activate_past_recording()
        reader(ids[:, 1:], cache=cache, logits_to_keep=keep)
        cache.crop(-7)
        logits.append(reader(ids[:, 43:], cache=cache).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-4)
    assert lengths.count(1) == LAYERS * 2 + 1


@torch.no_grad()
def test_the_cache_has_room_for_the_last_token():
    """From the beginning: it does not grow for it, which would take half as much again."""
    reader, ids = model("v3"), tokens(300)
    whole, last = (reader(ids, use_cache=True, logits_to_keep=keep).cache for keep in (0, 1))
    assert last.allocated_nbytes() <= whole.allocated_nbytes()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, lengths):
    """Greedily and by beams, from ids and from embeddings, the same tokens as where somebody listens."""
    reader, ids = model(kind), tokens(40)
    given = [{"input_ids": ids}]
    if not reader.model.routes_by_id:
        given.append({"inputs_embeds": reader.get_input_embeddings()(ids)})
    for inputs in given:
        for how in ({}, {"num_beams": 2}):
            settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how}
            lengths.clear()
            found = reader.generate(**inputs, **settings)
            assert lengths[:LAYERS] == [40, 40, 1]
            hook = reader.model.norm.register_forward_hook(lambda *_: None)
            lengths.clear()
            assert torch.equal(reader.generate(**inputs, **settings), found)
            assert lengths[:LAYERS] == [40] * 3
            hook.remove()


def listen(reader: FathomForCausalLM, name: str) -> None:
    reader.get_submodule(name).register_forward_hook(lambda *_: None)


ALL = [40] * LAYERS
FULL = {
    "all logits": (lambda reader: {"logits_to_keep": 0}, ALL),
    "two logits": (lambda reader: {"logits_to_keep": 2}, ALL),
    "chosen logits": (lambda reader: {"logits_to_keep": torch.tensor([39])}, ALL),
    "labels": (lambda reader: {"labels": tokens(40), "skip_logits": True}, [*ALL, 40]),  # an MTP layer too
    "no cache": (lambda reader: {"use_cache": False}, ALL),
    "recorded states": (lambda reader: {"output_hidden_states": True}, ALL),
    "recorded routing": (lambda reader: {"output_router_logits": True}, ALL),
    "a hook in the last layer": (lambda reader: listen(reader, "model.layers.2.mlp"), ALL),
    "a hook behind the layers": (lambda reader: listen(reader, "model.norm"), ALL),
    "a hook on the model": (lambda reader: listen(reader, "model"), ALL),
    "training": (lambda reader: reader.train() and None, ALL),
    "a cache of fixed length": (lambda reader: {"cache": StaticCache(reader.config, 64)}, ALL),
    "a hook in another layer": (lambda reader: listen(reader, "model.layers.1.mlp"), [40, 40, 1]),
    "nothing": (lambda reader: None, [40, 40, 1]),
}


@torch.no_grad()
@pytest.mark.parametrize("why", FULL)
def test_when_all_tokens_are_read(why, lengths):
    reader = model("v3")
    logits = reader(tokens(40)).logits[:, -1:]
    lengths.clear()
    prepare, expected = FULL[why]
    settings = {"use_cache": True, "logits_to_keep": 1, **(prepare(reader) or {})}
    output = reader(tokens(40), **settings)
    assert lengths == expected
    if expected == [40, 40, 1]:
        assert output.expert_counts.sum(dim=1).tolist() == [2 * 40 * 4, 2 * 4]
    if why != "labels":
        torch.testing.assert_close(output.logits[:, -1:], logits, atol=2e-5, rtol=1e-4)


def test_a_gradient_is_everyones(lengths):
    reader = model("v3")
    reader(tokens(40), use_cache=True, logits_to_keep=1).logits.sum().backward()
    assert lengths == ALL
    assert reader.model.layers[2].mlp.gate.weight.grad is not None


@torch.no_grad()
def test_recording_once_does_not_listen_for_ever(lengths):
    """transformers leaves its hooks in place."""
    reader = model("v3")
    reader(tokens(40), output_hidden_states=True)
    lengths.clear()
    reader(tokens(40), use_cache=True, logits_to_keep=1)
    assert lengths == [40, 40, 1]


@torch.no_grad()
def test_short_texts_are_read_at_once(lengths):
    model("v3")(tokens(15), use_cache=True, logits_to_keep=1)
    assert lengths == [15] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    "environment", [{}, {"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}]
)
@pytest.mark.parametrize("length", [64, 65])
def test_freed_memory_is_kept_unless_the_environment_says_how_much(environment, length, monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_glibc", lambda name: lambda *settings: calls.append((name, *settings)))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    memory._keep_freed_memory.cache_clear()
    try:
        for _ in range(2):
            model("v3")(tokens(length))
    finally:
        memory._keep_freed_memory.cache_clear()
    kept = [("mallopt", -3, 2**25), ("mallopt", -1, 2**28)]  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of glibc's malloc.h
    assert calls == (kept if length > 64 and not environment else [])

"""Long texts without gradients: some heads and some tokens at a time, with the same results in less memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import attention, decoder_layer, memory
from fathom.modeling.attention import MultiHeadLatentAttention
from fathom.training.benchmark.contenders import held_bytes

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}


def model(generation: str = "v3", **settings) -> FathomForCausalLM:
    torch.manual_seed(0)
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3}
    return FathomForCausalLM(FathomConfig.preset(generation, **{**SIZES, **experts, **settings})).eval()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Heads whose queries are there at a time, by call of `attend_expanded`."""
    found, attend = [], MultiHeadLatentAttention.attend_expanded

    def spy(self, query, *others, **kwargs):
        found.append(query.shape[1])
        return attend(self, query, *others, **kwargs)

    monkeypatch.setattr(MultiHeadLatentAttention, "attend_expanded", spy)
    monkeypatch.setattr(attention, "TOKENS_OF_ALL_HEADS", 20)
    monkeypatch.setattr(decoder_layer, "decode_layer", lambda *_: None)  # which reads shorter ones natively
    return found


@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("v_head_dim", [32, 64])
@pytest.mark.parametrize(("tokens", "heads"), [(20, [4]), (21, [3, 1]), (40, [2, 2]), (200, [1] * 4)])
def test_logits_are_those_of_all_heads_at_once(tokens, heads, v_head_dim, q_lora_rank, counts, monkeypatch) -> None:
    reader = model(q_lora_rank=q_lora_rank, v_head_dim=v_head_dim)
    ids = torch.randint(3, 97, (2, tokens + 1))
    with torch.no_grad():
        output = reader(ids[:, :tokens], use_cache=True)
        assert counts == 2 * heads
        following = reader(ids[:, tokens:], cache=output.cache).logits
        monkeypatch.setattr(attention, "TOKENS_OF_ALL_HEADS", 1000)
        expected = reader(ids).logits
    torch.testing.assert_close(torch.cat((output.logits, following), dim=1), expected, atol=1e-5, rtol=1e-4)


def test_what_reads_all_heads_at_once(counts) -> None:
    """Gradients, masks, and maps that do more than multiply."""
    ids = torch.randint(3, 97, (2, 40))
    reader = model()
    reader(ids)
    with torch.no_grad():
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        reader(ids, attention_mask=mask)
        hooks = [layer.self_attn.q_b_proj.register_forward_hook(lambda *_: None) for layer in reader.model.layers]
        reader(ids)
        assert set(counts) == {4}
        for hook in hooks:
            hook.remove()
        counts.clear()
        reader(ids)
        assert set(counts) == {2}


@pytest.mark.parametrize("long", [False, True])
def test_memory_is_given_back_of_long_texts_alone(long, counts, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(memory, "_glibc", lambda name: calls.append)
    monkeypatch.setattr(memory, "LONG_TEXT", 39 if long else 40)
    reader = model()
    with torch.no_grad():
        reader(torch.randint(3, 97, (1, 40)))
    assert bool(calls) == long


@torch.no_grad()
@pytest.mark.parametrize("generation", ["moe", "v2", "v3", "v3.2", "v4"])
@pytest.mark.parametrize("hooked", [False, True])
def test_logits_are_those_of_all_tokens_at_once(generation, hooked, monkeypatch) -> None:
    """Also the statistics, the recorded states, and what a hook on the shared experts hears."""
    reader, heard = model(generation), []
    ids = torch.randint(3, 97, (2, 210))
    if hooked:
        for layer in reader.model.layers:
            if getattr(layer.mlp, "shared_experts", None) is not None:
                layer.mlp.shared_experts.register_forward_hook(lambda module, inputs, output: heard.append(output))
    how = {"output_hidden_states": True, "output_router_logits": True, "use_cache": True}
    expected = reader(ids[:, :200], **how)
    following = reader(ids[:, 200:], cache=expected.cache).logits
    first, heard[:] = heard[:], []
    monkeypatch.setattr(memory, "TOKENS_AT_ONCE", 32)
    found = reader(ids[:, :200], **how)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(found.logits, expected.logits, **close)
    torch.testing.assert_close(found.hidden_states, expected.hidden_states, **close)
    torch.testing.assert_close(found.router_logits, expected.router_logits, **close)
    assert torch.equal(found.expert_counts, expected.expert_counts)
    assert bool(heard) == hooked
    for one, other in zip(heard, first, strict=False):
        torch.testing.assert_close(one, other, **close)
    torch.testing.assert_close(reader(ids[:, 200:], cache=found.cache).logits, following, **close)


def test_tokens_are_treated_in_parts(monkeypatch) -> None:
    """Of any dimension and into a given tensor; all at once where a gradient is asked for."""
    monkeypatch.setattr(memory, "TOKENS_AT_ONCE", 8)
    lengths: list[int] = []

    def double(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        lengths.append(x.shape[1])
        return 2 * x

    x = torch.randn(3, 20, 5, 4)
    with torch.no_grad():
        assert torch.equal(memory.in_parts(double, x, dim=1), 2 * x)
        assert lengths == [8, 8, 4]
        kept = x.clone()
        assert memory.in_parts(double, kept, x, dim=1, into=kept) is kept
        assert torch.equal(kept, 2 * x)
    lengths.clear()
    assert torch.equal(memory.in_parts(double, x, dim=1), 2 * x)
    assert lengths == [20]


class LiveBytes(TorchDispatchMode):
    """The most bytes that new tensors hold at a time."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.held: dict[int, int] = {each.untyped_storage().data_ptr(): 0 for each in module.parameters()}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for each in tree_leaves(output):
            if isinstance(each, torch.Tensor) and (storage := each.untyped_storage()).data_ptr() not in self.held:
                self.held[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(storage, self.held.pop, storage.data_ptr(), None)
        self.most = max(self.most, sum(self.held.values()))
        return output


@torch.no_grad()
@pytest.mark.parametrize(("generation", "most", "cache"), [("v3", 5.0, 1.9), ("v4", 17.0, 0.3)])
def test_what_is_held_of_a_long_text(generation, most, cache, monkeypatch) -> None:
    """Beside the cache, in tensors of all tokens' hidden states: 10 and 34 where all tokens are treated at once.

    V4's stream is four of them. Its cache has the window, and not the text that the window is a part of.
    """
    monkeypatch.setattr(memory, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(attention, "TOKENS_OF_ALL_HEADS", 64)
    reader = model(generation, hidden_size=256, num_hidden_layers=6)
    ids = torch.randint(3, 97, (1, 2048))
    with LiveBytes(reader) as live:
        output = reader(ids, use_cache=True, logits_to_keep=1)
    hidden_states, cached = ids.numel() * 256 * 4, held_bytes(output.cache)
    assert live.most - cached < most * hidden_states
    assert cached < cache * hidden_states

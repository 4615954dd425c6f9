"""Long texts without gradients: some heads at a time, and freed memory given back, with the same results."""

import pytest
import torch

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling import attention, memory
from fathom.modeling.attention import MultiHeadLatentAttention

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}


def model(generation: str = "v3", **settings) -> FathomForCausalLM:
    torch.manual_seed(0)
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 3}
    return FathomForCausalLM(FathomConfig.preset(generation, **SIZES, **experts, **settings)).eval()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Heads whose queries are there at a time, by call of `attend_expanded`."""
    found, attend = [], MultiHeadLatentAttention.attend_expanded

    def spy(self, query, *others, **kwargs):
        found.append(query.shape[1])
        return attend(self, query, *others, **kwargs)

    monkeypatch.setattr(MultiHeadLatentAttention, "attend_expanded", spy)
    monkeypatch.setattr(attention, "TOKENS_OF_ALL_HEADS", 20)
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
        following = reader(ids[:, tokens:], past_key_values=output.past_key_values).logits
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
    monkeypatch.setattr(memory, "_trim", lambda: calls.append)
    monkeypatch.setattr(memory, "LONG_TEXT", 39 if long else 40)
    reader = model()
    with torch.no_grad():
        reader(torch.randint(3, 97, (1, 40)))
    assert bool(calls) == long

"""Fathom's V2 equals stock transformers' `DeepseekV2ForCausalLM` on the same weights."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from fathom import FathomConfig, FathomForCausalLM

TOLERANCE = 1e-4

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.707,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0}
VARIANTS = {
    "greedy": {},
    "no q_lora": {"q_lora_rank": None, "routed_scaling_factor": 1.7},
    "groups": GROUPS,
    # A group of one expert: allowed, because a group counts by its best expert alone.
    "groups of one": {**GROUPS, "n_group": 12, "topk_group": 5},
    "yarn": {"rope_parameters": YARN, **GROUPS},
    "equal mscales": {"rope_parameters": {**YARN, "mscale_all_dim": 0.707}, "num_hidden_layers": 2},
    "all dense": {"first_k_dense_replace": 3},
    "all moe": {"first_k_dense_replace": 0, "n_shared_experts": 1, "attention_bias": True},
}


def stock_model(variant: str, attn_implementation: str = "sdpa") -> DeepseekV2ForCausalLM:
    torch.manual_seed(7)
    config = DeepseekV2Config(**{**SHAPE, **VARIANTS[variant]}, attn_implementation=attn_implementation)
    return DeepseekV2ForCausalLM(config).eval()


def pair(variant: str, attn_implementation: str = "sdpa") -> tuple[DeepseekV2ForCausalLM, FathomForCausalLM]:
    """Stock's model with random weights, and ours with a copy of them and the config read from stock's."""
    stock = stock_model(variant, attn_implementation)
    config = FathomConfig.from_dict(stock.config.to_dict(), attn_implementation=attn_implementation)
    ours = FathomForCausalLM(config).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_without_cache(variant, attn_implementation):
    stock, ours = pair(variant, attn_implementation)
    tokens = ids(2, 90)
    torch.testing.assert_close(
        ours(tokens, use_cache=False).logits, stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[50] + [1] * 20, [30, 17, 1, 22], [1] * 70], ids=["decode", "chunks", "tokenwise"])
@pytest.mark.parametrize("variant", ["greedy", "no q_lora", "yarn"])
def test_logits_with_cache(variant, chunks):
    stock, ours = pair(variant)
    tokens = ids(2, 70)
    cache, logits = None, []
    for piece in tokens.split(chunks, dim=1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["groups", "yarn"])
def test_left_padding(variant):
    stock, ours = pair(variant)
    tokens = ids(3, 40)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 31)):
        mask[row, :padding] = 0
    mine, theirs = ours(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits
    torch.testing.assert_close(mine[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("variant", ["no q_lora", "yarn"])
def test_greedy_generation(variant, options):
    stock, ours = pair(variant)
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    settings = {"max_new_tokens": 25, "do_sample": False, "attention_mask": mask, "eos_token_id": None, **options}
    settings["pad_token_id"] = 2
    assert torch.equal(ours.generate(tokens, **settings), stock.generate(tokens, **settings))


def test_gradients_equal_stock():
    stock, ours = pair("groups")
    tokens = ids(2, 30)
    for model in (stock, ours):
        model(tokens, labels=tokens).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["groups", "no q_lora"])
def test_files_of_either_are_read_by_the_other(variant, tmp_path):
    stock, ours = pair(variant)
    expected, tokens = stock(ids(2, 30)).logits, ids(2, 30)
    stock.save_pretrained(tmp_path / "stock")
    read, loading = FathomForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert read.config.generation == "v2"
    torch.testing.assert_close(read(tokens).logits, expected, atol=TOLERANCE, rtol=0)

    ours.save_pretrained(tmp_path / "ours")
    reread, loading = DeepseekV2ForCausalLM.from_pretrained(
        tmp_path / "ours", config=stock.config, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(reread(tokens).logits, expected, atol=1e-6, rtol=0)

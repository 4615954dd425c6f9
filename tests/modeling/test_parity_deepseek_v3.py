"""Fathom's V3 equals stock transformers' `DeepseekV3ForCausalLM` on the same weights."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from fathom import FathomConfig, FathomForCausalLM

TOLERANCE = 1e-4

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "max_position_embeddings": 256,
    "routed_scaling_factor": 2.5,
    "initializer_range": 0.2,
    "pad_token_id": 2,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
}
VARIANTS = {
    "plain": {},
    "no q_lora": {"q_lora_rank": None},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups of too few experts": {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 8},
    "yarn": {"rope_parameters": YARN},
    "halves": {"rope_interleave": False},
    "no renormalisation": {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "wide values": {"v_head_dim": 32, "attention_bias": True},
}


def pair(variant: str, attn_implementation: str = "sdpa") -> tuple[DeepseekV3ForCausalLM, FathomForCausalLM]:
    """Stock's model with random weights and routing biases, and ours with a copy of them."""
    overrides = {**SHAPE, **VARIANTS[variant]}
    torch.manual_seed(7)
    stock = DeepseekV3ForCausalLM(DeepseekV3Config(**overrides, attn_implementation=attn_implementation)).eval()
    for name, buffer in stock.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    ours = FathomForCausalLM(
        FathomConfig(**overrides, num_nextn_predict_layers=0, attn_implementation=attn_implementation)
    ).eval()
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
@pytest.mark.parametrize("variant", ["plain", "no q_lora", "groups", "yarn"])
def test_logits_with_cache(variant, chunks):
    """Whatever the chunks, cached logits are those of one full stock forward (which shares no cache code)."""
    stock, ours = pair(variant)
    tokens = ids(2, 70)
    cache, logits = None, []
    for piece in tokens.split(chunks, dim=1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "groups", "yarn"])
def test_left_padding(variant):
    stock, ours = pair(variant)
    tokens = ids(3, 40)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 31)):
        mask[row, :padding] = 0
    tokens = tokens.masked_fill(mask == 0, SHAPE["pad_token_id"])
    mine, theirs = ours(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits
    torch.testing.assert_close(mine[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)
    # And the padded row equals the same row alone, its positions counted from its first token.
    alone = ours(tokens[1:2, 7:], position_ids=torch.arange(7, 40)[None]).logits
    torch.testing.assert_close(mine[1:2, 7:], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("variant", ["plain", "yarn"])
def test_greedy_generation(variant, options):
    stock, ours = pair(variant)
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    settings = {"max_new_tokens": 25, "do_sample": False, "attention_mask": mask, "eos_token_id": None, **options}
    if "cache_implementation" in options:
        settings["disable_compile"] = True
    assert torch.equal(ours.generate(tokens, **settings), stock.generate(tokens, **settings))


@torch.no_grad()
@pytest.mark.parametrize("experts_implementation", ["eager", "sorted_mm", "grouped_mm"])
def test_expert_implementations_agree(experts_implementation):
    stock, ours = pair("plain")
    ours.set_experts_implementation(experts_implementation)
    stock.set_experts_implementation("eager")
    tokens = ids(2, 30)
    torch.testing.assert_close(ours(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)


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


def test_stock_reads_our_files(tmp_path):
    """Tensor names on disk are the official ones: stock reads a folder of ours once its config says deepseek_v3."""
    stock, ours = pair("groups")
    ours.save_pretrained(tmp_path)
    reread = DeepseekV3ForCausalLM.from_pretrained(tmp_path, config=stock.config).eval()
    tokens = ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(reread(tokens).logits, stock(tokens).logits, atol=1e-6, rtol=0)


def test_we_read_stock_files(tmp_path):
    stock, ours = pair("groups")
    stock.save_pretrained(tmp_path)
    reread = FathomForCausalLM.from_pretrained(tmp_path, config=ours.config).eval()
    tokens = ids(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(reread(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)

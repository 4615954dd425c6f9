"""Fathom's V3.2 equals stock transformers' `DeepseekV32ForCausalLM` on the same weights.

Stock breaks ties between scores by chance, and where two scores are equal but for rounding any two computations may
choose differently. So no score may come near the border of a choice: 32 indexer heads rule out ties at 0, and the seed
is one with which the rest stays apart (`test_no_score_is_near_the_border`).
"""

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from fathom import FathomConfig, FathomForCausalLM
from fathom.modeling.sparse_attention import LightningIndexer

TOLERANCE = 1e-4
LENGTH = 70

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 24,
    "q_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 16,
    "max_position_embeddings": 256,
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
    "all keys": {"index_topk": LENGTH},
    "more than all": {"index_topk": 1000},
    "16 keys": {},
    "one key": {"index_topk": 1},
    "one key left out": {"index_topk": LENGTH - 1},
    "yarn": {"rope_parameters": YARN},
    "groups": {"n_group": 4, "topk_group": 2, "index_topk": 24},
    "wholly rotated heads": {"index_head_dim": 8, "index_n_heads": 64},
    "kinds of networks": {"mlp_layer_types": ["sparse", "dense", "sparse"]},
}


def pair(variant: str, attn_implementation: str = "sdpa") -> tuple[DeepseekV32ForCausalLM, FathomForCausalLM]:
    """Stock's model with random weights, biases and norms; ours has a copy of them and reads stock's config."""
    torch.manual_seed(15)
    config = DeepseekV32Config(**{**SHAPE, **VARIANTS[variant]}, attn_implementation=attn_implementation)
    stock = DeepseekV32ForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in stock.state_dict().items():
            if name.endswith(("e_score_correction_bias", "k_norm.bias", "norm.weight")):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    ours = FathomForCausalLM(
        FathomConfig.from_dict(stock.config.to_dict(), attn_implementation=attn_implementation)
    ).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["16 keys", "yarn", "groups", "one key", "one key left out"])
def test_no_score_is_near_the_border(variant, monkeypatch):
    """The last key chosen and the first left out differ by far more than rounding, for every query of every layer."""
    _, ours = pair(variant)
    gaps, scores_of = [], LightningIndexer.scores

    def watched(indexer, *args):
        scores = scores_of(indexer, *args)
        causal = torch.ones_like(scores, dtype=torch.bool).tril()
        best = scores.masked_fill(~causal, float("-inf")).topk(ours.config.index_topk + 1).values
        gaps.append((best[..., -2] - best[..., -1])[:, ours.config.index_topk :].min().item())
        return scores

    monkeypatch.setattr(LightningIndexer, "scores", watched)
    ours(ids(2, LENGTH), use_cache=False)
    assert len(gaps) == ours.config.num_hidden_layers
    assert min(gaps) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_without_cache(variant, attn_implementation):
    stock, ours = pair(variant, attn_implementation)
    tokens = ids(2, LENGTH)
    torch.testing.assert_close(
        ours(tokens, use_cache=False).logits, stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunks", [[50] + [1] * 20, [30, 17, 1, 22], [1] * 70], ids=["decode", "chunks", "tokenwise"])
@pytest.mark.parametrize("variant", ["all keys", "16 keys", "yarn"])
def test_logits_with_cache(variant, chunks, attn_implementation):
    """Whatever the chunks, cached logits are those of one full stock forward (which shares no cache code)."""
    stock, ours = pair(variant, attn_implementation)
    tokens = ids(2, LENGTH)
    cache, logits = None, []
    for piece in tokens.split(chunks, dim=1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["all keys", "16 keys", "yarn"])
def test_left_padding(variant):
    stock, ours = pair(variant)
    tokens = ids(3, 40)
    mask = torch.ones_like(tokens)
    for row, padding in enumerate((0, 7, 31)):
        mask[row, :padding] = 0
    tokens = tokens.masked_fill(mask == 0, SHAPE["pad_token_id"])
    mine, theirs = ours(tokens, attention_mask=mask).logits, stock(tokens, attention_mask=mask).logits
    torch.testing.assert_close(mine[mask == 1], theirs[mask == 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        *(
            (variant, options)
            for variant in ("16 keys", "yarn")
            for options in ({}, {"cache_implementation": "static"})
        ),
        ("all keys", {"num_beams": 3}),  # with fewer, some beam runs into a tie, and stock's cache into another choice
    ],
    ids=str,
)
def test_greedy_generation(variant, options):
    stock, ours = pair(variant)
    tokens = ids(2, 20)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    settings = {"max_new_tokens": 25, "do_sample": False, "attention_mask": mask, "eos_token_id": None, **options}
    if "cache_implementation" in options:
        settings["disable_compile"] = True
    assert torch.equal(ours.generate(tokens, **settings), stock.generate(tokens, **settings))


@pytest.mark.parametrize("variant", ["all keys", "16 keys"])
def test_gradients_equal_stock(variant):
    stock, ours = pair(variant)
    tokens = ids(2, 30)
    for model in (stock, ours):
        model(tokens, labels=tokens).loss.backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".indexer." in name:
            # No term of the loss is theirs outside of training; their keys stand in one tensor with MLA's in a cache.
            assert parameter.grad is None or not parameter.grad.any()
            assert theirs[name].grad is None
            continue
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["16 keys", "kinds of networks"])
def test_files_of_either_are_read_by_the_other(variant, tmp_path):
    """The tensor names on disk are the official ones."""
    stock, ours = pair(variant)
    tokens = ids(2, 30)
    expected = stock(tokens).logits
    stock.save_pretrained(tmp_path / "stock")
    read, loading = FathomForCausalLM.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert read.config.generation == "v3.2"
    torch.testing.assert_close(read(tokens).logits, expected, atol=TOLERANCE, rtol=0)

    ours.save_pretrained(tmp_path / "ours")
    reread, loading = DeepseekV32ForCausalLM.from_pretrained(
        tmp_path / "ours", config=stock.config, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    torch.testing.assert_close(reread(tokens).logits, expected, atol=1e-6, rtol=0)

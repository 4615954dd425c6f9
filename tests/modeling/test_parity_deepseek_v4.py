"""Fathom's V4 equals stock transformers' `DeepseekV4ForCausalLM` on the same weights.

Stock is the oracle where it is right: unpadded rows, one document, and enough indexer heads that no two entries have
the same score. What it gets wrong is tested in `test_compressed_attention`.
"""

import pytest
import torch
from torch import nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from fathom import FathomConfig, FathomForCausalLM

TOLERANCE = 1e-4
WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 40,
    "o_groups": 2,
    "o_lora_rank": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.5,
    "max_position_embeddings": 256,
    "layer_types": [WINDOW, CSA, HCA, CSA],
    "mlp_layer_types": ["hash_moe", "moe", "hash_moe", "moe"],
    "compress_rates": {CSA: 4, HCA: 16},
    "sliding_window": 11,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 5,
    "initializer_range": 0.2,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 2,
}
YARN = {"type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "all kinds": {},
    "yarn": {"rope_scaling": YARN},
    "windows": {"layer_types": [WINDOW] * 4},
    "csa": {"layer_types": [CSA] * 4, "compress_rates": {CSA: 3, HCA: 8}, "index_topk": 7, "sliding_window": 6},
    "hca": {"layer_types": [HCA] * 4, "compress_rates": {CSA: 4, HCA: 7}, "sliding_window": 3},
    "clamped, two streams": {"swiglu_limit": 0.3, "hc_mult": 2, "hc_sinkhorn_iters": 3},
}


def pair(variant: str, attn_implementation: str = "sdpa") -> tuple[DeepseekV4ForCausalLM, FathomForCausalLM]:
    """Stock's model with random weights, tables and biases, and ours with a copy of them."""
    torch.manual_seed(7)
    stock = DeepseekV4ForCausalLM(DeepseekV4Config(**{**SHAPE, **VARIANTS[variant]})).eval()
    for name, buffer in stock.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
        elif name.endswith("tid2eid"):
            buffer.copy_(torch.rand(len(buffer), 8).argsort(dim=-1)[:, :3])
    for name, parameter in stock.named_parameters():
        if name.rsplit(".", 1)[-1] in ("sinks", "position_bias", "base", "hc_base", "scale", "hc_scale"):
            nn.init.normal_(parameter, std=0.5)
        elif "norm" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.2)
    ours = FathomForCausalLM(FathomConfig.from_dict(stock.config.to_dict())).eval()
    ours.set_attn_implementation(attn_implementation)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 3, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_without_cache(variant, length, attn_implementation):
    stock, ours = pair(variant, attn_implementation)
    tokens = ids(2, length)
    torch.testing.assert_close(
        ours(tokens, use_cache=False).logits, stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "chunks", [[40] + [1] * 45, [30, 17, 1, 1, 36], [1] * 85], ids=["decode", "chunks", "tokenwise"]
)
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["all kinds", "yarn", "csa", "hca"])
def test_logits_with_cache(variant, chunks, attn_implementation):
    """Whatever the chunks, cached logits are those of one full stock forward: 7 windows, 21 blocks, 5 large blocks."""
    stock, ours = pair(variant, attn_implementation)
    tokens = ids(2, 85)
    cache, logits = None, []
    for piece in tokens.split(chunks, dim=1):
        output = ours(piece, cache=cache, use_cache=True)
        cache = output.cache
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), stock(tokens, use_cache=False).logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("all kinds", {}), ("yarn", {}), ("all kinds", {"num_beams": 3}), ("hca", {"num_beams": 3})],
)
def test_generation(variant, options):
    stock, ours = pair(variant)
    tokens = ids(2, 20)
    settings = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, **options}
    assert torch.equal(ours.generate(tokens, **settings), stock.generate(tokens, **settings))


def test_both_models_run_side_by_side():
    """Ours leaves transformers' table of cache layers alone: each model gets its own kind of cache."""
    stock, ours = pair("all kinds")
    tokens = ids(1, 30)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    before = stock.generate(tokens, **settings)
    assert torch.equal(ours.generate(tokens, **settings), before)
    assert torch.equal(stock.generate(tokens, **settings), before)


def test_gradients_equal_stock():
    """Stock computes in one go what we compute with places; the indexers of both get no gradient."""
    stock, ours = pair("yarn")
    tokens = ids(2, 50)
    for model in (stock, ours.train()):
        model.model.config.use_cache = False
        logits = model(tokens).logits
        logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean().neg().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is theirs[name].grad is None, name
            continue
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_hidden_states_equal_stock():
    stock, ours = pair("all kinds", "eager")
    tokens = ids(2, 40)
    theirs = stock(tokens, output_hidden_states=True, output_attentions=True)
    mine = ours(tokens, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    for got, expected in zip(mine.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(mine.attentions[0], theirs.attentions[0], atol=TOLERANCE, rtol=0)
    assert len(mine.attentions) == len(mine.router_logits) == 4


@torch.no_grad()
def test_we_read_stock_files(tmp_path):
    """By stock's own config.json, and by the names in memory."""
    stock, _ = pair("yarn")
    stock.save_pretrained(tmp_path, save_original_format=False)
    reread = FathomForCausalLM.from_pretrained(tmp_path, config=FathomConfig.from_pretrained(tmp_path)).eval()
    tokens = ids(2, 50)
    torch.testing.assert_close(reread(tokens).logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)
    assert reread.state_dict().keys() == stock.state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize("depths", [1, 2])
def test_multi_token_prediction_out_of_stock_layers(depths):
    """Stock has no V4 MTP, but its layers and its collapse make one up (`MTPBlock` of DeepSeek's inference code)."""
    stock, _ = pair("yarn")
    settings = {**stock.config.to_dict(), "num_nextn_predict_layers": depths}
    torch.manual_seed(3)
    ours = FathomForCausalLM(FathomConfig.from_dict(settings)).eval()
    assert all(name.startswith("model.layers.") for name in ours.load_state_dict(stock.state_dict(), strict=False)[0])
    for layer in ours.model.mtp_layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)

    tokens, length = ids(2, 40), 40
    positions = torch.arange(length)[None]
    streams: list[torch.Tensor] = []
    stock.model.hc_head.register_forward_hook(lambda module, inputs, output: streams.append(inputs[0]))
    stock(tokens)
    states, losses = streams[0], []
    embeds = stock.model.embed_tokens(tokens)
    mask = (positions[0, :, None] - positions < 11) & (positions[0, :, None] >= positions)
    mask = torch.zeros(length, length).masked_fill(~mask, float("-inf"))[None, None]
    for depth, layer in enumerate(ours.model.mtp_layers, start=1):
        one = {**SHAPE, "layer_types": [WINDOW], "mlp_layer_types": ["moe"], "num_hidden_layers": 1}
        oracle = DeepseekV4ForCausalLM(DeepseekV4Config(**one)).eval().model
        oracle.layers[0].load_state_dict(layer.state_dict(), strict=False)
        oracle.hc_head.load_state_dict(layer.hc_head.state_dict())
        ahead = torch.cat((embeds[:, depth:], torch.zeros_like(embeds[:, :depth])), dim=1)
        states = layer.e_proj(layer.enorm(ahead))[:, :, None] + layer.h_proj(layer.hnorm(states))
        rotation = {"main": oracle.rotary_emb(embeds, positions, layer_type="main")}
        states = oracle.layers[0](
            states, position_embeddings=rotation, position_ids=positions, attention_mask=mask, input_ids=tokens
        )
        logits = stock.lm_head(layer.shared_head.norm(oracle.hc_head(states)))
        losses.append(
            nn.functional.cross_entropy(logits[:, : -depth - 1].flatten(0, 1), tokens[:, depth + 1 :].flatten())
        )
    outputs = ours(tokens, labels=tokens)
    torch.testing.assert_close(outputs.mtp_loss, torch.stack(losses).mean(), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(outputs.logits, stock(tokens).logits, atol=TOLERANCE, rtol=0)

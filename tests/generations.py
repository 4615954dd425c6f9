"""Every generation at a size that runs in milliseconds, with its windows, blocks and choices inside a short text."""

from pathlib import Path
from typing import Any

import torch

from fathom import FathomConfig, FathomForCausalLM
from fathom.tokenizer import train_tokenizer

GENERATIONS = ["classic", "moe", "v2", "v3", "v3.2", "v4"]
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
# Short texts reach beyond the window and complete blocks, and there is more to choose from than is chosen.
SHORT = {
    "v3.2": {"index_topk": 8, "index_n_heads": 8},
    "v4": {
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "compress_rate_hca": 8,
        "index_topk": 2,
        "index_n_heads": 8,
        "o_lora_rank": 16,
    },
}


def config(generation: str, **overrides: Any) -> FathomConfig:
    return FathomConfig.preset(generation, **{**SHAPE, **SHORT.get(generation, {}), **overrides})


def model(generation: str, seed: int = 0, **overrides: Any) -> FathomForCausalLM:
    """Random weights and random routing biases: a bias of 0 could be forgotten unnoticed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        created = FathomForCausalLM(config(generation, **overrides)).eval()
        for name, buffer in created.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_()
    return created


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(length))


def save_with_tokenizer(folder: Path, generation: str) -> None:
    """A folder as training leaves it, whose model writes printable ASCII: other bytes are no text by themselves."""
    texts = ["def double(x):\n    return 2 * x\n", "the quick brown fox jumps over the lazy dog. ", "0123456789 " * 3]
    tokenizer = train_tokenizer(texts * 4, 288, 256)
    ours = model(generation, vocab_size=len(tokenizer))
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in range(len(tokenizer))]
    ours.generation_config.suppress_tokens = [
        i for i, text in enumerate(pieces) if not (text and text.isascii() and text.isprintable())
    ]
    ours.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

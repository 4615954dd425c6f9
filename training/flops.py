"""Work per token and the machine's speed, so that a run can say which part of the hardware it reaches.

A matrix of n parameters costs 2 n floating-point operations per token forward and twice that backward. Causal
attention over T tokens adds 2 (D_qk + D_v) per head and visible token, T / 2 of them on average.
"""

import time

import torch
from torch import nn

from ..modeling.attention import FathomAttention
from ..modeling.experts import RoutedExperts, TopKRouter


def training_flops_per_token(model: nn.Module, sequence_length: float) -> float:
    """Floating-point operations of one forward and backward pass per token, MTP layers and all heads included.

    Args:
        model: a Fathom model.
        sequence_length: T, tokens per row (a mean where rows differ); documents packed in a row are counted as one, so
            this is an upper bound.
    """
    config = model.config
    matrices = 0
    attention = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear | TopKRouter):
            matrices += module.weight.numel()
        elif isinstance(module, RoutedExperts):
            experts = module.gate_up_proj.numel() + module.down_proj.numel()
            matrices += experts * config.num_experts_per_tok // module.num_experts
        elif isinstance(module, FathomAttention):
            key_width = getattr(module, "qk_head_dim", config.head_dim)
            value_width = getattr(module, "v_head_dim", config.head_dim)
            attention += 2 * module.num_heads * (key_width + value_width) * sequence_length / 2
    # The head runs once more for every MTP depth. A classifier has neither.
    if config.num_nextn_predict_layers:
        matrices += config.num_nextn_predict_layers * model.get_output_embeddings().weight.numel()
    return 3 * (2 * matrices + attention)


def measured_throughput(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a square matrix product, the best of repeated runs."""
    # A generator of its own: a measurement must not move the run's random numbers.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        product = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
        del product
    return 2 * size**3 / best


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 matrix products are at least 1.5 times as fast as fp32 ones here; autocast has costs of its own."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return measured_throughput(torch.bfloat16, device) > 1.5 * measured_throughput(torch.float32, device)

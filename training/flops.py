"""Work per token and the machine's speed, so that a run can say which part of the hardware it reaches.

A matrix of n parameters costs 2 n floating-point operations per token forward and twice that backward. Attention over
T tokens adds 2 (D_qk + D_v) per head and key that a query reads: T / 2 of them on average where it is dense and causal,
fewer where a window or an indexer limits them. An indexer scores every key; the attention that it learns from is not
counted twice. What is frozen has no gradient of its own, and where nothing before it learns it runs forward only.
"""

import time

import torch
from torch import nn

from ..modeling.attention import FathomAttention
from ..modeling.compressed_attention import GroupedLinear
from ..modeling.experts import ExpertRouter, RoutedExperts
from ..modeling.hyper_connections import HyperConnection, StreamCollapse
from ..modeling.indexing import TrainableIndexer
from ..modeling.multi_token_prediction import MultiTokenPredictionLayer
from ..modeling.products import matrix_product


def training_flops_per_token(model: nn.Module, sequence_length: float) -> float:
    """Floating-point operations of one forward and backward pass per token, MTP layers and all heads included.

    Counted is what the model needs: a kernel that computes scores of keys that are then masked does more. Left out is
    what is small: sums over residual streams, norms and activations.

    Args:
        model: a Fathom model.
        sequence_length: T, tokens per row (a mean where rows differ); documents packed in a row are counted as one, so
            this is an upper bound.
    """
    config = model.config
    matrices = 0
    attention = 0.0
    for module in model.modules():
        if isinstance(module, nn.Linear | GroupedLinear | ExpertRouter):
            matrices += module.weight.numel()
        elif isinstance(module, RoutedExperts):
            experts = module.gate_up_proj.numel() + module.down_proj.numel()
            matrices += experts * config.num_experts_per_tok // module.num_experts
        elif isinstance(module, HyperConnection):
            matrices += module.fn.numel()
        elif isinstance(module, StreamCollapse):
            matrices += module.hc_fn.numel()
        elif isinstance(module, MultiTokenPredictionLayer) and module.has_streams:
            matrices += (config.hc_mult - 1) * module.h_proj.weight.numel()  # runs once per stream
        elif isinstance(module, FathomAttention):
            key_width = getattr(module, "qk_head_dim", config.head_dim)
            value_width = getattr(module, "v_head_dim", config.head_dim)
            keys = keys_read(config, config.token_mixer(module.layer_idx), sequence_length)
            attention += 2 * module.num_heads * (key_width + value_width) * keys
    # The head runs once more for every MTP depth. A classifier has neither.
    if config.num_nextn_predict_layers:
        matrices += config.num_nextn_predict_layers * model.get_output_embeddings().weight.numel()
    indexers = [module for module in model.modules() if isinstance(module, TrainableIndexer)]
    candidates = sequence_length / 2 / (config.compress_rate_csa if config.uses("csa") else 1)
    scores = len(indexers) * 2 * config.index_n_heads * config.index_head_dim * candidates
    of_indexers = sum(
        linear.weight.numel() for each in indexers for linear in each.modules() if isinstance(linear, nn.Linear)
    )
    in_indexers = {parameter for each in indexers for parameter in each.parameters()}
    indexers_learn = any(parameter.requires_grad for parameter in in_indexers)
    whole = any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    trains = whole or any(parameter.requires_grad for parameter in model.parameters() if parameter not in in_indexers)
    # Beside adapters or the like, frozen matrices pass gradients on without having one.
    trunk = 2 * (matrices - of_indexers) * (1 + trains + whole) + attention * (3 if trains else 1)
    return trunk + (3 if indexers_learn else 1) * (2 * of_indexers + scores)


def keys_read(config, kind: str, length: float) -> float:
    """Keys and compressed entries that a query reads in a layer of that kind, on average over a text of `length`."""

    def newest_or_best(total: float, limit: int) -> float:
        """Mean of min(x, limit) for x from 0 to `total`."""
        return total / 2 if total <= limit else limit - limit**2 / (2 * total)

    if kind in ("mha", "mla"):
        return length / 2
    past, selects = length, kind in ("dsa", "csa") and not config.index_dense
    if kind in ("csa", "hca"):
        past = length / (config.compress_rate_csa if kind == "csa" else config.compress_rate_hca)
    chosen = newest_or_best(past, config.index_topk) if selects else past / 2
    if kind == "dsa":
        return chosen
    return newest_or_best(length, config.sliding_window) + (0 if kind == "swa" else chosen)


def measured_throughput(dtype: torch.dtype, device: torch.device, size: int = 1024, seconds: float = 0.3) -> float:
    """Floating-point operations per second of a square matrix product, by the library that training calls, at best."""
    # A generator of its own: a measurement must not move the run's random numbers.
    generator = torch.Generator(device).manual_seed(0)
    a, b = torch.randn(2, size, size, device=device, generator=generator).to(dtype)
    multiply, _ = matrix_product(dtype, a, b)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        product = multiply(a, b)
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

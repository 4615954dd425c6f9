"""Linear maps of many tokens in training, by the faster of the two libraries that PyTorch has on a CPU.

PyTorch gives products in fp32 to MKL, which uses AVX-512 on Intel's processors alone. On others that have it, oneDNN,
which does use it there, takes less than half the time for the same sums (Zen 5, one thread: 200 against 90 GFLOP/s).
`torch.compile` calls oneDNN for linear maps by the operation that is called here; nothing else leads there in fp32 but
switches of the whole process, which round to bf16 or tf32.

Shapes: N tokens, i and o widths of input and output.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .fused import PLAIN, is_plain
from .fused import project as project_a_few

# oneDNN prepares every new shape, which takes as long as a product of some hundred tokens.
FEWEST_TOKENS = 256


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's products in fp32 are faster on this processor than those of the library that PyTorch calls."""
    about: dict = getattr(torch.cpu, "get_capabilities", dict)()
    here = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    callable_here = here and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return callable_here and about.get("avx512_f", False) and "Intel" not in about.get("cpu_name", "Intel")


def usable(*tensors: torch.Tensor) -> bool:
    """Whether `times` may be called on such tensors: plain ones in fp32, outside of graphs, and oneDNN not off."""
    return (
        fits_functions()
        and all(type(each) in PLAIN and each.dtype is torch.float32 and each.is_cpu for each in tensors)
        and torch.backends.mkldnn.enabled
        and onednn_is_faster()
    )


def fits_functions() -> bool:
    """Whether functions with a gradient of their own serve: graphs and transforms (`torch.func`) need definitions."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())


def times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a b^T` by oneDNN: fp32 [N, i] and [o, i] -> [N, o]. Both are contiguous, or transposed views of such."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def matrix_product(
    dtype: torch.dtype, *tensors: torch.Tensor
) -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], bool]:
    """The faster `a b^T` for matrices as in `times`, in this dtype, for functions with a gradient of their own.

    Args:
        tensors: what the matrices are made of.

    Returns:
        The product, and whether oneDNN computes it.
    """
    if dtype is torch.float32 and usable(*(each.detach() for each in tensors)):
        return times, True
    return F.linear, dtype is torch.bfloat16


def transposed_product(product: Callable, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a^T b` by one of the above, as gradients of weights are: [N, o] and [N, i] -> [o, i]."""
    # PyTorch copies the first matrix to have its rows side by side, which takes long; better the smaller one.
    return product(b.t(), a.t()).t() if a.shape[1] > b.shape[1] else product(a.t(), b.t())


class _Linear(torch.autograd.Function):
    """`x W^T` for x [N, i] and W [o, i]."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return times(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # type: ignore[override]
        (x, weight), (x_learns, weight_learns) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grad.contiguous()
        return times(grad, weight.t()) if x_learns else None, transposed_product(
            times, grad, x
        ) if weight_learns else None


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(x, weight)`, in training: [..., i] and [o, i] -> [..., o]."""
    # Last the number of tokens, which in graphs may not be asked for: it can depend on data.
    if (
        torch.is_autocast_enabled(x.device.type)
        or not usable(x, weight)
        or not weight.is_contiguous()
        or x.shape[:-1].numel() < FEWEST_TOKENS
    ):
        return F.linear(x, weight)
    return _Linear.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)


def mapped(x: torch.Tensor, linear_map: nn.Module) -> torch.Tensor:
    """`linear_map(x)`, [..., i] -> [..., o]."""
    # A weight cut over processes belongs to a module whose call does more.
    if linear_map.training and is_plain(linear_map) and type(linear_map.weight) in PLAIN:
        return linear(x, linear_map.weight)
    return linear_map(x)


def project(x: torch.Tensor, *maps: nn.Module) -> list[torch.Tensor]:
    """`[each(x) for each in maps]`: up to four linear maps of the same tokens [B, T, d], be they many or few."""
    return [mapped(x, each) for each in maps] if maps[0].training else project_a_few(x, *maps)

"""Whether tensors are what the native functions read: they take a pointer and sizes, and read what stands there.

Every kind of check is here once. `native_functions` asks for each function, `native_layer` for layers as a whole: of
weights when it looks at a layer, of what comes with a step before every call.

Shapes: as in `fused`.
"""

import torch
from torch import nn

PLAIN = (torch.Tensor, nn.Parameter)
# Sinkhorn's steps. A config may say any number, and in a native function no interrupt is heard.
MOST_ITERATIONS = 1000
LARGEST_REAL = torch.finfo(torch.float32).max


def fits(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> bool:
    """Whether a tensor's numbers are of a dtype and shape, in memory, one after another."""
    plain = type(tensor) in PLAIN and tensor.dtype is dtype and tensor.is_cpu
    return plain and tensor.shape == shape and tensor.is_contiguous()


def fits_side_by_side(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> bool:
    """The same of [B, S, D] whose sequences may stand anywhere: a part of a cache."""
    plain = type(tensor) in PLAIN and tensor.dtype is dtype and tensor.is_cpu
    return plain and tensor.shape == shape and tensor.stride()[1:] == (shape[2], 1)


def lies_in_rows(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether there are numbers of a dtype, in memory, those of a row one after another and rows anywhere."""
    plain = type(tensor) in PLAIN and tensor.dtype is dtype and tensor.is_cpu
    return plain and tensor.numel() > 0 and tensor.stride(-1) == 1


def readable(mask: torch.Tensor | None, batch: int, tokens: int, keys: int) -> bool:
    """Whether the native functions can read a mask as [B or 1, T, S]: boolean, of that size, keys side by side."""
    if mask is None:
        return True
    size = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] == tokens and mask.shape[2] == keys
    return size and mask.dtype is torch.bool and type(mask) in PLAIN and mask.is_cpu and mask.stride(-1) == 1


def seen(mask: torch.Tensor | None) -> tuple[int | None, int, int]:
    """A mask as the native functions read it; nothing where every query sees every key."""
    return (None, 0, 0) if mask is None else (mask.data_ptr(), mask.stride(0) if len(mask) > 1 else 0, mask.stride(1))


def as_token_ids(ids: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """Token ids as the native functions read them, int64; None where they cannot be."""
    if ids is None or ids.dtype not in (torch.int64, torch.int32) or ids.shape != shape:
        return None
    return ids.to(torch.int64).contiguous() if type(ids) in PLAIN and ids.is_cpu else None


def angles_fit(cos: torch.Tensor, sin: torch.Tensor, batch: int, tokens: int, rotary: int | None = None) -> bool:
    """Whether cosines and sines are [B or 1, T, P / 2]."""
    shape = cos.shape
    fit = len(shape) == 3 and sin.shape == shape and shape[0] in (1, batch) and shape[1] == tokens
    return fit and (rotary is None or 2 * shape[2] == rotary)


def is_real(number: float) -> bool:
    """Whether a number is one of fp32, which is what the native functions make of it."""
    return -LARGEST_REAL <= number <= LARGEST_REAL


def limit_fits(limit: float | None) -> bool:
    """Whether activations can be clamped to -limit ... limit."""
    return limit is None or limit >= 0


def choice_fits(choice: tuple[int | float, ...], experts: int, by_table: bool) -> bool:
    """Whether a router's numbers (`Kernels.route`) name experts and groups that there are."""
    top_k, groups, best_groups, group_top = choice[:4]
    if by_table or groups == 1:
        return top_k >= 1 and (by_table or top_k <= experts)
    whole = groups > 1 and experts % groups == 0
    return whole and 1 <= top_k <= experts and 1 <= best_groups <= groups and 1 <= group_top <= experts // groups

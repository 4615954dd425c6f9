"""DeepSeek's quantised weights, read as plain tensors: FP8 and FP4 in blocks with a scale each.

    V3, V3.2   `NAME.weight` e4m3,  `NAME.weight_scale_inv` fp32, one per 128 x 128 weights (arXiv 2412.19437, 3.3)
    V3.1, V4   the same with scales that are powers of two; V4 calls them `NAME.scale` and stores exponents (ue8m0)
    V4         experts may be FP4: `NAME.weight` with two e2m1 numbers per byte, the lower half first, and a
               `NAME.scale` per 32 numbers of a row

A weight is its number times its block's scale (the name says "inv", but it is the factor: `weight_dequant` in
DeepSeek-V3's inference/kernel.py). transformers reads these formats as well, but takes blocks of equal size: 576 rows,
as in every MLA layer of V3, are four blocks of 128 and one of 64.
"""

from collections.abc import Iterable, Sequence

import torch
from safetensors import safe_open

# e2m1: sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

# safetensors' names of the dtypes that mean nothing without a scale. Packed FP4 is stored as bytes.
PACKED = ("I8", "U8")
QUANTIZED = ("F8_E4M3", *PACKED)
SCALE_SUFFIXES = (".weight_scale_inv", ".scale")
SCALE_DTYPES = ("F32", "BF16", "F16", "F64", "F8_E8M0", "U8")


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [rows, n] -> fp32 [rows, 2 n]."""
    codes = packed.view(torch.uint8)
    return E2M1[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()]


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiplies every block of a matrix by its scale.

    Args:
        weight: FP8 [rows, columns], or bytes of two FP4 numbers [rows, columns / 2].
        scale: [row blocks, column blocks]: numbers, ue8m0, or bytes that hold exponents of ue8m0.

    Returns:
        fp32 [rows, columns].
    """
    values = weight.float() if weight.dtype == torch.float8_e4m3fn else unpack_fp4(weight)
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float()
    for dim, (size, blocks) in enumerate(zip(values.shape, scale.shape, strict=True)):
        scale = scale.repeat_interleave(block_size(size, blocks), dim=dim).narrow(dim, 0, size)
    return values.mul_(scale)


def block_size(size: int, blocks: int) -> int:
    """Rows (columns) of a block where `size` of them are `blocks` blocks, of which the last may be smaller.

    Block sizes are powers of two in every release, and then the size is known: for `blocks = ceil(size / b)` above 1,
    `size / blocks` lies above b / 2 and not above b. A single block may have any size.

    Raises:
        ValueError: there are no blocks, or more than rows.
    """
    if not 0 < blocks <= max(size, 1):
        raise ValueError(f"{blocks} scales cannot belong to {size} rows or columns")
    return 1 << (-(-size // blocks) - 1).bit_length()


class QuantizedSlice:
    """A quantised weight in a file that reads like a plain tensor in a file (safetensors' slices)."""

    def __init__(self, name: str, weight, scale):
        self.weight, self.scale = weight, scale
        scales = scale.get_shape(), scale.get_dtype()
        self.shape = shape_of_quantized(name, weight.get_shape(), weight.get_dtype(), *scales)

    def __getitem__(self, index) -> torch.Tensor:
        return dequantize(self.weight[...], self.scale[...])[index]

    def get_shape(self) -> list[int]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"


def shape_of_quantized(
    name: str, shape: Sequence[int], dtype: str, scale_shape: Sequence[int], scale_dtype: str
) -> list[int]:
    """The shape in memory of a quantised weight.

    Args:
        name: of the weight, for messages.
        shape, dtype: of the weight in its file; two FP4 numbers are in a byte.
        scale_shape, scale_dtype: of its scales.

    Raises:
        ValueError: the scales are none of such a weight.
    """
    if len(shape) != 2:
        raise ValueError(f"{name} is {dtype} {list(shape)}; only matrices can be stored so")
    rows, columns = shape
    numbers = [rows, columns * 2 if dtype in PACKED else columns]
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"the scales of {name} are {scale_dtype}; they must be one of {', '.join(SCALE_DTYPES)}")
    fits = len(scale_shape) == 2
    for size, blocks in zip(numbers, scale_shape, strict=False):
        fits = fits and 0 < blocks <= size and -(-size // block_size(size, blocks)) == blocks
    if not fits:
        raise ValueError(f"{name} is {numbers}; scales of shape {list(scale_shape)} do not divide it into equal blocks")
    return numbers


def open_tensors(files: Iterable[str]) -> dict:
    """All tensors of safetensors files by name, not read yet; quantised ones as `QuantizedSlice`.

    Values have `[...]`, `get_shape()` and `get_dtype()`; reading one reads that tensor alone.

    Raises:
        ValueError: a quantised weight has no scale, or a scale does not fit its weight.
    """
    slices = {}
    for file in files:
        # The slices keep the file open for as long as they live.
        reader = safe_open(file, framework="pt")
        slices.update({name: reader.get_slice(name) for name in reader.keys()})  # noqa: SIM118
    tensors = dict(slices)
    for name, tensor in slices.items():
        stem, _, last = name.rpartition(".")
        if last != "weight" or tensor.get_dtype() not in QUANTIZED:
            continue
        scales = [suffix for suffix in SCALE_SUFFIXES if stem + suffix in slices]
        if not scales:
            raise ValueError(f"{name} is {tensor.get_dtype()}, but there is no {stem}{' or '.join(SCALE_SUFFIXES)}")
        tensors[name] = QuantizedSlice(name, tensor, tensors.pop(stem + scales[0]))
    return tensors

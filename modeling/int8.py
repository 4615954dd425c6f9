"""Weights in int8, for generation: half the bytes of bf16, and activations as they are.

Every row of a matrix, an output's weights, has a scale of its own (symmetric, round to nearest; as in LLM.int8(), arXiv
2208.07339, section 2.1, for weights alone):

    s_r = max_c |W_rc| / 127        Q_rc = round(W_rc / s_r)        y_r = s_r sum_c Q_rc x_c

A few tokens on a CPU are multiplied by the numbers as they are stored (`fused`); for many, and wherever there are no
native functions, the weights are restored first and the module's own definition runs on them.

Not in int8: embeddings, of which a token reads one row; norms, routers, hyper-connections and the weights of indexers'
heads, which are small and decide much; and `kv_b_proj`, which absorbed attention takes apart (`attention`).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from .compressed_attention import GroupedLinear
from .experts import RoutedExperts
from .fused import SILU, kernels_for
from .precision import KeepsFloat32Buffers

LARGEST = 127
# That are restored in fp32 on their way to another dtype: all of a layer's experts at once take three times as long.
NUMBERS_AT_ONCE = 1 << 20


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., rows, columns] -> int8 numbers of that shape and fp32 scales [..., rows]."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=-1) / LARGEST
    # A row of zeros has any scale.
    return (weight / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().to(torch.int8), scale


def restore_rows(numbers: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `quantize_rows` has rounded to, in `dtype`."""
    restored = torch.empty(numbers.shape, dtype=dtype, device=numbers.device)
    rows, factors, target = numbers.flatten(0, -2), scale.flatten().unsqueeze(-1), restored.flatten(0, -2)
    count = max(NUMBERS_AT_ONCE // rows.shape[1], 1)
    for some, factor, part in zip(rows.split(count), factors.split(count), target.split(count), strict=True):
        part.copy_(some.float().mul_(factor))
    return restored


class Int8Linear(KeepsFloat32Buffers):
    """An `nn.Linear` with its weight in int8."""

    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numbers, scale = quantize_rows(linear.weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_training(self)
        x = x.contiguous()
        kernels = kernels_for(self.training, x.numel() // self.in_features, x)
        output = kernels and kernels.project_int8(x, self.weight, self.scale)
        if output is None:
            return F.linear(x, restore_rows(self.weight, self.scale, x.dtype), self.bias)
        return output if self.bias is None else output + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8GroupedLinear(KeepsFloat32Buffers):
    """A `GroupedLinear` with its weight in int8."""

    scale: torch.Tensor

    def __init__(self, linear: GroupedLinear):
        super().__init__()
        self.groups = linear.groups
        numbers, scale = quantize_rows(linear.weight)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        refuse_training(self)
        x = x.contiguous()
        kernels = kernels_for(self.training, x.shape[:2].numel(), x)
        output = kernels and kernels.project_int8(x, self.weight, self.scale, self.groups)
        if output is not None:
            return output
        weight = restore_rows(self.weight, self.scale, x.dtype)
        return torch.einsum("btgi,goi->btgo", x, weight.unflatten(0, (self.groups, -1)))


class Int8Experts(KeepsFloat32Buffers, RoutedExperts):
    """`RoutedExperts` with their weights in int8."""

    gate_up_proj_scale: torch.Tensor
    down_proj_scale: torch.Tensor

    def __init__(self, experts: RoutedExperts):
        with torch.device("meta"):
            super().__init__(experts.config)
        for name in ("gate_up_proj", "down_proj"):
            numbers, scale = quantize_rows(getattr(experts, name))
            setattr(self, name, nn.Parameter(numbers, requires_grad=False))
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        refuse_training(self)
        if isinstance(self.act_fn, SILU):
            kernels = kernels_for(self.training, len(hidden_states), hidden_states)
            gate_up, down = (self.gate_up_proj, self.gate_up_proj_scale), (self.down_proj, self.down_proj_scale)
            output = kernels and kernels.mix_int8(hidden_states, indices, weights, *gate_up, *down, self.swiglu_limit)
            if output is not None:
                return output
        used, indices = indices.unique(return_inverse=True)
        with torch.device("meta"):
            experts = RoutedExperts(self.config).eval()
        experts.num_experts = len(used)
        restored = {}
        for name in ("gate_up_proj", "down_proj"):
            numbers, scale = getattr(self, name).index_select(0, used), getattr(self, f"{name}_scale")[used]
            restored[name] = restore_rows(numbers, scale, hidden_states.dtype)
        return functional_call(experts, restored, (hidden_states, indices, weights))


def refuse_training(module: nn.Module) -> None:
    if module.training:
        raise RuntimeError(
            "weights in int8 do not learn: train the model that this one was made of, and quantise the result; to "
            "generate with this one, call model.eval()"
        )


KINDS: dict[type, type] = {nn.Linear: Int8Linear, GroupedLinear: Int8GroupedLinear, RoutedExperts: Int8Experts}
KEPT = ("kv_b_proj",)


def quantize(model: nn.Module) -> None:
    """Puts linear maps and experts into int8, in place and one by one, and the model into eval mode.

    A head that is the embedding stays as it is.

    Raises:
        ValueError: a weight is not in memory.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    model.eval().requires_grad_(False)
    for name, module in list(model.named_modules()):
        kind, own = KINDS.get(type(module)), list(module.parameters(recurse=False))
        if kind is None or name.endswith(KEPT) or any(id(parameter) in embeddings for parameter in own):
            continue
        if any(parameter.is_meta for parameter in own):
            raise ValueError(f"{name} is not in memory; load the model without device_map, then quantise it")
        model.set_submodule(name, kind(module).eval())


def is_quantized(model: nn.Module) -> bool:
    return any(type(module) in KINDS.values() for module in model.modules())

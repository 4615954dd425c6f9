"""An accelerator that need not be there: what a forward would make the host wait for, and where devices are mixed up.

Two ways, each of which sees what the other cannot:

    fake CUDA     tensors without data on the device `cuda` (`FakeTensorMode`), which a CUDA build of PyTorch makes on a
                  machine without a GPU. Operations refuse tensors of two devices, and results that depend on data.
                  No backward pass: PyTorch asks the driver for a stream.
    unread CPU    real tensors whose numbers Python may not read (`fathom.modeling.host`), without native functions.
                  Forward and backward passes, and the numbers can be compared.

`Reads` finds what waits in both: operations that PyTorch marks as depending on data, indices of booleans, and copies
between devices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# An H100's.
CAPABILITY = (9, 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)
WAITS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
COPIES = ("aten::_to_copy", "aten::copy_")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Reads(TorchDispatchMode):
    """Notes every operation that the host waits for on an accelerator, and lets it happen."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.waits(func, args):
            self.found.append(func.name())
        result = func(*args, **(kwargs or {}))
        devices = {each.device for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)}
        if len(devices) > 1 and func.name().split(".")[0] in COPIES:
            self.found.append(f"{func.name()} of {sorted(map(str, devices))}")
        return result

    @staticmethod
    def waits(func, args: tuple) -> bool:
        name = func.name().split(".")[0]
        if name in INDEXING:
            return any(isinstance(each, torch.Tensor) and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        return any(tag in func.tags for tag in WAITS)


class Lists(TorchFunctionMode):
    """Notes what takes a tensor's numbers without an operation."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads() -> Iterator[list[str]]:
    """What is waited for from now on."""
    watch = Reads()
    with watch, Lists(watch.found):
        yield watch.found


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors are made without data, on CUDA where nothing else is said.

    Skips the test where PyTorch is built without CUDA: its fake tensors of that device have no device guard.
    """
    if not torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built without CUDA")
    with (
        mock.patch.object(torch.cuda, "get_device_capability", return_value=CAPABILITY),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=PROPERTIES),
        FakeTensorMode() as mode,
        torch.device("cuda"),
    ):
        yield mode


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on Python reads no tensor of a CPU either, and no native function does."""
    from fathom.modeling import fused, host

    monkeypatch.setattr(host, "READABLE", ())
    monkeypatch.setattr(fused, "library", lambda dtype: None)
    monkeypatch.setattr(fused, "_kernels", {})

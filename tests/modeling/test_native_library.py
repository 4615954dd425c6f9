"""What a library says of itself when it is loaded, and how its functions fail."""

import ctypes
import os
import subprocess
import sys

import pytest

from fathom.modeling import native, native_library
from fathom.modeling.native_structures import MIRRORED, Step

pytestmark = pytest.mark.skipif(not native.wait(), reason="there is no C++ compiler")
DTYPES = list(native.NUMBERS)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def functions(request):
    return native.library(request.param)


def path_of(functions) -> str:
    return functions.library._name


def test_every_structure_has_the_size_that_the_library_knows(functions):
    assert native_library.load(path_of(functions)).route.argtypes == functions.route.argtypes
    assert len(MIRRORED) == 11


@pytest.mark.parametrize("kind", MIRRORED, ids=lambda kind: kind.__name__)
def test_a_structure_of_another_size_is_refused(functions, kind, monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = [*kind._fields_, ("more", ctypes.c_int64)]

    Longer.__name__ = kind.__name__
    others = tuple(Longer if each is kind else each for each in MIRRORED)
    monkeypatch.setattr(native_library, "MIRRORED", others)
    with pytest.raises(OSError, match=f"built from another source.*{kind.__name__}"):
        native_library.load(path_of(functions))


def test_another_version_is_refused(functions, monkeypatch):
    monkeypatch.setattr(native_library, "VERSION", 2)
    with pytest.raises(OSError, match="built from another source: version 1 of 2"):
        native_library.load(path_of(functions))


@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(200)])
def test_what_is_no_library_is_refused(tmp_path, content):
    (tmp_path / "x.so").write_bytes(content)
    with pytest.raises(OSError, match=r"x\.so"):
        native_library.load(str(tmp_path / "x.so"))


def test_a_library_without_these_functions_is_refused():
    """Any that is there: that of Python's own structures."""
    import _ctypes

    with pytest.raises(OSError, match="no library of these kernels"):
        native_library.load(_ctypes.__file__)


@pytest.mark.parametrize("width", [2**50, 2**61])
def test_memory_that_is_not_there_raises(functions, width):
    """Before a parallel region, and in the threads of one. A number that no vector can have is one of these."""
    with pytest.raises(MemoryError, match="no memory"):
        functions.write_streams(None, None, None, None, 0, 1, width, None)
    with pytest.raises(MemoryError, match="no memory"):
        functions.norm_rotate(None, None, 1, 1, width, None, 0, 0.0, None, None, 1, 0, 0, 0, 1.0, 2)


def test_a_step_of_no_tokens_is_not_read(functions):
    """Python looks before; a layer looks again."""
    from fathom.modeling.native_structures import Layer

    layer, step = Layer(), Step(1, 0)
    assert not functions.decode_channels(ctypes.addressof(layer), ctypes.addressof(step), None, None, None)
    assert not functions.decode_layer(ctypes.addressof(layer), ctypes.addressof(step), None, None, None, None)


def test_experts_and_keys_that_there_are_not_are_not_read(functions):
    """-> False, and nothing is touched: the other pointers are null."""
    wrong = (ctypes.c_int64 * 2)(0, 5)
    x = ctypes.addressof(wrong)
    assert not functions.mix_channels(None, 1, 8, x, None, 2, 5, None, None, 4, None, None, None, 0, 1.0, None, 1)
    assert not functions.mix_int8(None, 1, 8, x, None, 2, 5, None, None, None, None, 4, 1.0, None, 1)
    wrong[1] = -1
    assert not functions.mix_channels(None, 1, 8, x, None, 2, 5, None, None, 4, None, None, None, 0, 1.0, None, 1)
    keys = None, None, 0, 8, 4, 2, 5, x, None, 0, 0
    assert not functions.attend_latents(*keys, None, 4, 4, 1, 1, 1, 1.0, None, 1)


CROWDED = """
import resource, sys
import torch
import generations
from fathom.modeling import fused, native

assert native.wait(torch.float32)
fused.multiplies_texts = lambda dtype: True
# A native layer keeps much more for a token than what PyTorch allocates around it.
sizes = dict(num_attention_heads=16, qk_nope_head_dim=48, v_head_dim=48, num_hidden_layers=1)
sizes = sizes if sys.argv[1] == "v3" else {}
model = generations.model(sys.argv[1], moe_intermediate_size=2048, intermediate_size=2048, **sizes)
raised = []
with torch.no_grad():
    model(generations.tokens(1, 20))
    for megabytes in (1, 4, 8):
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + megabytes * 2**20, resource.RLIM_INFINITY))
        for length in (1, 100, 200, 1000):
            try:
                model(torch.zeros(1, length, dtype=torch.long))
            except (MemoryError, RuntimeError) as error:
                raised.append(type(error).__name__)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    model(generations.tokens(1, 20))
print("survived", *raised)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is told how much memory it may have")
@pytest.mark.parametrize("generation", ["v3", "v4"])
def test_a_process_without_memory_goes_on(generation):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    # What is freed goes back to the system: there is no old memory to take.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", CROWDED, generation]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("survived")
    # PyTorch's own allocations fail with a RuntimeError.
    assert "MemoryError" in done.stdout

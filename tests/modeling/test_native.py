"""How the native functions are built, and what serves without them."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fathom.modeling import fused, native, native_build, native_library


def has_compiler() -> bool:
    try:
        return bool(native_build._compiler())
    except OSError:
        return False


compiles = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")


@compiles
def test_where_there_is_a_compiler_there_are_native_functions():
    """Other tests are skipped without them: source that does not compile must not go unseen."""
    assert native.wait()


@compiles
@pytest.mark.parametrize("dtype", list(native.NUMBERS))
def test_source_is_for_every_processor(dtype, tmp_path):
    """Built without the instructions and the threads that this machine may have: the same but for rounding."""
    target = tmp_path / "plain.so"
    command = [native_build._compiler(), *native_build.FLAGS, f"-DNUMBER={native.NUMBERS[dtype]}"]
    source = str(native_build.SOURCES / "kernels.cpp")
    subprocess.run([*command, source, "-o", str(target)], check=True, capture_output=True, timeout=300)
    assert native.wait(dtype)
    torch.manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    x, weight, keys, kv_b = numbers(2, 3, 70), numbers(21, 70), numbers(2, 150, 36), numbers(2 * 24, 28)
    query, index_keys, heads = numbers(2, 3, 2, 20), numbers(2, 150, 22), numbers(5, 70)
    row_scales = torch.rand(21)
    found = []
    for functions in (native_library.load(str(target)), native.library(dtype)):
        kernels = fused.Kernels(functions)
        (product,) = kernels.project(x, weight)
        attended = kernels.attend_latents(query, keys, kv_b, 0.2, 28, 12, None)
        chosen, _ = kernels.choose_keys(numbers(0).new_ones(2, 3, 5, 22), index_keys, x, heads, None, 20)
        int8 = kernels.project_int8(x, (weight * 30).clamp(-127, 127).to(torch.int8), row_scales)
        found.append((product, attended, int8, chosen))
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.1, "rtol": 0.02}
    torch.testing.assert_close(found[0][:3], found[1][:3], **close)
    assert (found[0][3] == found[1][3]).float().mean() > 0.95


@compiles
def test_a_build_is_kept_and_a_damaged_one_is_built_again(tmp_path):
    home = tmp_path / "home"
    code = "import torch\nfrom fathom.modeling import native\nprint(native.wait(torch.float32))"

    def run() -> None:
        environment = os.environ | {"XDG_CACHE_HOME": str(home)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
        assert "native functions" not in done.stderr

    run()
    (kept,) = home.rglob("*.so")
    built, whole = kept.stat().st_mtime_ns, kept.read_bytes()
    run()
    assert kept.stat().st_mtime_ns == built
    kept.write_bytes(whole[: len(whole) // 2])
    run()
    assert kept.read_bytes() == whole


@compiles
def test_pytorch_serves_until_the_build_is_done(monkeypatch):
    """A first step does not wait."""
    begin = threading.Event()
    monkeypatch.setattr(native, "_libraries", {})
    monkeypatch.setattr(native, "_builds", {})
    monkeypatch.setattr(fused, "_kernels", {})
    provide = native.provide
    monkeypatch.setattr(native, "provide", lambda number: begin.wait(60) and provide(number))
    x = torch.randn(1, 1, 16)
    with torch.no_grad():
        assert fused.kernels_for(False, 1, x) is None
        begin.set()
        assert native.wait(torch.float32)
        assert fused.kernels_for(False, 1, x) is not None

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


SILENT = "import torch\nfrom fathom.modeling import native\nprint(native.wait(), len(native._builds))"


def run(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler_or_unwanted_nothing_is_native(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert run(SILENT, FATHOM_KERNELS="0", **home) == "False 2"
    assert run(SILENT, PATH=str(tmp_path), **home) == "False 2"
    assert list(tmp_path.iterdir()) == []


@compiles
def test_a_build_is_kept_and_a_broken_compiler_is_survived(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1 || exit 1\n")
    broken.chmod(0o755)
    assert run(SILENT, CXX=str(broken), XDG_CACHE_HOME=str(tmp_path / "none")) == "False 2"
    assert not list((tmp_path / "none").rglob("*.so"))
    home = tmp_path / "home"
    code = "import torch\nfrom fathom.modeling import native\nprint(native.wait(torch.float32))"
    assert run(code, XDG_CACHE_HOME=str(home)) == "True"
    (kept,) = [path for path in home.rglob("*") if path.is_file()]
    built = kept.stat().st_mtime_ns
    assert run(code, XDG_CACHE_HOME=str(home)) == "True"
    assert kept.stat().st_mtime_ns == built


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

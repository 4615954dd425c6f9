"""The machine of a benchmark: what it is, and the two limits that no program on it can pass.

Prefill and training are limited by matrix products, decoding by how fast weights and cache are read. Both limits are
measured in the run whose figures are compared with them, so that a busy machine lowers both.
"""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from ...modeling import native
from ..flops import measured_throughput

# Far more than any cache of a processor holds.
BANDWIDTH_BYTES = 512 * 2**20


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads and versions, whether decoding has its native functions, and the commit of a checkout."""
    from ... import __version__

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "fathom": __version__,
        "kernels": device.type == "cpu" and native.wait(),
        "commit": commit_of(Path(__file__).parents[2]),
    }


def ceilings(dtype: torch.dtype, device: torch.device, size: int = 2048) -> dict[str, float]:
    """What the machine can do in a dtype.

    Args:
        size: of the square matrices of the product; the bandwidth is measured with `BANDWIDTH_BYTES`, or with less in
            proportion for a smaller product.

    Returns:
        `flops`: floating-point operations per second of a matrix product; `bandwidth`: bytes per second that are read,
        or read and written.
    """
    nbytes = min(BANDWIDTH_BYTES, BANDWIDTH_BYTES * size // 2048)
    return {
        "flops": measured_throughput(dtype, device, size),
        "bandwidth": memory_bandwidth(dtype, device, nbytes),
    }


def memory_bandwidth(dtype: torch.dtype, device: torch.device, nbytes: int, repeats: int = 5) -> float:
    """Bytes per second of a matrix-vector product or of a copy, whichever is faster, the best of `repeats`."""
    columns = 4096
    matrix = torch.ones(nbytes // columns // dtype.itemsize, columns, dtype=dtype, device=device)
    vector = torch.ones(columns, dtype=dtype, device=device)
    copied = torch.empty_like(matrix)
    best = 0.0
    for _ in range(repeats):
        for run, moved in ((lambda: matrix @ vector, matrix.nbytes), (lambda: copied.copy_(matrix), 2 * matrix.nbytes)):
            synchronize(device)
            started = time.perf_counter()
            run()
            synchronize(device)
            best = max(best, moved / (time.perf_counter() - started))
    return best


def synchronize(device: torch.device) -> None:
    """Waits until everything that was asked of an accelerator is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit_of(root: Path) -> str | None:
    """The commit of the checkout at `root`, with `+` behind it if files were changed; None if it is none.

    A folder in a checkout is not one: the package may be installed inside another project's.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None

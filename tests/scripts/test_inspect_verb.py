"""`fathom inspect`: what it prints, and how it ends."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.scripts.cli import main
from fathom.scripts.inspect import amount, size


def test_a_run_folder(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(tiny_checkpoint), "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "layers      0 mla + dense, 1 mla + moe\n            2 mla + moe (MTP)\n" in printed
    assert "experts     2 of 4 routed per token, 1 shared\n" in printed
    assert "files       1, whole\n" in printed
    experts = next(line for line in printed.splitlines() if ".experts.{expert}.up_proj" in line)
    assert experts.split()[1:] == ["32", "x", "64", "F32", "8", "65,536"]
    assert printed.endswith(f"next: fathom chat {tiny_checkpoint}\n")


def test_faults_end_in_exit_code_1(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["inspect", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "files       1, NOT WHOLE:\n" in printed
    assert "model.safetensors is truncated" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [([], "no checkpoint given"), (["v3", "--context", "0"], "--context 0 must be at least 1 token")],
)
def test_bad_input(words, says, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", *words]) == 2
    assert says in capsys.readouterr().err


def test_as_a_module_and_as_json():
    """Its file is named like a module of the standard library, and must not stand in that one's way."""
    command = [sys.executable, "-m", "fathom.scripts.inspect", "v4-flash", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    assert found["parameters"]["total"] == 284_332_230_231
    assert found["layers"] == ["0-1 swa + hash", "2 csa + hash", "3-42 hca/csa in turn + moe"]


def test_numbers_for_people():
    assert [amount(n) for n in (1_572_997_179_491, 671_026_404_352, 7_220_000, 512)] == [
        "1.57 T",
        "671.03 B",
        "7.22 M",
        "512",
    ]
    assert [size(n) for n in (1_342_052_808_704, 1_500, 999)] == ["1,342.1 GB", "1.5 kB", "999 bytes"]

"""`fathom chat` as a process: it serves on a free port, says where, and ends on Ctrl-C."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from fathom.scripts.chat import free_port
from fathom.scripts.cli import main


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_it_serves_the_newest_checkpoint_beside_a_taken_port(
    tiny_checkpoint: Path, tmp_path: Path, taken_port: int
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "sft")
    command = [sys.executable, "-m", "fathom.scripts.chat", "--models_dir", str(tmp_path), "--port", str(taken_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("chat"):
                break
        url = lines[-1].split()[1]
        assert url.startswith("http://127.0.0.1:")
        assert urlopen(url, timeout=30).status == 200
        assert any("is taken, using" in line for line in lines)
        assert any(line.split() == ["model", str(tmp_path / "sft")] for line in lines)
    finally:
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert process.returncode == 0, "".join(lines) + rest
    assert "Traceback" not in rest


def test_a_free_port_is_taken_as_it_is_and_a_taken_one_is_not(taken_port: int) -> None:
    assert free_port("127.0.0.1", taken_port) > taken_port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    assert free_port("127.0.0.1", free) == free


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "port=70000 must be between 1 and 65535"),
        (["--host", "203.0.113.9"], "host='203.0.113.9' cannot be served on"),
        (["--host", "no such host"], "no address of this machine"),
        (["random:v33"], "did you mean v3"),
        (["./nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: Any, arguments: list[str], message: str) -> None:
    assert main(["chat", *arguments, "--models_dir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err

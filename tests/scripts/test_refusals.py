"""What the machine refuses is one line and an exit code, whatever the verb: output, memory, files, signals.

Real processes, started as a user starts them.
"""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fathom.scripts import cli
from fathom.scripts.refusals import machine_refusal


def start(*words: str, **how) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **how.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "fathom", *words], env=environment, **{**streams, **how})


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=120)
    decoded = [(stream or b"").decode("utf-8", "replace") for stream in (output, errors)]
    return process.returncode, *decoded


def one_line(errors: str) -> str:
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    (line,) = errors.strip().splitlines() or [""]
    return line


# Verbs that print on stdout, with and without torch.
PRINTING = [[], ["--version"], ["push", "--help"], ["pretrain", "--help"], ["inspect", "MODEL"]]
UNBUFFERED = [{"PYTHONUNBUFFERED": ""}, {"PYTHONUNBUFFERED": "1"}]


@pytest.mark.parametrize("env", UNBUFFERED, ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", PRINTING, ids=" ".join)
class TestOutput:
    def test_a_reader_that_has_gone(self, words: list[str], env: dict[str, str], tiny_checkpoint: Path):
        reading, writing = os.pipe()
        os.close(reading)
        words = [str(tiny_checkpoint) if word == "MODEL" else word for word in words]
        code, _, errors = ended(start(*words, stdout=writing, env=env))
        os.close(writing)
        assert (code, errors) == (128 + signal.SIGPIPE, "")

    def test_a_full_disk(self, words: list[str], env: dict[str, str], tiny_checkpoint: Path):
        words = [str(tiny_checkpoint) if word == "MODEL" else word for word in words]
        with open("/dev/full", "wb") as full:
            code, _, errors = ended(start(*words, stdout=full, env=env))
        assert code == 1
        assert one_line(errors).endswith("error: cannot write to standard output: No space left on device")


@pytest.mark.parametrize("closed", [1, 2])
@pytest.mark.parametrize("words", [["--help"], ["inspect", "MODEL"]], ids=" ".join)
def test_streams_that_are_closed_beforehand(words: list[str], closed: int, tiny_checkpoint: Path):
    words = [str(tiny_checkpoint) if word == "MODEL" else word for word in words]
    code, _, errors = ended(start(*words, preexec_fn=lambda: os.close(closed)))
    assert (code, errors) == (0, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_encodings_that_lack_what_is_printed(encoding: str, tiny_checkpoint: Path, tmp_path: Path):
    """A name in Chinese and one that is no UTF-8, in what is printed and in an error."""
    env = {"PYTHONIOENCODING": encoding}
    folder = tmp_path / "模型-é"
    folder.symlink_to(tiny_checkpoint)
    code, output, errors = ended(start("inspect", str(folder), env=env))
    assert (code, errors) == (0, ""), output
    assert "\\u6a21" in output
    code, _, errors = ended(start("inspect", f"{folder}-absent", env=env))
    assert code == 2
    assert "\\u6a21" in one_line(errors)
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    os.symlink(tiny_checkpoint, odd)
    # safetensors and tokenizers cannot open it, which is said on standard output.
    code, output, errors = ended(start("inspect", odd, env=env))
    assert (code in (0, 1), errors) == (True, "")
    assert "\\udcff\\udcfe" in output


@pytest.mark.parametrize("megabytes", [300, 600, 700])
def test_memory_that_runs_out_as_libraries_are_imported(megabytes: int, tiny_checkpoint: Path):
    limit = (megabytes * 10**6, megabytes * 10**6)
    process = start("inspect", str(tiny_checkpoint), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))
    code, _, errors = ended(process)
    assert code == 1
    assert one_line(errors).startswith("fathom inspect: error: memory ran out (")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: MemoryError(), "memory ran out (MemoryError); free some"),
        (
            lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory ran out (",
        ),
        (lambda: RuntimeError("CUDA out of memory. Tried to allocate"), "memory ran out (CUDA out of memory."),
        (lambda: ImportError("libx.so: failed to map segment from shared object"), "memory ran out (libx.so"),
        (lambda: SystemError("error return without exception set"), "memory ran out ("),
        (lambda: RuntimeError("can't start new thread"), "memory ran out ("),
        (lambda: OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out ("),
        (lambda: PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: Permission denied"),
        (lambda: OSError(errno.EROFS, "Read-only file system", "/x"), "/x: Read-only file system"),
        (lambda: FileNotFoundError(errno.ENOENT, "No such file or directory"), "No such file or directory"),
        (lambda: OSError(errno.ENOSPC, "No space left on device", "/x"), "/x: No space left on device; make room"),
        (lambda: OSError("no errno\nsecond line"), "no errno"),
        (lambda: ZeroDivisionError("ours"), None),
        (lambda: RuntimeError("shapes do not fit"), None),
        (lambda: KeyError("ours"), None),
    ],
)
def test_what_is_the_machine_s_and_what_is_ours(make: Callable[[], Exception], line: str | None, capsys):
    error = make()
    said = machine_refusal(error)
    assert said is None if line is None else said.startswith(line)

    def main(argv):
        raise error

    if line is None:
        with pytest.raises(type(error)):
            cli.run("dive", main, [])
    else:
        assert cli.run("dive", main, []) == 1
        assert one_line(capsys.readouterr().err).startswith(f"fathom dive: error: {line}")


def test_a_secret_in_an_error_is_not_printed(capsys):
    from fathom.training.errors import UserError

    def main(argv):
        raise UserError("--trainer takes name=value, not 'hf_sEcReTsEcReT' and hub_token=other-words")

    assert cli.run("dive", main, []) == 2
    line = one_line(capsys.readouterr().err)
    assert "sEcReT" not in line
    assert "other-words" not in line


@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("verb", ["inspect", "generate", "pretrain", "corpus", "chat"])
def test_ctrl_c_in_the_first_seconds(verb: str, seconds: float, tmp_path: Path):
    """While Python starts, while libraries are imported, and after: at most one line, never a traceback."""
    words = {
        "inspect": ["absent/model"],
        "generate": ["absent/model", "hello"],
        "pretrain": ["--out", "run"],
        "corpus": ["stdlib", "--out", "corpus"],
        "chat": ["absent/model"],
    }[verb]
    process = start(verb, *words, cwd=tmp_path)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    code, _, errors = ended(process)
    line = one_line(errors)
    if code == -signal.SIGINT:  # the system's own end of it, before Python had come to the verb
        assert line == ""
    elif code == 130:
        assert line.startswith(
            (f"fathom {verb}: interrupted", f"fathom {verb}: stopped by SIGINT before the first step")
        )
    else:
        assert code in (0, 2)  # it had ended by itself


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_clean_up_and_say_so(number: int, tmp_path: Path):
    """Half a corpus does not stay behind."""
    script = (
        "import os, signal, sys\n"
        "from fathom.scripts import cli, corpus\n"
        "import fathom.training.corpus as building\n"
        "def interrupted(*args):\n"
        f"    signal.raise_signal({int(number)})\n"
        "    return []\n"
        "building._documents = interrupted\n"
        "sys.exit(cli.main(['corpus', 'stdlib', '--out', 'corpus']))\n"
    )
    process = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 128 + number
    assert one_line(process.stderr) == f"fathom corpus: ended by {signal.Signals(number).name}"
    assert [file.name for file in tmp_path.iterdir()] == []


def test_what_a_library_makes_of_an_interrupted_import_is_an_interruption(capsys):
    def main(argv):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("numpy._core.multiarray failed to import") from error

    assert cli.run("dive", main, []) == 130
    assert capsys.readouterr().err == "fathom dive: interrupted\n"


def test_an_interruption_in_a_destructor_is_not_forgotten(capsys):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def main(argv):
        dying = Dying()
        del dying
        for _ in range(1000):
            time.sleep(0.001)
        return 0

    assert cli.run("dive", main, []) == 130
    assert capsys.readouterr().err == "fathom dive: interrupted\n"

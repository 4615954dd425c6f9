"""How the native functions are built where something is wrong: PyTorch serves, one line says why, and nothing stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fathom.modeling import native_build, native_cache
from fathom.modeling.native_build import CompilerError

WAITS = "import torch\nfrom fathom.modeling import native\nprint(native.wait())"
BEGINS = "import torch\nfrom fathom.modeling import native\nnative.library(torch.float32)\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a process that keeps nothing outside of the test's folder."""
    (tmp_path / "tmp").mkdir()
    inherited = {name: value for name, value in os.environ.items() if name not in ("CXX", "FATHOM_KERNELS_FLAGS")}
    return inherited | {"XDG_CACHE_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}


def run(code: str, environment: dict[str, str]) -> tuple[str, list[str]]:
    """What a process prints, and its lines about native functions."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.strip(), [line for line in done.stderr.splitlines() if "native functions" in line]


def compiler(folder: Path, script: str) -> str:
    """A compiler that writes down how it is called: `--version`, then whatever the script says."""
    path = folder / "compiler"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\n[ $1 = --version ] && echo 1 && exit\n{script}\n')
    path.chmod(0o755)
    return str(path)


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


def whole(folder: Path) -> list[str]:
    """The calls that would have built all of the kernels."""
    return [call for call in calls(folder) if "kernels.cpp" in call and "-fsyntax-only" not in call]


def test_without_a_compiler_one_line_says_so(tmp_path, environment):
    printed, lines = run(WAITS, environment | {"PATH": str(tmp_path)})
    assert printed == "False"
    assert len(lines) == 1
    assert "no C++ compiler" in lines[0]


def test_unwanted_nothing_is_said_or_written(tmp_path, environment):
    assert run(WAITS, environment | {"FATHOM_KERNELS": "0"}) == ("False", [])
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("exit 1", "failed: no word about why"),
        ("echo 'error: out of luck'; exit 1", "out of luck"),
        ("printf 'error: \\377\\376'; exit 1", "failed"),
        ("exit 0", "No such file"),  # and has made nothing
        ("kill -9 $$", "failed"),
    ],
)
def test_a_compiler_that_fails_is_survived_and_named_once(tmp_path, environment, script, says):
    printed, lines = run(WAITS, environment | {"CXX": compiler(tmp_path, script)})
    assert printed == "False"
    assert len(lines) == 1
    assert says in lines[0]
    assert not list((tmp_path / "home").rglob("*.so"))
    assert not list((tmp_path / "tmp").iterdir())


def test_a_version_may_be_any_bytes(tmp_path, environment):
    path = tmp_path / "compiler"
    path.write_text("#!/bin/sh\n[ $1 = --version ] && printf '\\377\\376' && exit\necho error: reached; exit 1\n")
    path.chmod(0o755)
    _, lines = run(WAITS, environment | {"CXX": str(path)})
    assert len(lines) == 1
    assert "reached" in lines[0]


def build(folder: Path, script: str) -> Path:
    return native_build._compile(compiler(folder, script), [], "float", folder)


SUITS = 'case "$*" in *small.cpp*|*-fsyntax-only*) exit 0;; esac\n'


def test_a_full_disk_is_filled_once(tmp_path):
    """Where the flags suit, others would fail in the same way."""
    with pytest.raises(CompilerError, match="No space left"):
        build(tmp_path, f"{SUITS}echo 'error writing to x.s: No space left on device'; exit 1")
    assert len(whole(tmp_path)) == 1


def test_a_disk_that_was_full_before_is_not_tried(tmp_path):
    with pytest.raises(CompilerError, match="No space left"):
        build(tmp_path, "echo 'error: No space left on device'; exit 1")
    assert whole(tmp_path) == []


def test_flags_that_a_compiler_does_not_know_are_left_out(tmp_path):
    script = "case \"$*\" in *-march=native*) echo 'error: unknown'; exit 1;; esac\nexit 0"
    build(tmp_path, script)
    (call,) = whole(tmp_path)
    assert "-mcpu=native" in call


def test_flags_that_the_source_is_not_for_are_left_out(tmp_path):
    """Intrinsics of a processor that the compiler knows by name alone."""
    script = "case \"$*\" in *small.cpp*) exit 0;; *-march=native*) echo 'error: x'; exit 1;; esac\nexit 0"
    build(tmp_path, script)
    assert [("-mcpu=native" in call) for call in whole(tmp_path)] == [False, True]


def test_flags_of_the_environment_come_last_and_name_the_library(tmp_path, monkeypatch):
    fake = compiler(tmp_path, "exit 0")
    assert native_build._name("float", fake, []) != native_build._name("float", fake, ["-g"])
    native_build._compile(fake, ["-g", "-fsanitize=address"], "float", tmp_path)
    assert "-fopenmp -g -fsanitize=address" in whole(tmp_path)[0]


def test_a_compiler_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build, "LONGEST_LOOK", 0.5)
    with pytest.raises(OSError, match=r"had not ended after 0\.5 seconds"):
        build(tmp_path, f"echo $$ > {tmp_path}/number; sleep 600")
    assert_ended(tmp_path)


def wait_for(path: Path) -> int:
    for _ in range(600):
        if path.is_file() and (text := path.read_text().strip()):
            return int(text)
        time.sleep(0.1)
    raise AssertionError(f"{path} is not there")


def assert_ended(folder: Path) -> None:
    """The compiler, and the process that it has started."""
    for name in ("number", "other"):
        if not (folder / name).exists():
            continue
        for _ in range(200):
            try:
                os.kill(wait_for(folder / name), 0)
            except ProcessLookupError:
                break
            state = Path(f"/proc/{wait_for(folder / name)}/stat")
            if state.is_file() and state.read_text().rpartition(")")[2].split()[0] == "Z":
                break  # nobody has asked for its status yet
            time.sleep(0.1)
        else:
            raise AssertionError(f"the compiler ({name}) is still there")


@pytest.mark.parametrize("end", ["normally", "exception", "SIGTERM", "SIGKILL"])
def test_a_compiler_ends_with_the_program_and_leaves_nothing(tmp_path, environment, end):
    hangs = compiler(tmp_path, f"sleep 600 & echo $! > {tmp_path}/other; echo $$ > {tmp_path}/number; wait")
    how = {"normally": "", "exception": "1 / 0"}.get(end, "time.sleep(600)")
    # The program ends when the compiler is at work.
    there = f"pathlib.Path({str(tmp_path / 'number')!r}).exists()"
    code = f"{BEGINS}import pathlib, time\nwhile not {there}: time.sleep(0.05)\n"
    environment["CXX"] = hangs
    with subprocess.Popen([sys.executable, "-c", code + how], env=environment, stderr=subprocess.DEVNULL) as program:
        wait_for(tmp_path / "number")
        if end.startswith("SIG"):
            program.send_signal(signal.Signals[end])
        begin = time.monotonic()
        program.wait(60)
    assert time.monotonic() - begin < 30
    assert_ended(tmp_path)
    for _ in range(100):
        if not list((tmp_path / "tmp").glob("fathom-*")):
            return
        time.sleep(0.1)
    raise AssertionError(list((tmp_path / "tmp").iterdir()))


def test_folders_of_killed_builds_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(tmp_path))
    for name, age in (("fathom-kernels-old", 2 * native_cache.STALE_SECONDS), ("fathom-kernels-new", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.s").write_text("")
        os.utime(tmp_path / name, (0, time.time() - age))
    with native_build.build_folder() as folder:
        assert folder.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["fathom-kernels-new"]


@pytest.mark.parametrize("home", ["a symbolic link", "a file", "none at all"])
def test_without_a_folder_to_keep_it_in_a_library_is_this_process_own(tmp_path, environment, home, monkeypatch):
    """It is loaded from a temporary folder, which is gone afterwards; a line says why."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native_build.tempfile, "tempdir", str(tmp_path / "tmp"))
    if home == "a symbolic link":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "fathom-lm").symlink_to(tmp_path / "tmp")
    elif home == "a file":
        (tmp_path / "home").write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native_cache.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setenv("CXX", compiler(tmp_path, 'for last; do :; done; echo x > "$last"'))
    loaded = []
    monkeypatch.setattr(native_build, "load", lambda path: loaded.append(Path(path).read_text()))
    _, reason = native_build.provide("float")
    assert loaded == ["x\n"]
    assert {"a symbolic link": "symbolic link", "a file": "exists", "none at all": "no home"}[home] in reason.replace(
        "Not a directory", "exists"
    )
    assert list((tmp_path / "tmp").iterdir()) == []

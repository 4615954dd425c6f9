"""transformers' own test mixins, from the source distribution of the installed version.

The wheel of transformers leaves its tests out; its source distribution has the files `tests/test_*.py`. pip fetches
it from the configured index, once per version, into the user's cache: nothing of it comes into this repository.

Those files import three modules from folders that the distribution leaves out. `generation` takes the place of the one
that tests generation. The others, tests of exporting and a list of arguments of all configurations, are left empty.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType

import transformers
from upstream.generation import GenerationTests

PACKAGE = "transformers_tests"


def tests_folder() -> Path:
    """The folder of transformers' tests; fetched where it is not there yet.

    Raises:
        RuntimeError: pip cannot fetch the source distribution.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fathom-lm"
    folder = cache / f"transformers-{transformers.__version__}-tests"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            unpacked = _fetch(Path(temporary))
            try:
                unpacked.rename(folder)
            except OSError:  # another process was faster
                if not folder.is_dir():
                    raise
    return folder


def _fetch(temporary: Path) -> Path:
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers", wanted]
    done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"pip cannot fetch the source distribution of {wanted}, whose tests are to run: {reason}")
    (archive,) = temporary.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tests = [member for member in tar if member.name.split("/")[1:2] == ["tests"]]
        tar.extractall(temporary, tests, filter="data")
    folder = temporary / archive.name.removesuffix(".tar.gz") / "tests"
    (folder / "__init__.py").touch()  # test_configuration_common reads it
    return folder


def _module(name: str, **contents: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(contents)
    sys.modules[name] = module


def load() -> None:
    """Makes transformers' tests importable as the package `transformers_tests`."""
    _module(PACKAGE, __path__=[str(tests_folder())])
    _module(f"{PACKAGE}.generation", __path__=[])
    _module(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=GenerationTests)
    _module(f"{PACKAGE}.exporters", __path__=[])
    _module(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    _module(f"{PACKAGE}.utils", __path__=[])
    _module(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})

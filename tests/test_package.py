"""The house: floors without upward imports, an import that costs nothing, a face whose names exist."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fathom

ROOT = Path(__file__).parents[1]
# What a folder may import beside itself. modeling is pushed to the Hub as remote code, so it stands alone.
BELOW = {
    "modeling": set(),
    "tokenizer": set(),
    "training": {"modeling", "tokenizer"},
    "demo": {"modeling", "tokenizer", "training"},
    "scripts": {"modeling", "tokenizer", "training", "demo"},
}
SOURCES = sorted(path for folder in BELOW for path in (ROOT / folder).rglob("*.py"))


def fresh(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.strip()


def imports(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """(dots, module, names) of every import in a file, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", [alias.name for alias in node.names]


def imported_folders(path: Path) -> set[str]:
    """Top folders of the package that a file imports from; '' is the package itself."""
    place = ["fathom", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for dots, module, names in imports(path):
        if dots:
            base = [*place[:-dots], *module.split(".")] if module else place[:-dots]
            targets = [base] if len(base) > 1 else [[*base, name] for name in names]
            found |= {target[1] if target[1] in BELOW else "" for target in targets}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_floors(path: Path):
    folder = path.relative_to(ROOT).parts[0]
    # `from .. import __version__` reaches the package's face, which is lazy and belongs to no floor.
    above = imported_folders(path) - BELOW[folder] - {folder, ""}
    assert not above, f"{folder} may not import {above}"
    absolute = [module for dots, module, _ in imports(path) if not dots and module.split(".")[0] == "fathom"]
    assert not absolute, "inside the package imports are relative"


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").rglob("*.py")), ids=lambda path: path.name)
def test_modeling_can_travel(path: Path):
    """transformers copies flat files that are imported as `from .file import name`; it sees no other form."""
    assert path.parent == ROOT / "modeling"
    for dots, module, names in imports(path):
        if dots:
            assert (dots, module.count(".")) == (1, 0), f"from {'.' * dots}{module}"
            assert module, f"`from . import {names}` is not found by transformers"
            assert (ROOT / "modeling" / f"{module}.py").is_file()


def test_the_scanner_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "training").mkdir()
    file = tmp_path / "training" / "x.py"
    for line in ("from ..demo.app import launch", "from .. import demo", "def f():\n    from ..demo import app"):
        file.write_text(line)
        assert imported_folders(file) == {"demo"}
    file.write_text("from .errors import UserError\nfrom ..modeling import rotary")
    assert imported_folders(file) == {"training", "modeling"}


def test_no_stray_modules_at_the_root():
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_every_folder_is_packaged():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]", text, re.M | re.S)
    assert listed
    folders = {path.parent for path in SOURCES}
    wanted = {"fathom", *(".".join(["fathom", *folder.relative_to(ROOT).parts]) for folder in folders)}
    assert set(re.findall(r'"([\w.]+)"', listed[1])) == wanted


def test_importing_fathom_imports_no_torch():
    assert fresh("import fathom, sys; print('torch' in sys.modules, 'transformers' in sys.modules)") == "False False"


def test_help_is_quick_and_imports_no_torch():
    code = """
import sys, time
from fathom.scripts.cli import main
assert main(["--help"]) == 0
print("torch" in sys.modules, "transformers" in sys.modules, time.process_time() < 0.5)
"""
    assert fresh(code).splitlines()[-1] == "False False True"


def test_every_exported_name_exists():
    for name in fathom.__all__:
        assert getattr(fathom, name) is not None
        assert name in dir(fathom)
    with pytest.raises(AttributeError, match="no attribute 'FathomForever'"):
        _ = fathom.FathomForever


def test_no_paths_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    paths = re.compile(r"(?<![\w.~])/(?:home|Users|root|work)/\w+|/tmp/\w+/v/bin")
    found = []
    for name in tracked.stdout.splitlines():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}: {match[0]}" for match in paths.finditer(text)]
    assert not found

"""Private names of other libraries that the package relies on: all of them stand in docs/private-names.md.

A private name can change in any release without a word. The table says for each one why it is needed and what happens
without it, so that an upgrade starts from a list. What is found in the source is compared with it, both ways.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import fathom

ROOT = Path(fathom.__file__).parent
TABLE = Path(__file__).parent.parent / "docs" / "private-names.md"
FOLDERS = ("modeling", "tokenizer", "training", "demo", "scripts")
LIBRARIES = ("torch", "transformers", "accelerate", "gradio", "gradio_client", "datasets", "tokenizers", "peft", "trl")
LIBRARIES += ("safetensors", "huggingface_hub")
# Modules without a page in their library's documentation: every name of theirs counts as private.
UNDOCUMENTED = ("transformers.cli.", "transformers.integrations.", "transformers.core_model_loading.")
UNDOCUMENTED += (
    "transformers.conversion_mapping.",
    "transformers.utils.generic.",
    "transformers.utils.output_capturing.",
)
# Of Python's own: methods of named tuples, `os._exit`. Private by their spelling alone.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in PUBLIC


def sources() -> Iterator[tuple[str, ast.Module]]:
    """The package's files by their path within it, parsed."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of imports from other libraries that are private, or of undocumented modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if any(map(is_private, name.split("."))) or name.startswith(UNDOCUMENTED):
                    yield name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES and any(map(is_private, alias.name.split("."))):
                    yield alias.name


def private_attributes(tree: ast.Module) -> Iterator[str]:
    """Private attributes that are read or written, by a dot or by `getattr`, `hasattr`, `setattr` and `.get`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [each.value for each in node.args[:2] if isinstance(each, ast.Constant)]
            if called in ("getattr", "hasattr", "setattr", "delattr", "get"):
                yield from (
                    name for name in names if isinstance(name, str) and is_private(name) and name.isidentifier()
                )


def own_attributes(tree: ast.Module) -> Iterator[str]:
    """Attributes that classes of the package define: methods, class variables, what is assigned to `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield member.name
                targets = member.targets if isinstance(member, ast.Assign) else [getattr(member, "target", None)]
                yield from (each.id for each in targets if isinstance(each, ast.Name))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield from (node.attr for owner in [node.value] if isinstance(owner, ast.Name) and owner.id == "self")


def overridden(path: str, tree: ast.Module) -> Iterator[str]:
    """Private names that a class of this file takes over from a class of another library."""
    written = set(own_attributes(tree))  # metaclasses and decorators add others
    module = importlib.import_module("fathom." + path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    for _, kind in inspect.getmembers(module, inspect.isclass):
        if kind.__module__ != module.__name__:
            continue
        foreign = [base for base in kind.__mro__ if base.__module__.split(".")[0] in LIBRARIES]
        for name in filter(is_private, written & vars(kind).keys()):
            if any(name in vars(base) or name in _annotations(base) for base in foreign):
                yield name


def _annotations(kind: type) -> dict:
    return vars(kind).get("__annotations__", {})


def found() -> set[tuple[str, str]]:
    trees = dict(sources())
    takes_over = {path: set(overridden(path, tree)) for path, tree in trees.items() if not path.endswith("__main__.py")}
    foreign = set().union(*takes_over.values())
    own = {name for tree in trees.values() for name in own_attributes(tree)} - foreign
    names = set()
    for path, tree in trees.items():
        names |= {(name, path) for name in imported(tree)}
        names |= {(name, path) for name in private_attributes(tree) if name not in own}
        names |= {(name, path) for name in takes_over.get(path, ())}
    return names


def listed() -> set[tuple[str, str]]:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", TABLE.read_text(encoding="utf-8"), re.M)
    assert all(why.strip() and without.strip() for _, _, why, without in rows)
    return {(name, file) for name, files, _, _ in rows for file in re.findall(r"`([^`]+)`", files)}


def test_the_table_lists_every_private_name_and_no_other():
    in_source, in_table = found(), listed()
    assert sorted(in_source - in_table) == [], "add these to docs/private-names.md"
    assert sorted(in_table - in_source) == [], "take these out of docs/private-names.md"


def test_the_search_finds_each_kind_of_use():
    tree = ast.parse(
        "from torch._C import _nn\nimport transformers._hidden\nfrom transformers.cli.serve import Serve\n"
        "x._private\ngetattr(x, '_by_name')\nvars(x).get('_by_key')\nx._replace()\n"
    )
    assert set(imported(tree)) == {"torch._C._nn", "transformers._hidden", "transformers.cli.serve.Serve"}
    assert set(private_attributes(tree)) == {"_private", "_by_name", "_by_key"}

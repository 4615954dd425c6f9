"""The pages for readers: twins in two languages say the same, links lead somewhere, verbs take the commands shown.

The commands of README.md and docs/training.md have tests of their own, which run them.
"""

import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from fathom.scripts.arguments import parse
from fathom.scripts.bench import BenchOptions

ROOT = Path(__file__).parents[2]
# Each has a twin with `.zh-CN` in its name. Pages that code writes translate numbers too, and have tests of their own.
TWINS = ("README.md", "docs/inference.md", "docs/training.md", "docs/results/speed/README.md")
PAGES = (*TWINS, *(page.replace(".md", ".zh-CN.md") for page in TWINS), "CONTRIBUTING.md", "docs/private-names.md")
README_LINES = 200


EXPLICIT_ANCHORS = {
    anchor for page in PAGES for anchor in re.findall(r'<a id="([^"]+)"></a>', (ROOT / page).read_text("utf-8"))
}


class Block(NamedTuple):
    """A heading, paragraph, list, table or code block of a page."""

    kind: str
    size: tuple[int, ...]  # level of a heading, items of a list, columns of the rows of a table
    links: Counter[str]
    code: Counter[str]  # of a code block its text, else the spans of code
    numbers: Counter[str]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def link_targets(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def target_of_twin(target: str) -> str:
    """A link's target without its language: the titles of sections are translated, and with them links to them."""
    file, hash_sign, anchor = target.replace(".zh-CN", "").partition("#")
    return file + hash_sign + (anchor if anchor in EXPLICIT_ANCHORS else "")


def blocks(text: str) -> list[Block]:
    """The parts of a page in order, without what differs between languages."""
    pieces = re.split(r"(^```.*?^```\n)", text, flags=re.M | re.S)
    found = []
    for piece in pieces:
        if piece.startswith("```"):
            # Comments in code are translated.
            found.append(Block("code", (), Counter(), Counter([re.sub(r"\s+#.*", "", piece)]), Counter()))
            continue
        found += [block(part) for part in re.split(r"\n{2,}", piece) if part.strip()]
    return found


def block(part: str) -> Block:
    """One part of a page that is no code block."""
    lines = part.strip().splitlines()
    if lines[0].startswith("#"):
        kind, size = "heading", (len(lines[0].split()[0]),)
    elif lines[0].startswith("|"):
        kind, size = "table", tuple(len(re.split(r"(?<!\\)\|", line)) for line in lines)
    elif lines[0].startswith("- "):
        kind, size = "list", (sum(line.startswith("- ") for line in lines),)
    elif lines[0].startswith("!["):
        kind, size = "picture", ()
    else:
        kind, size = "paragraph", ()
    prose = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1" if kind != "picture" else "", part)
    spans = re.findall(r"`([^`]+)`", prose)
    numbers = re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"`[^`]+`", "", prose))
    return Block(kind, size, Counter(map(target_of_twin, link_targets(part))), Counter(spans), Counter(numbers))


@pytest.mark.parametrize("page", TWINS)
def test_twins_have_the_same_parts(page):
    english, chinese = (blocks(read(name)) for name in (page, page.replace(".md", ".zh-CN.md")))
    for ours, theirs in zip(english, chinese, strict=False):
        assert ours == theirs
    assert len(english) == len(chinese)


def test_the_readme_is_short():
    for page in ("README.md", "README.zh-CN.md"):
        count = len(read(page).splitlines())
        assert count <= README_LINES, f"{page} has {count} lines; move details to a page under docs/"


def releases(bounds: str, to: str) -> str:
    """`>=2.13,<2.16` in words: `2.13 to 2.15`; only the first release where it is also the last."""
    major, first, same, last = re.fullmatch(r">=(\d+)\.(\d+),<(\d+)\.(\d+)", bounds).groups()
    assert major == same
    return f"{major}.{first}" if int(first) == int(last) - 1 else f"{major}.{first} {to} {major}.{int(last) - 1}"


@pytest.mark.parametrize(("page", "to"), [("README.md", "to"), ("README.zh-CN.md", "至")])
def test_the_readme_names_the_bounds_of_the_package(page, to):
    project = tomllib.loads(read("pyproject.toml"))["project"]
    bounds = dict(re.fullmatch(r"([\w-]+)(.*)", requirement).groups() for requirement in project["dependencies"])
    text = read(page)
    assert f"Python {releases(project['requires-python'], to)}" in text
    for name in ("torch", "transformers"):
        assert re.search(rf"\b{name} {re.escape(releases(bounds[name], to))}(?![\d.])", text), name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in link_targets(read(page)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    for path in re.findall(r"`((?:tests|scripts|modeling|training|docs|demo|tokenizer)/[\w./-]+)`", read(page)):
        assert (ROOT / path).exists(), path


def anchors(text: str) -> set[str]:
    """What `#...` of a link can name: explicit anchors and the titles of sections, as GitHub writes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles} | set(
        re.findall(r'<a id="([^"]+)"></a>', text)
    )


def bench_commands() -> list[str]:
    return sorted(
        {line for page in PAGES for line in read(page).splitlines() if line.lstrip().startswith("fathom bench ")}
    )


@pytest.mark.parametrize("command", bench_commands())
def test_bench_takes_every_command(command):
    _, verb, *words = shlex.split(command)
    parse(verb, "", [BenchOptions], words)

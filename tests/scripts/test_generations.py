"""`docs/generations.md`: as it would be written now, with links that hit, in two languages that say the same."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from fathom.modeling.presets import GENERATIONS, OFFICIAL
from fathom.scripts.generations.__main__ import main
from fathom.scripts.generations.page import files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = ["generations.md", "generations.zh-CN.md"]


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return files()


def test_the_page_is_what_the_code_says_now(written):
    """If this fails: python -m fathom.scripts.generations"""
    stale = [name for name, content in written.items() if (DOCS / name).read_text(encoding="utf-8") != content]
    assert not stale, f"run `python -m fathom.scripts.generations`: {', '.join(stale)}"


def test_no_picture_is_left_over(written):
    on_disk = {f"generations/{file.name}" for file in (DOCS / "generations").iterdir()}
    assert on_disk == {name for name in written if name.endswith(".svg")}


@pytest.mark.parametrize("name", PAGES)
def test_links_hit_the_code_that_they_name(name):
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L(\d+)-L(\d+)\)", (DOCS / name).read_text(encoding="utf-8"))
    assert len(links) > 20
    for qualified, file, first, last in links:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        block = lines[int(first) - 1 : int(last)]
        head = next(line for line in block if not line.lstrip().startswith("@"))
        indent = re.match(" *", head)[0]
        assert re.match(rf"{indent}(class|def) {qualified.rsplit('.')[-1]}\b", head)
        assert block[-1].startswith(indent + " ")
        following = next((line for line in lines[int(last) :] if line.strip()), "")
        assert not following.startswith(indent + " ")


@pytest.mark.parametrize("name", PAGES)
def test_every_preset_has_its_line_and_every_picture_its_file(name):
    page = (DOCS / name).read_text(encoding="utf-8")
    for preset in (*OFFICIAL, *(f"{generation}-nano" for generation in GENERATIONS)):
        assert f"| `{preset}` |" in page
    pictures = re.findall(r"!\[(.+?)\]\((.+?)\)", page)
    assert len(pictures) == 4
    for alt, file in pictures:
        assert (DOCS / file).is_file()
        assert len(alt) > 20
    for anchor in re.findall(r"\]\(#(\w+)\)", page):
        assert f'<a id="{anchor}"></a>' in page


def test_both_languages_have_the_same_figures():
    def rows(name: str) -> list[list[str]]:
        page = (DOCS / name).read_text(encoding="utf-8")
        return [re.findall(r"[\d.,]*\d", line) for line in page.splitlines() if line.startswith(("| `", "| ["))]

    english, chinese = map(rows, PAGES)
    assert english == chinese
    assert len(english) > 15


def test_published_figures_stand_on_the_page():
    """Bytes per token: DeepSeek-V4.1's report, figure 1b; parameters: the abstracts of the papers."""
    page = (DOCS / PAGES[0]).read_text(encoding="utf-8")
    for preset, figures in {
        "v3-671b": ["671.03 B", "70,272"],
        "v3.2-671b": ["48,068"],
        "v4-flash": ["284.33 B", "3,514"],
        "v4-pro": ["1.57 T"],
    }.items():
        line = next(line for line in page.splitlines() if line.startswith(f"| `{preset}` |"))
        assert all(f"| {figure} |" in line for figure in figures)


def test_pictures_are_well_formed_and_say_what_they_show(written):
    for name, content in written.items():
        if name.endswith(".svg"):
            svg = ElementTree.fromstring(content)
            space = "{http://www.w3.org/2000/svg}"
            assert svg.find(f"{space}title").text
            assert svg.find(f"{space}desc").text
            assert len(svg.findall(f"{space}text")) > 10
            assert all(float(node.get(side)) > 1 for node in svg.iter(f"{space}rect") for side in ("width", "height"))
            assert {node.tag for node in svg.iter()} & {f"{space}script", f"{space}image"} == set()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_no_word_leaves_its_picture_or_runs_into_another(written):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as runner:
        browser = runner.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        for name, content in written.items():
            if not name.endswith(".svg"):
                continue
            page.set_content(content)
            boxes = page.evaluate(
                "[...document.querySelectorAll('text')].map(t => {const b = t.getBBox();"
                " return [t.textContent, b.x, b.y, b.x + b.width, b.y + b.height]})"
            )
            assert [words for words, left, _, right, _ in boxes if left < 8 or right > 632] == [], name
            for n, (words, left, top, right, bottom) in enumerate(boxes):
                for others, left2, top2, right2, bottom2 in boxes[:n]:
                    across, down = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
                    assert across < 1 or down < 5, f"{name}: {words!r} over {others!r}"
        browser.close()


def test_written_where_it_is_told(written, tmp_path: Path):
    assert main([str(tmp_path)]) == 0
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(written)

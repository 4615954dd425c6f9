"""LOG.md and docs/log: one row per entry, one entry per row, and the same five parts in every entry."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LOG, FOLDER = ROOT / "LOG.md", ROOT / "docs/log"
HEADER = "| date | question | verdict | entry |"
PARTS = ("Question", "Change", "Command", "Result", "Verdict")
VERDICTS = ("kept", "reverted", "no gain", "negative result")
ENTRIES = sorted(FOLDER.glob("*"))


class Row(NamedTuple):
    date: str
    question: str
    verdict: str
    target: str


def rows(log: str) -> list[Row]:
    """The rows of the table in the text of LOG.md."""
    lines = log.splitlines()
    found = []
    for line in lines[lines.index(HEADER) + 2 :]:
        cells = re.fullmatch(r"\| (.+) \| (.+) \| (.+) \| \[.+\]\((.+)\) \|", line)
        assert cells, f"not a row of four cells, the last one a link: {line}"
        found.append(Row(*cells.groups()))
    return found


def parts(text: str) -> list[tuple[str, str]]:
    """Headings of the second level and what stands below each, outside of code blocks."""
    prose = re.sub(r"^```.*?^```$", "code", text, flags=re.M | re.S)
    pieces = re.split(r"^## (.+)$", prose, flags=re.M)[1:]
    return [(name.strip(), below.strip()) for name, below in zip(pieces[::2], pieces[1::2], strict=True)]


def verdict_of(text: str) -> str | None:
    """The verdict with which the last part of an entry begins; None if it begins with none."""
    start = dict(parts(text)).get("Verdict", "").lstrip("*").lower()
    return next((verdict for verdict in VERDICTS if re.match(rf"{verdict}\b", start)), None)


def row_for(entry: Path) -> str:
    """The row of LOG.md that an entry asks for."""
    text = entry.read_text(encoding="utf-8")
    title = text.splitlines()[0].removeprefix("# ")
    question = re.sub(r"\]\((?!\w+:)", "](docs/log/", " ".join(dict(parts(text))["Question"].split("\n\n")[0].split()))
    return f"| {entry.name[:10]} | {question} | {verdict_of(text)} | [{title}](docs/log/{entry.name}) |"


TABLE = rows(LOG.read_text(encoding="utf-8"))


def test_there_are_entries():
    assert len(ENTRIES) > 100


def test_every_entry_has_one_row():
    linked = Counter(row.target for row in TABLE)
    missing = [row_for(entry) for entry in ENTRIES if not linked[f"docs/log/{entry.name}"]]
    assert not missing, "\n".join(["LOG.md lacks these rows:", *missing])
    twice = [target for target, times in linked.items() if times > 1]
    assert not twice, f"LOG.md has several rows for {twice}"


def test_every_row_has_an_entry():
    astray = [row.target for row in TABLE if ROOT / row.target not in ENTRIES]
    assert not astray, f"LOG.md links to what docs/log does not have: {astray}"


def test_newest_first():
    dates = [row.date for row in TABLE]
    assert dates == sorted(dates, reverse=True)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.target.removeprefix("docs/log/"))
def test_row_agrees_with_its_entry(row):
    name = Path(row.target).name
    assert row.date == name[:10], f"{row.target} has the date {name[:10]}, its row {row.date}"
    assert row.verdict in VERDICTS, f"{row.verdict!r} is none of {VERDICTS}"
    if (ROOT / row.target).exists():
        verdict = verdict_of((ROOT / row.target).read_text(encoding="utf-8"))
        assert row.verdict == verdict, f"{row.target} begins its verdict with {verdict!r}, its row says {row.verdict!r}"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_entry_has_five_parts_in_order(entry):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-[a-z0-9-]+\.md", entry.name), "a name is date-topic.md, in lower case"
    text = entry.read_text(encoding="utf-8")
    assert text.startswith("# "), "an entry begins with its title"
    found = parts(text)
    assert [name for name, _ in found] == list(PARTS), "headings of the second level are the five parts, in order"
    empty = [name for name, below in found if not below]
    assert not empty, f"nothing stands below {empty}; say 'not recorded' where nothing was"
    assert verdict_of(text), f"a verdict begins with one of {VERDICTS}"


@pytest.mark.parametrize("page", [LOG, *ENTRIES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target


# The helpers above, on texts with a known answer: a test that could not fail would look the same.
GOOD = """# Title

## Question

Why?

## Change

A.

## Command

```bash
## no part
```

## Result

B.

## Verdict

"""


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("**Kept.**", "kept"),
        ("**No gain** where", "no gain"),
        ("Negative result: no", "negative result"),
        ("reverted", "reverted"),
        ("**Keptish**", None),
        ("It was kept.", None),
        ("", None),
    ],
)
def test_verdict_is_read_from_the_last_part(verdict, expected):
    assert verdict_of(GOOD + verdict) == expected
    assert [name for name, _ in parts(GOOD + verdict)] == list(PARTS)


def test_a_missing_row_is_spelled_out(tmp_path):
    entry = tmp_path / "2026-12-01-topic.md"
    entry.write_text(GOOD + "**Kept.** Yes.\n", encoding="utf-8")
    row = row_for(entry)
    assert row == "| 2026-12-01 | Why? | kept | [Title](docs/log/2026-12-01-topic.md) |"
    assert rows(f"{HEADER}\n|---|\n{row}") == [Row("2026-12-01", "Why?", "kept", "docs/log/2026-12-01-topic.md")]

"""All files of a benchmark, and the table among them.

A cell of the table holds a contender's figure and how many times better than the first column it is.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .curves import cost_against_context

SECONDS = ("decode", "generate")


def files(report: Mapping[str, Any]) -> dict[str, str]:
    """File contents by name: `bench.json`, `bench.md`, and a picture per kind, dtype and batch size with a curve."""
    pictures = {}
    for kind in ("decode", "prefill"):
        groups = dict.fromkeys((row["dtype"], row["batch"]) for row in report["rows"] if row["kind"] == kind)
        for dtype, batch in groups:
            picture = cost_against_context(report["rows"], kind, dtype, batch)
            if picture is not None:
                pictures[f"{kind}-{dtype}-{batch}.svg"] = picture
    return {"bench.json": json.dumps(report, indent=1) + "\n", "bench.md": page(report, list(pictures)), **pictures}


def page(report: Mapping[str, Any], pictures: Iterable[str] = ()) -> str:
    """The report as Markdown."""
    machine = report["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}; torch {machine['torch']}, "
        f"transformers {machine['transformers']}, fathom {machine['fathom']}"
        + (f" ({machine['commit']})" if machine["commit"] else "")
        + (", with native functions" if machine["kernels"] else ""),
        "",
        *models(report["plan"]),
    ]
    for dtype, ceiling in report["ceilings"].items():
        lines.append(
            f"- {dtype}: matrix product {ceiling['flops'] / 1e9:,.0f} GFLOP/s, "
            f"reading {ceiling['bandwidth'] / 1e9:.1f} GB/s"
        )
    for model, reason in report["without_stock"].items():
        lines.append(f"- {model} without stock: {reason}")
    lines += [
        "",
        f"Median of {report['plan']['rounds']} interleaved rounds. `decode` and `generate`: ms per step; `prefill`, "
        "`serve` and `train`: tokens per second; `memory`: largest of the process. `limit`: the share of the machine's "
        "matrix product (prefill, train) or reading (decode) that each contender reaches. `cache`: what is held after "
        "the last token.",
    ]
    for model in dict.fromkeys(row["model"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        lines += ["", f"## {model}", "", table(rows)]
    for picture in pictures:
        lines += ["", f"![{picture.removesuffix('.svg').replace('-', ' ')}]({picture})"]
    return "\n".join(lines) + "\n"


def models(plan: Mapping[str, Any]) -> list[str]:
    """What was measured, as lines of a list."""
    if plan["checkpoint"] is not None:
        return []
    changes = ", ".join(f"{name}={value}" for name, value in plan["override"].items())
    return [f"- models: {plan['size']}, random weights" + (f", {changes}" if changes else "")]


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of one model as a Markdown table."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row["contenders"]))
    cells = [["kind", "dtype", "batch", "context", *names, "limit", "cache"]]
    cells.append([":--", ":--", *["--:"] * (len(cells[0]) - 2)])
    for row in rows:
        each = row["contenders"]
        cells.append(
            [
                *(str(row[field]) for field in ("kind", "dtype", "batch", "context")),
                *(cell(row["kind"], each[name], name == next(iter(each))) if name in each else "" for name in names),
                " / ".join(f"{one['share']:.1%}" for one in each.values() if "share" in one),
                " / ".join(size(one["cache_bytes"]) for one in each.values() if "cache_bytes" in one),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def cell(kind: str, figures: Mapping[str, Any], first: bool) -> str:
    """A contender's figure, and how many times better than the first it is."""
    if kind == "memory":
        if figures["peak_bytes"] is None:
            return "out of memory"
        value, times = size(figures["peak_bytes"]), figures["saving"]
    elif kind in SECONDS:
        value, times = f"{figures['seconds_per_step'] * 1e3:,.2f} ms", figures["speedup"]
    else:
        value, times = f"{figures['tokens_per_second']:,.0f} /s", figures["speedup"]
    return value if first or times is None else f"{value} ({times:.2f}x)"


def size(nbytes: float) -> str:
    """1,342,052 as `1.34 MB`, in powers of ten."""
    for unit, letters in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.2f} {letters}"
    return f"{nbytes:.0f} bytes"

"""The cost of a token against the context: a panel per model, a curve per contender, both axes logarithmic."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..generations.svg import WIDTH, Picture

COLOUR = {"stock": "warm", "fathom": "read", "compiled": "value", "reference": "soft"}
LEFT, TOP, COLUMNS = 28, 96, 2
PANEL_WIDTH, PANEL_HEIGHT = 284, 214
# Inside a panel: room for the milliseconds at its left, its title above and the contexts below.
INDENT, HEAD, FOOT = 54, 30, 30


def cost_against_context(rows: Iterable[Mapping[str, Any]], kind: str, dtype: str, batch: int) -> str | None:
    """The picture as SVG; None if no model was measured at two contexts or more.

    Args:
        rows: of the report.
        kind: `decode` (ms per step) or `prefill` (ms per token).
    """
    chosen = [row for row in rows if (row["kind"], row["dtype"], row["batch"]) == (kind, dtype, batch)]
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for row in chosen:
        for name, each in row["contenders"].items():
            points = curves.setdefault(row["model"], {}).setdefault(name, {})
            tokens = 1 if kind == "decode" else row["context"]
            points[row["context"]] = each["seconds_per_step"] / tokens * 1e3
    curves = {model: each for model, each in curves.items() if len(next(iter(each.values()))) > 1}
    if not curves:
        return None
    unit = "ms per step" if kind == "decode" else "ms per token"
    title = f"{kind.capitalize()}, {unit}, against the context"
    picture = Picture(title, f"{title}: {', '.join(curves)}, {dtype}, batch {batch}. The figures stand in bench.json.")
    picture.text(LEFT, 40, title, size=21, bold=True)
    x = float(LEFT)
    for name in dict.fromkeys(name for each in curves.values() for name in each):
        picture.line(x, 66, x + 22, 66, COLOUR[name], width=3)
        picture.text(x + 30, 71.5, name, fill="soft")
        x += 54 + 9 * len(name)
    picture.text(WIDTH - LEFT, 71.5, f"{dtype}, batch {batch}", fill="soft", anchor="end")

    everything = [point for each in curves.values() for points in each.values() for point in points.items()]
    contexts = sorted({context for context, _ in everything})
    lowest = math.floor(math.log10(min(cost for _, cost in everything)))
    highest = max(math.ceil(math.log10(max(cost for _, cost in everything))), lowest + 1)
    for number, (model, each) in enumerate(curves.items()):
        left = LEFT + number % COLUMNS * (WIDTH - 2 * LEFT - PANEL_WIDTH)
        top = TOP + number // COLUMNS * PANEL_HEIGHT
        _panel(picture, left, top, model, each, contexts, (lowest, highest))
    picture.height = TOP + math.ceil(len(curves) / COLUMNS) * PANEL_HEIGHT + 6
    return picture.render()


def _panel(
    picture: Picture,
    left: float,
    top: float,
    model: str,
    curves: Mapping[str, Mapping[int, float]],
    contexts: list[int],
    decades: tuple[int, int],
) -> None:
    """One model, with the ranges that all panels share, so that they can be compared."""
    lowest, highest = decades
    begin, end = left + INDENT, left + PANEL_WIDTH - 12
    floor, ceiling = top + PANEL_HEIGHT - FOOT, top + HEAD
    span = math.log(contexts[-1] / contexts[0])

    def across(context: int) -> float:
        return begin + (end - begin) * math.log(context / contexts[0]) / span

    def up(cost: float) -> float:
        return floor - (floor - ceiling) * (math.log10(cost) - lowest) / (highest - lowest)

    picture.text(begin, top + 18, model, size=18, bold=True)
    for decade in range(lowest, highest + 1):
        height = up(10.0**decade)
        picture.line(begin, height, end, height, "edge", width=1)
        picture.text(
            begin - 8, height + 5.5, f"{10.0**decade:,.{max(-decade, 0)}f}", size=16, fill="soft", anchor="end"
        )
    last = -math.inf
    for context in contexts:
        if across(context) - last > 44:
            last = across(context)
            picture.text(last, floor + 22, thousands(context), size=16, fill="soft", anchor="middle")
    for name, points in curves.items():
        places = [(across(context), up(cost)) for context, cost in sorted(points.items())]
        picture.path("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places), COLOUR[name], width=3)
        for x, y in places:
            picture.circle(x, y, 4, COLOUR[name])


def thousands(number: int) -> str:
    """2048 as `2k`, 128 as it is."""
    return f"{number // 1024}k" if number >= 1024 and number % 1024 == 0 else str(number)

"""The plots of `docs/results`: a row per variant, a dot per seed, a bar of two standard deviations around the mean."""

import math
from typing import Any, NamedTuple

from ...training.experiments import EXPERIMENTS, FIGURES, VARIANTS
from ..generations.svg import WIDTH, Picture
from .words import Results, Say, number

LEFT, RIGHT = 28, WIDTH - 28
AXIS_LEFT, AXIS_RIGHT = 232, WIDTH - 120
ROW = 34


class Row(NamedTuple):
    label: str
    values: list[float]  # one per seed


class Panel(NamedTuple):
    """Rows on one axis."""

    title: str
    digits: int
    rows: list[Row]


def plot(name: str, results: Results, say: Say) -> Picture:
    """The picture of an experiment."""
    experiment = EXPERIMENTS[name]
    picture = Picture(
        say(*experiment.title),
        say(
            "A dot is a run, the line their mean, the bar two standard deviations.",
            "一点为一次运行，竖线为均值，横条为两倍标准差。",
        ),
    )
    picture.text(LEFT, 40, picture.title, size=20, bold=True)
    picture.text(LEFT, 66, picture.description, size=16, fill="soft")
    top = 84.0
    for panel in panels(name, results, say):
        top = _draw(picture, top, panel)
    if depths := gains(name, results):
        top = _draw_gains(picture, top, depths, say)
    picture.height = top + 8
    return picture


def panels(name: str, results: Results, say: Say) -> list[Panel]:
    """One per figure with a row per variant; where there is one variant, one per unit with a row per figure."""
    experiment = EXPERIMENTS[name]
    if len(experiment.variants) > 1:
        found = []
        for figure in experiment.figures:
            rows = [
                Row(say(*VARIANTS[variant].label), _values(results[variant], figure)) for variant in experiment.variants
            ]
            about = FIGURES[figure]
            found.append(Panel(title_of(figure, say), about.digits, [row for row in rows if row.values]))
        return [panel for panel in found if len(panel.rows) > 1]
    by_unit: dict[str, Panel] = {}
    for figure in experiment.figures:
        about = FIGURES[figure]
        panel = by_unit.setdefault(say(*about.unit), Panel(say(*about.unit), about.digits, []))
        label = say(*about.of) if about.of else say("attention to all keys", "注意所有键")
        panel.rows.append(Row(label, _values(results[experiment.variants[0]], figure)))
    return list(by_unit.values())


def title_of(figure: str, say: Say) -> str:
    """A figure's name."""
    about = FIGURES[figure]
    return say(*about.unit) + (say(", ", "，") + say(*about.of) if about.of else "")


def gains(name: str, results: Results) -> dict[str, list[float]]:
    """Backward Amax gain after each sub-layer by variant, mean over seeds."""
    found = {}
    for variant in EXPERIMENTS[name].variants:
        runs = [
            result["figures"]["gain_by_depth"] for result in results[variant] if "gain_by_depth" in result["figures"]
        ]
        if runs:
            found[variant] = [sum(step[1] for step in steps) / len(steps) for steps in zip(*runs, strict=True)]
    return found


def _values(runs: list[dict[str, Any]], figure: str) -> list[Any]:
    return [result["figures"][figure] for result in runs if figure in result["figures"]]


def spread_of(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation, 0 of one value."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1))


def _draw(picture: Picture, top: float, panel: Panel) -> float:
    """Draws a panel at `top`, and gives where it ends."""
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    picture.text(LEFT, top + 27, panel.title, size=18, bold=True)
    spreads = [spread_of(row.values) for row in panel.rows]
    low = min([mean - 2 * deviation for mean, deviation in spreads] + [min(row.values) for row in panel.rows])
    high = max([mean + 2 * deviation for mean, deviation in spreads] + [max(row.values) for row in panel.rows])
    scale = (AXIS_RIGHT - AXIS_LEFT) / ((high - low) or 1)

    def x(value: float) -> float:
        return AXIS_LEFT + (value - low) * scale

    y = top + 54
    for row, (mean, deviation) in zip(panel.rows, spreads, strict=True):
        picture.text(LEFT, y + 6, row.label, size=16)
        picture.line(AXIS_LEFT, y, AXIS_RIGHT, y, "edge", width=1)
        picture.rect(x(mean - 2 * deviation), y - 6, 4 * deviation * scale, 12, fill="pale", radius=4)
        for value in row.values:
            picture.circle(x(value), y, 4.5, fill="read")
        picture.line(x(mean), y - 10, x(mean), y + 10, "warm", width=2.5)
        picture.text(RIGHT, y + 6, number(mean, panel.digits), size=16, anchor="end", bold=True)
        y += ROW
    picture.text(AXIS_LEFT, y + 2, number(low, panel.digits), size=16, fill="soft")
    picture.text(AXIS_RIGHT, y + 2, number(high, panel.digits), size=16, fill="soft", anchor="end")
    return y + 18


def _draw_gains(picture: Picture, top: float, gains: dict[str, list[float]], say: Say) -> float:
    """Draws gain over depth as lines at `top`, and gives where they end."""
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    words = say("Amax gain backward, from the first sub-layer to each", "反向 Amax 增益，从第一个子层到每个子层")
    picture.text(LEFT, top + 27, words, size=18, bold=True)
    bottom, height = top + 210, 150
    low, high = 1.0, max(max(line) for line in gains.values())
    low = min(low, *(min(line) for line in gains.values()))
    depth = max(len(line) for line in gains.values())
    for value in (low, high):
        y = bottom - (value - low) / ((high - low) or 1) * height
        picture.line(LEFT + 54, y, RIGHT - 90, y, "edge", width=1)
        picture.text(LEFT + 44, y + 6, number(value, 2), size=16, fill="soft", anchor="end")
    for (variant, line), colour in zip(gains.items(), ("warm", "read"), strict=False):
        points = [
            (
                LEFT + 60 + index * (RIGHT - LEFT - 160) / max(depth - 1, 1),
                bottom - (value - low) / ((high - low) or 1) * height,
            )
            for index, value in enumerate(line)
        ]
        path = "L".join(f"{across:.1f} {down:.1f}" for across, down in points)
        picture.path(f"M{path}", colour, width=2.5)
        across, down = points[-1]
        picture.text(across + 10, down + 6, say(*VARIANTS[variant].label), fill=colour)
    picture.text(
        RIGHT - 90, bottom + 26, say(f"{depth} sub-layers", f"{depth} 个子层"), size=16, fill="soft", anchor="end"
    )
    return bottom + 42

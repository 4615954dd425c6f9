"""The plots of `docs/results`: a row per variant, a dot per seed, a bar of two standard deviations around the mean."""

import math
from typing import Any, NamedTuple

from ...training.ablation import spread
from ...training.experiments import EXPERIMENTS, FIGURES, Words
from ..generations.svg import WIDTH, Picture
from .words import Results, Say, number

LEFT, RIGHT = 28, WIDTH - 28
AXIS_LEFT, AXIS_RIGHT = 232, WIDTH - 120
ROW = 34


class Row(NamedTuple):
    """A figure of a variant: every run's, and their mean and standard deviation (0 for one run)."""

    label: str
    values: list[float]
    mean: float
    deviation: float


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
        top = _draw_gains(picture, top, depths, experiment.variants, say)
    picture.height = top + 8
    return picture


def panels(name: str, results: Results, say: Say) -> list[Panel]:
    """One per figure with a row per variant; where there is one variant, one per unit with a row per figure."""
    experiment = EXPERIMENTS[name]
    found: dict[str, Panel] = {}
    for figure in experiment.figures:
        about = FIGURES[figure]
        for variant, label in experiment.variants.items():
            title = title_of(figure, say)
            if len(experiment.variants) == 1:
                title, label = say(*about.unit), about.of or ("attention to all keys", "注意所有键")
            panel = found.setdefault(title, Panel(title, about.digits, []))
            if (over_seeds := spread(results[variant], figure)) is not None:
                deviation = 0.0 if math.isnan(over_seeds.deviation) else over_seeds.deviation
                values = values_of(results[variant], figure)
                panel.rows.append(Row(say(*label), values, over_seeds.mean, deviation))
    return [panel for panel in found.values() if len(panel.rows) > 1]


def title_of(figure: str, say: Say) -> str:
    """A figure's name."""
    about = FIGURES[figure]
    return say(*about.unit) + (say(", ", "，") + say(*about.of) if about.of else "")


def gains(name: str, results: Results) -> dict[str, list[float]]:
    """Backward Amax gain after each sub-layer by variant, mean over seeds."""
    found = {}
    for variant in EXPERIMENTS[name].variants:
        runs = values_of(results[variant], "gain_by_depth")
        if runs:
            found[variant] = [sum(step[1] for step in steps) / len(steps) for steps in zip(*runs, strict=True)]
    return found


def values_of(runs: list[dict[str, Any]], figure: str) -> list[Any]:
    """A figure of those runs that have it."""
    return [result["figures"][figure] for result in runs if figure in result["figures"]]


def _draw(picture: Picture, top: float, panel: Panel) -> float:
    """Draws a panel at `top`, and gives where it ends."""
    picture.line(LEFT, top, RIGHT, top, "edge", width=1)
    picture.text(LEFT, top + 27, panel.title, size=18, bold=True)
    low = min(min(*row.values, row.mean - 2 * row.deviation) for row in panel.rows)
    high = max(max(*row.values, row.mean + 2 * row.deviation) for row in panel.rows)
    scale = (AXIS_RIGHT - AXIS_LEFT) / ((high - low) or 1)

    def x(value: float) -> float:
        return AXIS_LEFT + (value - low) * scale

    y = top + 54
    for row in panel.rows:
        picture.text(LEFT, y + 6, row.label, size=16)
        picture.line(AXIS_LEFT, y, AXIS_RIGHT, y, "edge", width=1)
        picture.rect(x(row.mean - 2 * row.deviation), y - 6, 4 * row.deviation * scale, 12, fill="pale", radius=4)
        for value in row.values:
            picture.circle(x(value), y, 4.5, fill="read")
        picture.line(x(row.mean), y - 10, x(row.mean), y + 10, "warm", width=2.5)
        picture.text(RIGHT, y + 6, number(row.mean, panel.digits), size=16, anchor="end", bold=True)
        y += ROW
    picture.text(AXIS_LEFT, y + 2, number(low, panel.digits), size=16, fill="soft")
    picture.text(AXIS_RIGHT, y + 2, number(high, panel.digits), size=16, fill="soft", anchor="end")
    return y + 18


def _draw_gains(
    picture: Picture, top: float, gains: dict[str, list[float]], labels: dict[str, Words], say: Say
) -> float:
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
        picture.text(across + 10, down + 6, say(*labels[variant]), fill=colour)
    picture.text(
        RIGHT - 90, bottom + 26, say(f"{depth} sub-layers", f"{depth} 个子层"), size=16, fill="soft", anchor="end"
    )
    return bottom + 42

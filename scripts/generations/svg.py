"""A picture of shapes and text as SVG, for pages that are read in light and dark and on a phone.

It brings its own background, and its colours follow the reader's colour scheme. 640 units wide with text of 16 and more
it can still be read where a phone shows it at half its size. Text stays text.
"""

from html import escape

WIDTH = 640

# Roles, not hues: light and dark colours of everything that is drawn.
COLOURS = {
    "card": ("#ffffff", "#12171e"),
    "edge": ("#d5dbe3", "#323b46"),
    "ink": ("#1c2530", "#e8eef5"),
    "soft": ("#566271", "#a3afbd"),
    "faint": ("#c3cbd5", "#46515e"),
    "pale": ("#d8e4fb", "#25395c"),
    "read": ("#2563d9", "#71a5ff"),
    "value": ("#0f8a72", "#4ccbb0"),
    "warm": ("#d2620b", "#ff9d52"),
    "plain": ("#eef2f7", "#1e2732"),
}
_FONTS = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", '
    "sans-serif"
)


class Picture:
    """Shapes in the order in which they are painted; `fill` and `stroke` are names of `COLOURS`."""

    def __init__(self, title: str, description: str):
        self.title = title
        self.description = description
        self.height = 0.0
        self.shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        size: int = 17,
        fill: str = "ink",
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """Words from `x` on, around it or up to it, by `anchor`; draws nothing where there are no words."""
        if not words:
            return
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" class="f-{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str | None = None,
        stroke: str | None = None,
        radius: float = 2,
        opacity: float = 1,
    ) -> None:
        self.shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(radius)}" '
            f'class="{_paint(fill, stroke)}"{_see_through(opacity)}/>'
        )

    def circle(self, x: float, y: float, radius: float, fill: str | None = None, stroke: str | None = None) -> None:
        self.shapes.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="{_paint(fill, stroke)}"/>')

    def path(self, d: str, stroke: str, width: float = 1.5, opacity: float = 1, arrow: bool = False) -> None:
        """A line along `d`; with an arrow head at its end."""
        head = f' marker-end="url(#to-{stroke})"' if arrow else ""
        self.shapes.append(
            f'<path d="{d}" class="{_paint(None, stroke)}" stroke-width="{_n(width)}" stroke-linecap="round"'
            f"{_see_through(opacity)}{head}/>"
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, **style) -> None:
        self.path(f"M{_n(x1)} {_n(y1)}L{_n(x2)} {_n(y2)}", stroke, **style)

    def render(self) -> str:
        """The whole file, `height` units high."""
        used = "".join(self.shapes)
        names = [name for name in COLOURS if f"f-{name}" in used or f"s-{name}" in used or name in ("card", "edge")]
        heads = "".join(
            f'<marker id="to-{name}" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" class="f-{name}"/></marker>'
            for name in names
            if f"#to-{name}" in used
        )
        styles = [_style(names, 0), f"@media (prefers-color-scheme: dark){{{_style(names, 1)}}}"]
        return "\n".join(
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {_n(self.height)}" width="{WIDTH}" '
                f'height="{_n(self.height)}" role="img" aria-labelledby="title desc" font-family=\'{_FONTS}\'>',
                f'<title id="title">{escape(self.title)}</title>',
                f'<desc id="desc">{escape(self.description)}</desc>',
                f"<style>{''.join(styles)}</style>",
                f"<defs>{heads}</defs>",
                f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{_n(self.height - 1)}" rx="10" '
                'class="f-card s-edge"/>',
                *self.shapes,
                "</svg>\n",
            )
        )


def _style(names: list[str], scheme: int) -> str:
    return ".none{fill:none}" + "".join(
        f".f-{name}{{fill:{COLOURS[name][scheme]}}}.s-{name}{{stroke:{COLOURS[name][scheme]}}}" for name in names
    )


def _paint(fill: str | None, stroke: str | None) -> str:
    return " ".join(["f-" + fill if fill else "none", *(["s-" + stroke] if stroke else [])])


def _see_through(opacity: float) -> str:
    return f' opacity="{opacity:.2f}"' if opacity < 1 else ""


def _n(number: float) -> str:
    return f"{round(number, 1):.10g}"

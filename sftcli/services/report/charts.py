"""Charts as inline SVG that follows the colors of its page."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Colors that are drawn with, and the variables of the page that replace them.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(_SERIES)
}
_MARGINS = {
    "left": 0.145,
    "right": 0.985,
    "bottom": 0.19,
    "top": 0.965,
}  # wide enough for labels like 0.00025 and 120000


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A named curve. ``color`` counts the colors of the page; ``kind`` "dots" joins marked points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    kind: Literal["line", "faint", "dots"] = "line"


def draw(title: str, series: Sequence[Series], *, y_label: str, from_zero: bool, identity: str) -> str:
    """Return one chart over steps as an ``<svg>`` element.

    Args:
        title: Read out to people who cannot see it.
        series: The curves.
        y_label: At its side.
        from_zero: Begin the vertical axis at 0, where a part of it would make small changes look large.
        identity: Unique on the page: ids inside the SVG are made from it.
    """
    with rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11.0, "svg.hashsalt": identity}
    ):
        figure = Figure(figsize=(6.4, 3.0))
        figure.subplots_adjust(**_MARGINS)  # a computed layout draws everything twice
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for one in series:
            style = {"line": "-", "faint": "-", "dots": "o--"}[one.kind]
            alpha, width = (0.4, 1.0) if one.kind == "faint" else (1.0, 1.8)
            axes.plot(
                one.x, one.y, style, color=_SERIES[one.color % len(_SERIES)], alpha=alpha, linewidth=width,
                markersize=5, label=one.name if one.kind != "faint" else None,
            )  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half step
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step", color=_INK)
        axes.set_ylabel(y_label, color=_INK)
        axes.tick_params(colors=_INK)
        axes.grid(visible=True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        for name, spine in axes.spines.items():
            spine.set_visible(name in {"left", "bottom"})
            spine.set_color(_GRID)
        if sum(one.kind != "faint" for one in series) > 1:
            axes.legend(frameon=False, labelcolor=_INK)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None}
        )
    return _inline(file.getvalue(), title, identity)


def _inline(svg: str, title: str, identity: str) -> str:
    """Return the element without its file header, in the page's colors, at any width, with ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" class="chart" ', 1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{identity}-\1"', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{identity}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg

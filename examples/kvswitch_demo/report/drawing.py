"""Figures as SVG that is part of a page: the page's fonts, and colours that follow its theme."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["LINES", "PALETTE", "WIDTH", "colour", "plain", "styled", "to_svg"]

PALETTE = {
    "ink": ("#1d1f23", "#e9eaec"),
    "muted": ("#5d636b", "#a7adb5"),
    "rule": ("#d9dce1", "#3b4047"),
    "paper": ("#fefefe", "#16181b"),
    "forward": ("#c8ced6", "#4c545e"),
    "waiting": ("#2b2e33", "#f4f4f1"),
    "planning": ("#00a079", "#35d6a8"),
    "reference": ("#8a9199", "#c3c7cc"),
    "recompute": ("#9e1b32", "#ff6b8b"),
    "per-block": ("#d98200", "#ffc04d"),
    "kvswitch": ("#1f66b8", "#5aa9ff"),
}
"""Colours by what they stand for: (on light paper, on dark paper).

The modes' stay apart for the colour-blind: CIELAB distance >= 22 under each of the three kinds of
dichromacy.
"""

LINES = {"reference": (0, (1, 1.2)), "recompute": (0, (4, 1.5)), "per-block": (0, (7, 1.5, 1, 1.5))}
"""Dashes of the modes' lines, solid for kvswitch: colour alone distinguishes nothing."""

WIDTH = 10.8  # inches; the page is as many hundreds of pixels wide

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "kvswitch",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": PALETTE["muted"][0],
    "axes.labelcolor": PALETTE["muted"][0],
    "axes.titlecolor": PALETTE["ink"][0],
    "text.color": PALETTE["ink"][0],
    "xtick.color": PALETTE["muted"][0],
    "ytick.color": PALETTE["muted"][0],
    "xtick.labelcolor": PALETTE["muted"][0],
    "ytick.labelcolor": PALETTE["ink"][0],
    "grid.color": PALETTE["rule"][0],
    "grid.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "hatch.linewidth": 0.9,
}


def colour(name: str) -> str:
    """A colour of the palette to draw with; unknown modes are grey."""
    return PALETTE.get(name, PALETTE["muted"])[0]


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's settings while a figure of the report is drawn and written."""
    with mpl.rc_context(_STYLE):
        yield


def plain(axes: Axes, grid: Literal["x", "y"]) -> None:
    """Only a grid along one axis ("x" or "y"), no ticks or spine on the other."""
    axes.grid(axis=grid)
    other = "left" if grid == "x" else "bottom"
    axes.spines[other].set_visible(False)
    axes.tick_params(axis="y" if grid == "x" else "x", length=0)


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Write a figure as an ``<svg>`` element for a page that defines the palette's variables.

    Parameters
    ----------
    figure : Figure
        Drawn within `styled`, in colours of the palette.
    name : str
        Made part of every id, so that several figures may stand on a page.
    title : str
        For readers who do not see it.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    tag = rf'<svg \1 role="img" aria-label="{title}">'
    svg = re.sub(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', tag, svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    for variable, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg.strip()

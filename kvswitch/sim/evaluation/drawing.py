"""Plots as SVG, to be put into a page."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from kvswitch.sim.evaluation.figure import Plot

__all__ = ["draw"]

_COLOURS = ("#b0413e", "#c98a2b", "#6b8f3c", "#3c7f8f", "#5b4b8a", "#8a4b73", "#6b6b6b")
_MARKERS = "osD^vPX"
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "svg.fonttype": "none",
    "svg.hashsalt": "kvswitch",
    "legend.frameon": False,
}


def draw(plots: Sequence[Plot]) -> str:
    """Draw plots side by side, two in a row; "" if none has anything to show."""
    plots = [plot for plot in plots if _has_values(plot)]
    if not plots:
        return ""
    rows = (len(plots) + 1) // 2
    with rc_context(_STYLE):
        figure = Figure((9.6, 3.3 * rows), layout="constrained")
        axes = figure.subplots(rows, 2 if len(plots) > 1 else 1, squeeze=False).ravel()
        for panel, plot in zip(axes, plots, strict=False):
            _panel(panel, plot)
        for panel in axes[len(plots) :]:
            panel.set_axis_off()
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _has_values(plot: Plot) -> bool:
    return any(value is not None for values in plot.series.values() for value in values)


def _panel(axes: Axes, plot: Plot) -> None:
    if plot.kind == "bars":
        _bars(axes, plot)
    else:
        _lines(axes, plot)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    if len(plot.series) > 1:
        axes.legend(fontsize=8)


def _bars(axes: Axes, plot: Plot) -> None:
    width = 0.8 / len(plot.series)
    for number, (name, values) in enumerate(plot.series.items()):
        places = [i + (number - (len(plot.series) - 1) / 2) * width for i in range(len(plot.x))]
        heights = [value or 0.0 for value in values]
        axes.bar(places, heights, width, label=name, color=_COLOURS[number % len(_COLOURS)])
    axes.set_xticks(range(len(plot.x)), [str(x) for x in plot.x])


def _lines(axes: Axes, plot: Plot) -> None:
    words = isinstance(plot.x[0], str)
    for number, (name, values) in enumerate(plot.series.items()):
        known = [
            (i if words else x, v)
            for i, (x, v) in enumerate(zip(plot.x, values, strict=True))
            if v is not None
        ]
        axes.plot(
            [x for x, _ in known],
            [v for _, v in known],
            label=name,
            color=_COLOURS[number % len(_COLOURS)],
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
        )
    if "y" in plot.log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if words:
        axes.set_xticks(range(len(plot.x)), [str(x) for x in plot.x])
    elif "x" in plot.log:
        axes.set_xscale("log")
        axes.set_xticks(_spaced([float(x) for x in plot.x]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())


def _spaced(values: list[float]) -> list[float]:
    """Values that are far enough apart on a logarithmic axis for their labels."""
    spaced: list[float] = []
    for value in sorted(values):
        if not spaced or value >= 1.4 * spaced[-1]:
            spaced.append(value)
    return spaced

"""The report's plots of whole runs: speed, volumes, distributions, where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kvswitch_demo.report.drawing import LINES, WIDTH, colour, plain, styled, to_svg
from kvswitch_demo.report.table import title
from kvswitch_demo.results import RunResult, figures, first_token_times, token_gaps

__all__ = ["distributions", "time_shares", "volumes"]

_POINTS = 600  # of a curve, at most


def volumes(runs: Sequence[RunResult]) -> str:
    """Throughput, and bytes moved each way, as bars."""
    with styled():
        figure = Figure((WIDTH, 0.75 + 0.36 * len(runs)), layout="constrained")
        speed, moved = figure.subplots(1, 2)
        rows = [figures(run) for run in runs]
        _bars(speed, runs, [row["throughput_tokens_per_s"] for row in rows], "{:,.1f}")
        speed.set(title="Throughput", xlabel="new output tokens per second")
        out, back = ([row[way] / 1e6 for row in rows] for way in ("bytes_out", "bytes_in"))
        _bars(moved, runs, out, "{:,.0f} out", offset=0.2, height=0.36)
        _bars(moved, runs, back, "{:,.0f} in", offset=-0.2, height=0.36, alpha=0.55)
        moved.set(title="Bytes moved each way", xlabel="MB")
        return to_svg(figure, "volumes", "Throughput and bytes moved by each mode")


def distributions(runs: Sequence[RunResult]) -> str:
    """Cumulative distributions of TTFT and of time between tokens."""
    with styled():
        figure = Figure((WIDTH, 3.7), layout="constrained")
        panels = figure.subplots(1, 2)
        _distribution(panels[0], runs, first_token_times, (0.5, 0.9, 0.95, 0.99))
        panels[0].set(title="Time to first token", xlabel="seconds", ylabel="share of turns")
        _distribution(panels[1], runs, token_gaps, (0.5, 0.9, 0.99, 0.999))
        panels[1].set(title="Time between tokens", xlabel="seconds", ylabel="share of tokens")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside upper center", ncols=len(runs), frameon=False,
            handlelength=3.2,
        )  # fmt: skip
        return to_svg(figure, "distributions", "Cumulative distributions of both latencies")


def time_shares(runs: Sequence[RunResult]) -> str:
    """Forward, stall and scheduling: for an iteration, and for an output token."""
    with styled():
        figure = Figure((WIDTH, 1.05 + 0.36 * len(runs)), layout="constrained")
        iteration, token = figure.subplots(1, 2)
        rows = [figures(run) for run in runs]
        _parts(iteration, runs, rows, "iterations")
        iteration.set(title="A mean iteration", xlabel="milliseconds")
        _parts(token, runs, rows, "output_tokens")
        token.set(title="The same for each output token", xlabel="milliseconds")
        handles, labels = token.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
        return to_svg(figure, "time", "Where an iteration's time goes")


def _bars(
    axes: Axes,
    runs: Sequence[RunResult],
    values: Sequence[float],
    label: str,
    *,
    offset: float = 0.0,
    height: float = 0.7,
    alpha: float = 1.0,
) -> None:
    """One bar a mode, from the top down, its value behind it."""
    plain(axes, "x")
    at = [-float(i) + offset for i in range(len(runs))]
    bars = axes.barh(at, values, height, color=[colour(run.mode) for run in runs], alpha=alpha)
    axes.bar_label(bars, [label.format(value) for value in values], padding=4)
    axes.set_yticks([-i for i in range(len(runs))], [title(run.mode) for run in runs])
    axes.set_xlim(0, max(axes.get_xlim()[1], 1.2 * max(values, default=0), 1e-9))


def _distribution(
    axes: Axes,
    runs: Sequence[RunResult],
    samples_of: Callable[[RunResult], list[float]],
    shares: Sequence[float],
) -> None:
    """Cumulative shares on an axis that stretches the tail: each nine is as high as the last."""
    for run in runs:
        samples = np.sort(samples_of(run))
        above = 1 - (np.arange(len(samples)) + 0.5) / len(samples)
        height = -np.log10(above)
        _, kept = np.unique(np.round(height * _POINTS / 4), return_index=True)
        axes.plot(
            samples[kept], height[kept], color=colour(run.mode), label=title(run.mode),
            linewidth=2.2 if run.mode == "kvswitch" else 1.6,
            linestyle=LINES.get(run.mode, "solid"),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = (0.0, *shares)
    axes.set_yticks([-np.log10(1 - share) for share in ticks], [f"{100 * s:g} %" for s in ticks])
    axes.set_ylim(bottom=0)
    axes.grid()


def _parts(
    axes: Axes, runs: Sequence[RunResult], rows: Sequence[dict[str, Any]], unit: str
) -> None:
    """Bars stacked from forward, waiting and scheduling, in milliseconds for each `unit`."""
    plain(axes, "x")
    left = np.zeros(len(runs))
    at = [-i for i in range(len(runs))]
    for part, name, label in (
        ("forward", "forward", "forward"),
        ("stall", "waiting", "waiting for copies"),
        ("overhead", "planning", "scheduling and planning"),
    ):
        values = np.array([1e3 * row[part] / max(1, row[unit]) for row in rows])
        axes.barh(at, values, 0.62, left, color=colour(name), label=label)
        left += values
    for y, row, whole in zip(at, rows, left, strict=True):
        stall = 1e3 * row["stall"] / max(1, row[unit])
        waiting = f", {stall:,.2f} of it waiting" if stall else ""
        axes.annotate(
            f"{whole:,.1f}{waiting}", (whole, y), (5, 0),
            textcoords="offset points", va="center", fontsize=8,
        )  # fmt: skip
    axes.set_yticks(at, [title(run.mode) for run in runs])
    axes.set_xlim(0, 1.45 * max(left))

"""Plots of what cuda_bench.py found: ``python tests/benchmarks/cuda_plots.py cuda.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["plot"]

mpl.rcParams["svg.hashsalt"] = "kvswitch"
_TITLES = {"OUT": "GPU to host", "IN": "host to GPU"}


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every section that was measured, as SVG files in `folder`."""
    drawn = []
    for name, draw, needed in (
        ("sizes", _sizes, "sizes"),
        ("probes", _probes, "probes"),
        ("timeline", _timeline, "timeline"),
    ):
        if found.get(needed):
            path = folder / f"cuda-{name}.svg"
            figure = draw(found)
            figure.suptitle(f"{found['provenance']['gpu']}, {found['provenance']['date']}", size=8)
            figure.savefig(path, metadata={"Date": None})
            drawn.append(path)
    return drawn


def _sizes(found: dict[str, Any]) -> Figure:
    figure = Figure((10, 4), layout="constrained")
    for axes, (to, title) in zip(figure.subplots(1, 2, sharey=True), _TITLES.items(), strict=True):
        rows = [r for r in found["sizes"] if r["to"] == to]
        for way in sorted({r["way"] for r in rows}):
            points = [(r["KiB"], r["GB/s"]) for r in rows if r["way"] == way]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=way)
        axes.axhline(found["limits_GB/s"][to], color="black", linestyle=":", label="limit")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="KiB in a run", ylim=0)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("GB/s")
    return figure


def _probes(found: dict[str, Any]) -> Figure:
    figure = Figure((10, 4), layout="constrained")
    for axes, (to, title) in zip(figure.subplots(1, 2, sharey=True), _TITLES.items(), strict=True):
        rows = [r for r in found["probes"] if r["to"] == to]
        places = range(len(rows))
        for q in ("p50", "p99"):
            axes.scatter(places, [r[f"{q}_us"] for r in rows], label=q)
        labels = [f"{r['load']}\n{r['GB/s']:.0f} GB/s" for r in rows]
        axes.set_xticks(places, labels, rotation=90, size=7)
        axes.axhline(150, color="black", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(title)
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("us that a 4 KB copy takes beside swaps")
    return figure


def _timeline(found: dict[str, Any]) -> Figure:
    figure = Figure((10, 2.2), layout="constrained")
    axes = figure.subplots()
    for row, (to, color) in enumerate((("OUT", "tab:blue"), ("IN", "tab:orange"))):
        spans = [
            (t["from"] * 1e3, (t["until"] - t["from"]) * 1e3)
            for t in found["timeline"]
            if t["to"] == to
        ]
        axes.broken_barh(spans, (row - 0.35, 0.7), color=color, edgecolor="white")
    axes.set_yticks([0, 1], list(_TITLES.values()))
    axes.set_xlabel("ms")
    return figure


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        for drawn in plot(json.loads(file.read_text()), file.parent):
            print(drawn)

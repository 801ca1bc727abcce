"""What a figure of the report consists of: rows beside the paper's numbers, tables, plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

__all__ = ["Figure", "Plot", "Row", "Table", "Verdict"]

Verdict = Literal["reached", "short", "shown", "not run"]


@dataclass(frozen=True)
class Row:
    """A number of the paper's, ours, and what is to be said of them.

    Attributes
    ----------
    label : str
    paper : float or None
    values : sequence of float
        Ours, one for each seed; empty if not run.
    aim : float or None
        What is to be reached; None: nothing is, the number is shown.
    lower : bool
        Whether lower is better.
    unit : str
    """

    label: str
    paper: float | None
    values: Sequence[float]
    aim: float | None = None
    lower: bool = False
    unit: str = ""

    @property
    def ours(self) -> float | None:
        """Median over seeds."""
        return median(self.values) if self.values else None

    @property
    def ratio(self) -> float | None:
        """Ours to the paper's."""
        return self.ours / self.paper if self.ours is not None and self.paper else None

    @property
    def verdict(self) -> Verdict:
        """Whether the aim has been reached, judged by the median."""
        if self.ours is None:
            return "not run"
        if self.aim is None:
            return "shown"
        good = self.ours <= self.aim if self.lower else self.ours >= self.aim
        return "reached" if good else "short"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": self.label,
            "paper": self.paper,
            "ours": self.ours,
            "range": [min(self.values), max(self.values)] if self.values else None,
            "seeds": len(self.values),
            "ratio": self.ratio,
            "aim": self.aim,
            "lower is better": self.lower,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Table:
    """Plain numbers: a header, and rows of texts."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """Lines over a common x, or bars.

    Attributes
    ----------
    series : mapping
        Name -> values, one for each x.
    log : str
        Which axes are logarithmic: "", "x", "y" or "xy".
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[float | str]
    series: Mapping[str, Sequence[float | None]]
    kind: Literal["lines", "bars"] = "lines"
    log: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "x": list(self.x),
            "series": {name: list(values) for name, values in self.series.items()},
        }


@dataclass(frozen=True)
class Figure:
    """A figure of the paper's, or one beside them.

    Attributes
    ----------
    text : str
        What is compared with what.
    """

    id: str
    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "title": self.title,
            "rows": [row.as_dict() for row in self.rows],
            "tables": [
                {"title": t.title, "header": list(t.header), "rows": [list(r) for r in t.rows]}
                for t in self.tables
            ],
            "plots": [plot.as_dict() for plot in self.plots],
        }

"""The paper's figures and Table 1, and what they rest on."""

from __future__ import annotations

from kvswitch.sim.evaluation.book import Book
from kvswitch.sim.evaluation.figure import Figure
from kvswitch.sim.evaluation.jobs import Results
from kvswitch.sim.evaluation.latency import figure1, figure2, figure4, figure8
from kvswitch.sim.evaluation.mechanisms import (
    figure9,
    figure10,
    figure11,
    figure12,
    figure13,
    granularity,
    table1,
)
from kvswitch.sim.evaluation.plan import Plan
from kvswitch.sim.evaluation.robustness import load, sensitivity

__all__ = ["make_figures"]


def make_figures(plan: Plan, results: Results) -> list[Figure]:
    """Make all figures of the results at hand."""
    book = Book(plan, results)
    figures = [figure1(book), figure2(book), figure4(book), *figure8(book)]
    others = (figure9, figure10, figure11, figure12, figure13, table1, granularity, load)
    return [*figures, *(make(book) for make in others), sensitivity(book)]

"""What figures are made of: results by job, the paper's numbers, and measures of results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.resources import files
from typing import Any, TypeAlias

import msgspec

from kvswitch.sim.evaluation.jobs import Job, Results
from kvswitch.sim.evaluation.plan import Plan
from kvswitch.sim.metrics import Result

__all__ = [
    "LATENCIES",
    "MODELS",
    "PAPER",
    "SINGLE",
    "UNITS",
    "Book",
    "Measure",
    "at",
    "frequency",
    "granularity_of",
    "known",
    "text",
]

Measure: TypeAlias = Callable[[Result], float]

PAPER: dict[str, Any] = msgspec.toml.decode(
    (files("kvswitch.sim") / "data" / "paper.toml").read_bytes()
)
SINGLE: dict[str, float] = PAPER["single"]
UNITS = {
    "turns": "1 turn/s",
    "conversations": "1 conversation/s",
}
MODELS = {"llama": "LLaMA-8B, A10", "qwen": "Qwen-32B, A100"}
LATENCIES: tuple[tuple[str, Measure], ...] = (
    ("TTFT P95", lambda r: r.ttft["0.95"]),
    ("TTFT P99", lambda r: r.ttft["0.99"]),
    ("TTFT P99.9", lambda r: r.ttft["0.999"]),
    ("TBT P99.9", lambda r: r.tbt["0.999"]),
)


def at(field: str, q: float | str) -> Measure:
    """Measure a quantile."""

    def measure(result: Result) -> float:
        value: float = getattr(result, field)[str(q)]
        return value

    return measure


def granularity_of(direction: str) -> Measure:
    """Measure blocks a copy."""
    return lambda result: result.granularity(direction)


class Book:
    """The results at hand, asked for by job."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self._results = results

    def value(self, job: Job, measure: Measure) -> float | None:
        """Measure a result; None if it is not there."""
        result = self._results.get(job)
        return None if result is None else measure(result)

    def ratio(self, upper: Job, lower: Job, measure: Measure) -> float | None:
        """Measure two results, the first over the second."""
        above, below = self.value(upper, measure), self.value(lower, measure)
        return above / below if above is not None and below else None

    def ratios(self, pairs: Iterable[tuple[Job, Job]], measure: Measure) -> list[float]:
        """The ratios that are there."""
        values = [self.ratio(upper, lower, measure) for upper, lower in pairs]
        return [value for value in values if value is not None]


def known(values: Iterable[float | None]) -> list[float]:
    """Values that are there."""
    return [value for value in values if value is not None]


def text(value: float | None, digits: int = 2) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:,.{digits}f}"


def frequency(epoch: int) -> float:
    """Priority-update frequency of an interval in iterations."""
    return round(1 / epoch, 4)

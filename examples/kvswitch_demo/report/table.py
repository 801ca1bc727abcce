"""The rows of the demo's table, the same on the terminal and in the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["FOOTNOTES", "HEADLINE_LABELS", "ROWS", "Row", "factor", "title"]

_DASH = "\N{EN DASH}"

FOOTNOTES = (
    f"{_DASH}* too few samples: a quantile q takes 10 / (1 - q) of them, the 95th percentile 100.",
    f"{_DASH} does not apply, or there was none.",
)


class Row(NamedTuple):
    """One figure of every mode.

    Attributes
    ----------
    group, label, unit : str
    figure : str
        Its name among `results.figures`.
    digits : int
        Decimals shown.
    scale : float
        Factor from the figure to the unit shown.
    """

    group: str
    label: str
    unit: str
    figure: str
    digits: int = 0
    scale: float = 1.0

    def text(self, figures: Mapping[str, Any]) -> str:
        """The cell of one mode."""
        value = figures[self.figure]
        if value is None:
            return f"{_DASH}*" if self.figure.startswith(("ttft", "tbt")) else _DASH
        return f"{value * self.scale:,.{self.digits}f}"


ROWS = (
    Row("Speed", "throughput", "tokens/s", "throughput_tokens_per_s", 1),
    Row("Speed", "TTFT p50", "s", "ttft_p50", 2),
    Row("Speed", "TTFT p90", "s", "ttft_p90", 2),
    Row("Speed", "TTFT p95", "s", "ttft_p95", 2),
    Row("Speed", "between tokens p50", "ms", "tbt_p50", 0, 1e3),
    Row("Speed", "between tokens p99", "ms", "tbt_p99", 0, 1e3),
    Row("Speed", "between tokens p99.9", "ms", "tbt_p999", 0, 1e3),
    Row("Copies", "swapped out", "blocks", "blocks_out"),
    Row("Copies", "", "MB", "bytes_out", 1, 1e-6),
    Row("Copies", "", "copies", "copies_out"),
    Row("Copies", "swapped in", "blocks", "blocks_in"),
    Row("Copies", "", "MB", "bytes_in", 1, 1e-6),
    Row("Copies", "", "copies", "copies_in"),
    Row("Granularity", "swap-in", "blocks/copy", "blocks_per_copy_in", 1),
    Row("Granularity", "full swap-out", "blocks/copy", "blocks_per_copy_out_full", 1),
    Row("Granularity", "incremental swap-out", "blocks/copy", "blocks_per_copy_out_incremental", 1),
    Row("Granularity", "swap-out spared", "%", "share_spared", 1, 100),
    Row("Switching", "stall time", "s", "stall", 3),
    Row("Switching", "priority inversion", "s", "inversion", 2),
    Row("Switching", "scheduling overhead", "%", "overhead_share", 2, 100),
    Row("Switching", "preemptions", "", "preemptions"),
    Row("Switching", "recomputed tokens", "", "recomputed_tokens"),
)

HEADLINE_LABELS = {
    "throughput_tokens_per_s": "throughput",
    "ttft_p95": "TTFT p95",
    "tbt_p99": "between tokens p99",
    "stall": "stall time",
    "inversion": "priority inversion",
}


def title(mode: str) -> str:
    """What a mode is called in headings."""
    return "no preemption" if mode == "reference" else mode


def factor(value: float | None) -> str:
    """A ratio as it is shown: 2.84x."""
    return _DASH if value is None else f"{value:,.2f}x"

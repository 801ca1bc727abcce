"""How long the scheduler's thread spends inside kvswitch."""

from __future__ import annotations

from time import perf_counter

__all__ = ["Overhead"]


class Overhead:
    """Counts the time within ``with`` blocks; one inside another counts once.

    Attributes
    ----------
    seconds : float
        Of the blocks that have ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._began = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._began = perf_counter()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += perf_counter() - self._began

    def leave_out(self, seconds: float) -> None:
        """Do not count so much of the present block: it was spent waiting."""
        self._began += seconds

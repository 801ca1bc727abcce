"""How long more important requests wait while less important ones run."""

from __future__ import annotations

from kvswitch.scheduling.scheduler import PriorityScheduler

__all__ = ["InversionMeter"]


class InversionMeter:
    """Adds up priority inversion, so that no system wins by not switching.

    Attributes
    ----------
    seconds : float
        Time in which at least one request waited (waiting or swapped) with a higher priority than
        one that ran.
    request_seconds : float
        The same, summed over the requests that waited so.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.request_seconds = 0.0

    def observe(self, seconds: float, scheduler: PriorityScheduler) -> None:
        """Add the `seconds` that `scheduler` has spent in its present state, an iteration's."""
        inverted = scheduler.inverted
        if inverted:
            self.seconds += seconds
            self.request_seconds += seconds * inverted

"""Whether to wait for swap-ins or to run without them (paper section 3.2, Algorithm 1 step 4).

Waiting costs the whole batch the time of the transfer; not waiting costs each arriving sequence
the iterations that pass until it has landed. Many short requests are worth waiting for, few long
ones are not: the estimate below says which, from what the link and the engine did recently.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from kvswitch.config import StrategyName
from kvswitch.messages import Direction, Measurement

__all__ = ["Arrival", "Strategy"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A swap-in under way: its transfer, and the bytes still to come (an estimate)."""

    transfer: int
    nbytes: float


class Strategy:
    """Choose how many of the pending swap-ins to wait for; adaptively by tokens gained and lost.

    Swap-ins land in order. Let the k-th land after `t_k` seconds, and an iteration, in which each
    sequence makes a token, take `s` seconds. Waiting for the first k costs the running batch
    `running * t_k / s` tokens. Each of the k starts after `t_k` instead of after the
    `ceil(t_i / s)` iterations that it would have sat out: `ceil(t_i / s) - t_k / s` tokens gained.
    The k with the largest difference wins; 0 means: do not wait.

    Parameters
    ----------
    mode : {"adaptive", "async", "sync", "serial"}
    window : int
        Number of recent transfers and iterations that the estimates rest on (r_info).
    """

    def __init__(self, mode: StrategyName = "adaptive", window: int = 64) -> None:
        self.mode = mode
        self._transfers: deque[tuple[int, float]] = deque(maxlen=window)
        self._steps: deque[float] = deque(maxlen=window)
        self._nbytes = 0
        self._seconds = 0.0

    def observe(self, measurements: Iterable[Measurement], step_seconds: float | None) -> None:
        """Take in what recent transfers and the last iteration took."""
        for m in measurements:
            if m.direction is not Direction.IN or m.seconds <= 0:
                continue
            if len(self._transfers) == self._transfers.maxlen:
                nbytes, seconds = self._transfers[0]
                self._nbytes -= nbytes
                self._seconds -= seconds
            self._transfers.append((m.nbytes, m.seconds))
            self._nbytes += m.nbytes
            self._seconds += m.seconds
        if step_seconds is not None and step_seconds > 0:
            self._steps.append(step_seconds)

    @property
    def bandwidth(self) -> float:
        """Bytes per second of recent swap-ins; 0 if there was none."""
        return self._nbytes / self._seconds if self._seconds > 0 else 0.0

    @property
    def step_seconds(self) -> float:
        """Median duration of recent iterations; 0 if there was none."""
        return sorted(self._steps)[len(self._steps) // 2] if self._steps else 0.0

    def wait_for(self, arrivals: list[Arrival], running: int) -> int:
        """How many of `arrivals`, first come first, the batch should wait for.

        Parameters
        ----------
        arrivals : list of Arrival
            Swap-ins under way, in order of dispatch.
        running : int
            Sequences that can run now.
        """
        if self.mode in ("sync", "serial"):
            return len(arrivals)
        if running == 0:
            return min(1, len(arrivals))  # nothing else could run: waiting costs nobody anything
        if self.mode == "async":
            return 0
        bandwidth, step = self.bandwidth, self.step_seconds
        if bandwidth == 0 or step == 0:
            return 0
        best, best_net = 0, 0.0
        nbytes = gain = 0.0
        for k, arrival in enumerate(arrivals, 1):
            nbytes += arrival.nbytes
            iterations = nbytes / bandwidth / step  # t_k / s
            gain += max(1, ceil(iterations))
            net = gain - iterations * (running + k)
            if net > best_net:
                best, best_net = k, net
        return best

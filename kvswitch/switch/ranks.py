"""One answer from several workers: what has ended on all ranks (tensor parallelism).

Where one planner hears from every worker, `RankReports` merges what they say. Where every rank has
a planner of its own (SGLang), `ReducedReports` gives all of them the same answer by a reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError, InvalidTransition
from kvswitch.messages import Direction, Measurement, Observations

__all__ = ["RankReports", "ReducedReports"]

Numbers: TypeAlias = npt.NDArray[np.float64]


class RankReports:
    """Merges the `Observations` of all workers into the one that the planner is given.

    A transfer ends when every rank has reported it, and has failed if it failed on any. Times
    are those of rank 0, so that all planners that are fed with the same reports decide alike.

    Parameters
    ----------
    num_ranks : int

    Raises
    ------
    ConfigError
        If there are no ranks.
    """

    def __init__(self, num_ranks: int) -> None:
        if num_ranks < 1:
            raise ConfigError(f"num_ranks must be at least 1, got {num_ranks}")
        self.num_ranks = num_ranks
        self._missing: dict[int, set[int]] = {}  # ranks that have not reported a transfer
        self._failed: set[int] = set()
        self._ended: list[int] = []
        self._measurements: list[Measurement] = []
        self._step_seconds: float | None = None

    def add(self, rank: int, report: Observations) -> None:
        """Take in what one worker has seen since its last report.

        Raises
        ------
        ConfigError
            There is no such rank.
        InvalidTransition
            The rank has reported one of the transfers before. Nothing is taken in.
        """
        if not 0 <= rank < self.num_ranks:
            raise ConfigError(f"rank {rank} of {self.num_ranks}: ranks are numbered from 0")
        ids = (*report.completed, *report.failed)
        for i, transfer in enumerate(ids):
            if rank not in self._missing.get(transfer, (rank,)) or transfer in ids[:i]:
                raise InvalidTransition(f"rank {rank} has reported transfer {transfer} twice")
        self._failed.update(report.failed)
        for transfer in ids:
            missing = self._missing.setdefault(transfer, set(range(self.num_ranks)))
            missing.discard(rank)
            if not missing:
                del self._missing[transfer]
                self._ended.append(transfer)
        if rank == 0:
            self._measurements += report.measurements
            self._step_seconds = report.step_seconds

    def merged(self) -> Observations:
        """What has ended on all ranks since the last call."""
        failed = {transfer for transfer in self._ended if transfer in self._failed}
        merged = Observations(
            tuple(sorted(set(self._ended) - failed)),
            tuple(sorted(failed)),
            tuple(self._measurements),
            self._step_seconds,
        )
        self._failed -= failed
        self._ended, self._measurements = [], []
        self._step_seconds = None
        return merged


class ReducedReports:
    """Gives the planners of all ranks the same `Observations`, by one reduction for each step.

    Every rank must call `reduce` in the same steps with the same transfers under way, which it
    does if its planner has been given the same calls.

    Parameters
    ----------
    rank, num_ranks : int
    minimum : callable
        Takes float64 numbers, shape [n], and returns their elementwise minimum over all ranks.

    Raises
    ------
    ConfigError
        There is no such rank.
    """

    def __init__(self, rank: int, num_ranks: int, minimum: Callable[[Numbers], Numbers]) -> None:
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank {rank} of {num_ranks}: ranks are numbered from 0")
        self._rank = rank
        self._alone = num_ranks == 1
        self._minimum = minimum
        self._ended: dict[int, bool] = {}  # on this rank, not yet on all of them: whether well

    def reduce(self, report: Observations, under_way: Sequence[int]) -> Observations:
        """What has ended on all ranks, and how long it took on rank 0.

        Parameters
        ----------
        report : Observations
            What this rank's worker has seen since the last call.
        under_way : sequence of int
            The planner's transfers under way (`EngineSwapManager.under_way`).
        """
        if self._alone:
            return report
        self._ended.update(dict.fromkeys(report.completed, True))
        self._ended.update(dict.fromkeys(report.failed, False))
        ids = sorted(under_way)
        # What the others say of these is as large as can be, so that rank 0 is heard.
        times = np.full(5, np.inf)
        if self._rank == 0:
            times[:] = 0.0
            for m in report.measurements:
                times[2 * m.direction : 2 * m.direction + 2] += m.nbytes, m.seconds
            times[4] = report.step_seconds or 0.0
        ended = np.array([i in self._ended for i in ids], np.float64)
        well = np.array([self._ended.get(i, True) for i in ids], np.float64)
        least = self._minimum(np.concatenate([ended, well, times]))
        ended, well, times = np.split(least, [len(ids), 2 * len(ids)])
        completed = tuple(i for i, e, w in zip(ids, ended, well, strict=True) if e and w)
        failed = tuple(i for i, e, w in zip(ids, ended, well, strict=True) if e and not w)
        for transfer in (*completed, *failed):
            del self._ended[transfer]
        measurements = tuple(
            Measurement(direction, int(times[2 * direction]), float(times[2 * direction + 1]))
            for direction in Direction
            if times[2 * direction] > 0
        )
        return Observations(completed, failed, measurements, float(times[4]) or None)

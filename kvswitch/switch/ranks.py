"""One answer from several workers: what has ended on all ranks (tensor parallelism)."""

from __future__ import annotations

from kvswitch.errors import ConfigError, InvalidTransition
from kvswitch.messages import Measurement, Observations

__all__ = ["RankReports"]


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

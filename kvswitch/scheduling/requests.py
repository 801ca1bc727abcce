"""Priorities of an engine's requests over time, for engines that schedule by themselves.

`PriorityScheduler` keeps queues of its own. Where the engine has them (vLLM, SGLang), this is what
is left of it: the policy, asked at every priority epoch and for each request that comes, and the
quantum for which a request that has just been switched in is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from kvswitch.errors import ConfigError, UnknownSequence
from kvswitch.scheduling.policies import PriorityPolicy, ask

__all__ = ["RequestPriorities"]


@dataclass(slots=True)
class _Standing:
    index: int  # number in a priority trace
    base: float  # given by the request
    ran: int  # epoch in which it last ran, or came
    entered: int  # iteration in which it was last switched in


class RequestPriorities:
    """Asks a policy for the priorities of requests; larger is more important.

    Parameters
    ----------
    policy : PriorityPolicy
    epoch : int
        Iterations between two priority updates.
    quantum : int
        Iterations for which a request just switched in is protected.

    Attributes
    ----------
    iteration : int
        Number of the present iteration; -1 before the first.

    Raises
    ------
    ConfigError
        `epoch` or `quantum` is out of its range.
    """

    def __init__(self, policy: PriorityPolicy, *, epoch: int, quantum: int) -> None:
        if epoch < 1:
            raise ConfigError(f"epoch={epoch}: give 1 iteration or more")
        if not 0 <= quantum < epoch:
            raise ConfigError(
                f"quantum={quantum} must be 0 or more and below epoch={epoch}: a request must be "
                "able to give way before the next priority update"
            )
        self._policy = policy
        self._interval = epoch
        self._quantum = quantum
        self._standings: dict[Hashable, _Standing] = {}
        self._arrivals = 0
        self.iteration = -1

    def __contains__(self, name: Hashable) -> bool:
        return name in self._standings

    def __len__(self) -> int:
        return len(self._standings)

    def add(self, name: Hashable, base: float) -> float:
        """Take note of a request that has come with a priority of its own; what it has now."""
        index = self._arrivals
        self._arrivals += 1
        if (size := getattr(self._policy, "sequences", None)) is not None:
            index %= size  # a trace starts anew at its end
        standing = _Standing(index, base, self._epoch, -1)
        (priority,) = self._ask([standing])
        self._standings[name] = standing
        return priority

    def remove(self, name: Hashable) -> None:
        """Forget a request; it need not be known."""
        self._standings.pop(name, None)

    def set_base(self, name: Hashable, base: float) -> float:
        """Give a request another priority of its own; what it has now.

        Raises
        ------
        UnknownSequence
            There is no such request.
        """
        standing = self._of(name)
        (priority,) = self._ask([replace(standing, base=base)])
        standing.base = base
        return priority

    def begin(self, running: Iterable[Hashable]) -> dict[Hashable, float]:
        """Begin an iteration; everybody's priority if they may have changed, else nothing."""
        self.iteration += 1
        if self.iteration % self._interval or not self._standings:
            return {}
        for name in running:
            if (standing := self._standings.get(name)) is not None:
                standing.ran = self._epoch
        return dict(zip(self._standings, self._ask(self._standings.values()), strict=True))

    def entered(self, name: Hashable) -> None:
        """Take note that a request has been switched in; it need not be known."""
        if (standing := self._standings.get(name)) is not None:
            standing.entered = self.iteration

    def protected(self, name: Hashable) -> bool:
        """Whether a running request is to be left alone for now: its quantum is not over."""
        standing = self._standings.get(name)
        return (
            standing is not None
            and standing.entered >= 0
            and standing.entered + self._quantum > self.iteration
        )

    @property
    def _epoch(self) -> int:
        return max(self.iteration, 0) // self._interval

    def _of(self, name: Hashable) -> _Standing:
        try:
            return self._standings[name]
        except KeyError:
            raise UnknownSequence(f"no request {name!r}") from None

    def _ask(self, standings: Collection[_Standing]) -> list[float]:
        epoch = self._epoch
        asked: list[float] = ask(
            self._policy,
            epoch,
            np.array([s.index for s in standings]),
            np.array([s.base for s in standings], np.float64),
            np.array([epoch - s.ran for s in standings]),
        ).tolist()
        return asked

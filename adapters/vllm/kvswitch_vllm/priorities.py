"""Priorities of vLLM's requests over time, by a policy of the core.

vLLM's numbers are the other way round: a lower one is more important.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvswitch.hooks import make_policy
from kvswitch.scheduling import PriorityPolicy
from kvswitch_vllm.settings import Settings

__all__ = ["Priorities"]


@dataclass(slots=True)
class _Standing:
    index: int  # number in a priority trace
    base: float  # given by the request
    ran: int  # epoch in which it last ran, or came
    entered: int  # iteration in which it was last switched in


class Priorities:
    """Asks the policy at every priority epoch, and for each request that comes.

    Attributes
    ----------
    iteration : int
        Number of the present iteration.
    """

    def __init__(self, settings: Settings) -> None:
        self._policy: PriorityPolicy = make_policy(settings.policy, **settings.policy_settings)
        self._interval = settings.epoch
        self._quantum = settings.quantum
        self._standings: dict[str, _Standing] = {}
        self._arrivals = 0
        self.iteration = -1

    @property
    def _epoch(self) -> int:
        return max(self.iteration, 0) // self._interval

    def add(self, request: Any) -> None:
        """A request has come: set its priority."""
        index = self._arrivals
        self._arrivals += 1
        if (size := getattr(self._policy, "sequences", None)) is not None:
            index %= size  # a trace starts anew at its end
        standing = _Standing(index, -float(request.priority), self._epoch, self.iteration)
        self._standings[request.request_id] = standing
        self._set([request])

    def remove(self, name: str) -> None:
        """A request has ended."""
        self._standings.pop(name, None)

    def set_base(self, request: Any, priority: float) -> None:
        """Give a request another priority of its own, in vLLM's numbers."""
        self._standings[request.request_id].base = -priority
        self._set([request])

    def begin(self, running: list[Any], requests: Iterable[Any]) -> bool:
        """Begin an iteration; whether priorities may have changed."""
        self.iteration += 1
        if self.iteration % self._interval:
            return False
        epoch = self._epoch
        for request in running:
            self._standings[request.request_id].ran = epoch
        self._set(list(requests))
        return True

    def entered(self, name: str) -> None:
        """A request has been switched in."""
        if (standing := self._standings.get(name)) is not None:
            standing.entered = self.iteration

    def protected(self, request: Any) -> bool:
        """Whether a running request is to be left alone for now: its quantum is not over."""
        entered = self._standings[request.request_id].entered
        return entered >= 0 and entered + self._quantum > self.iteration

    def _set(self, requests: list[Any]) -> None:
        standings = self._standings  # an aborted request may be there until its load has ended
        known = [(r, standings[r.request_id]) for r in requests if r.request_id in standings]
        if not known:
            return
        epoch = self._epoch
        priorities = self._policy.priorities(
            epoch,
            np.array([s.index for _, s in known]),
            np.array([s.base for _, s in known], np.float64),
            np.array([epoch - s.ran for _, s in known]),
        )
        for (request, _), priority in zip(known, np.asarray(priorities).tolist(), strict=True):
            request.priority = -priority

"""Priorities of vLLM's requests over time, by a policy of the core.

vLLM's numbers are the other way round: a lower one is more important.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvswitch.hooks import make_policy
from kvswitch.scheduling import RequestPriorities
from kvswitch_vllm.settings import Settings

__all__ = ["Priorities"]


class Priorities:
    """Sets requests' priorities at every priority epoch, and when they come."""

    def __init__(self, settings: Settings) -> None:
        self._of = RequestPriorities(
            make_policy(settings.policy, **settings.policy_settings),
            epoch=settings.epoch,
            quantum=settings.quantum,
        )

    def add(self, request: Any) -> None:
        """A request has come: set its priority."""
        request.priority = -self._of.add(request.request_id, -float(request.priority))

    def remove(self, name: str) -> None:
        """A request has ended."""
        self._of.remove(name)

    def set_base(self, request: Any, priority: float) -> None:
        """Give a request another priority of its own, in vLLM's numbers."""
        request.priority = -self._of.set_base(request.request_id, -priority)

    def begin(self, running: Iterable[Any], requests: Iterable[Any]) -> bool:
        """Begin an iteration; whether priorities may have changed."""
        changed = self._of.begin(request.request_id for request in running)
        if changed:
            for request in requests:
                # An aborted request may be there until its load has ended.
                if request.request_id in changed:
                    request.priority = -changed[request.request_id]
        return bool(changed)

    def entered(self, name: str) -> None:
        """A request has been switched in."""
        self._of.entered(name)

    def protected(self, request: Any) -> bool:
        """Whether a running request is to be left alone for now: its quantum is not over."""
        return self._of.protected(request.request_id)

"""A link in virtual time: moves planned transfers, in order within each direction."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvswitch.messages import Direction, Measurement, Observations, Transfer

__all__ = ["VirtualLink"]

NEVER = float("inf")


@dataclass(eq=False)
class _Moving:
    transfer: Transfer
    submitted: float
    cancelled: float = NEVER


class VirtualLink:
    """Moves `bandwidth` bytes a second in each direction, one transfer after the other.

    A transfer begins when those before it in its direction and those it names in `after` have
    ended. A cancelled one stops where it is, and ends as failed when its turn comes.
    """

    def __init__(self, bandwidth: float, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._block_seconds = block_bytes / bandwidth
        self._queues: dict[Direction, deque[_Moving]] = {d: deque() for d in Direction}
        self._last_end = dict.fromkeys(Direction, 0.0)
        self._ended: dict[int, float] = {}

    def submit(self, transfer: Transfer, now: float) -> None:
        self._queues[transfer.direction].append(_Moving(transfer, now))

    def cancel(self, ids: Iterable[int], now: float) -> None:
        for moving in (m for queue in self._queues.values() for m in queue):
            if moving.transfer.id in ids:
                moving.cancelled = now

    def next_end(self) -> float:
        """When the next transfer ends; never, if none is under way."""
        return min((end for _, end, _ in self._heads()), default=NEVER)

    def end_of(self, ids: Iterable[int]) -> float:
        """When the last of these ended, as far as time has come; never, if one has not."""
        return max((self._ended.get(i, NEVER) for i in ids), default=0.0)

    def advance(self, to: float, step_seconds: float | None = None) -> Observations:
        """Let time pass until `to`; what has ended by then."""
        completed, failed, measured = [], [], []
        while heads := self._heads():
            begin, end, moving = min(heads, key=lambda head: head[1])
            if end > to:
                break
            transfer = self._queues[moving.transfer.direction].popleft().transfer
            self._ended[transfer.id] = self._last_end[transfer.direction] = end
            if end >= moving.cancelled:
                failed.append(transfer.id)
                continue
            completed.append(transfer.id)
            nbytes = transfer.num_blocks * self._block_bytes
            measured.append(Measurement(transfer.direction, nbytes, end - begin))
        return Observations(tuple(completed), tuple(failed), tuple(measured), step_seconds)

    def _heads(self) -> list[tuple[float, float, _Moving]]:
        """(begin, end, which) of those that are moving, one a direction at most."""
        heads = []
        for direction, queue in self._queues.items():
            if queue and (after := self.end_of(queue[0].transfer.after)) < NEVER:
                moving = queue[0]
                begin = max(moving.submitted, after, self._last_end[direction])
                end = begin + moving.transfer.num_blocks * self._block_seconds
                heads.append((begin, min(end, max(begin, moving.cancelled)), moving))
        return heads

"""The link between device and host, in virtual time.

A run of blocks is a copy for each *piece*: one if all layers of a block lie together, else one for
each layer, or for K and V of each. Dispatching a copy costs the thread that does so, moving it
costs the copy engine; both overlap, so the slower of them sets the pace. See `Pricing`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvswitch.messages import Direction, Measurement, Observations, Transfer

__all__ = ["NEVER", "Pricing", "VirtualLink"]

NEVER = float("inf")


@dataclass(frozen=True)
class Pricing:
    """What transfers cost.

    Attributes
    ----------
    bandwidth : float
        Bytes a second in each direction.
    block_bytes : int
    pieces : int
        Copies that a run of blocks takes.
    dispatch, copy : float
        Seconds that a copy costs the thread that dispatches it, and the copy engine beside its
        bytes.
    merge : bool
        False: a copy for every block, as if no two were neighbours.
    window, gap : float
        After so many bytes the dispatcher waits until they are through, which takes `gap` seconds.
        A window of 0: it never does.
    """

    bandwidth: float
    block_bytes: int
    pieces: int = 1
    dispatch: float = 0.0
    copy: float = 0.0
    merge: bool = True
    window: float = 0.0
    gap: float = 0.0

    def copies(self, transfer: Transfer) -> int:
        """Number of copies."""
        return self.pieces * (len(transfer.runs) if self.merge else transfer.num_blocks)

    def seconds(self, transfer: Transfer) -> float:
        """Seconds from the first dispatch to the last byte."""
        nbytes = transfer.num_blocks * self.block_bytes
        per_block = self.block_bytes / self.pieces / self.bandwidth
        if not self.dispatch and not self.copy:
            seconds = nbytes / self.bandwidth
        elif self.merge:
            each = self.copy + transfer.runs[:, 2] * per_block
            seconds = self.pieces * float(each.clip(min=self.dispatch).sum())
        else:
            seconds = self.copies(transfer) * max(self.dispatch, self.copy + per_block)
        if self.window:
            seconds += self.gap * (nbytes // self.window)
        return seconds

    def dispatch_seconds(self, transfer: Transfer) -> float:
        """Seconds that dispatching it takes by itself."""
        return self.copies(transfer) * self.dispatch


@dataclass(eq=False, slots=True)
class _Moving:
    transfer: Transfer
    submitted: float
    seconds: float
    cancelled: float = NEVER


class VirtualLink:
    """Moves planned transfers, in order within each direction.

    A transfer begins when those before it in its queue and those it names in `after` have ended. A
    cancelled one stops where it is, and ends as failed when its turn comes.

    Parameters
    ----------
    pricing : Pricing
    duplex : bool
        False: one queue for both directions.
    """

    def __init__(self, pricing: Pricing, *, duplex: bool = True) -> None:
        self.pricing = pricing
        both: deque[_Moving] = deque()
        self._queues = {d: deque() if duplex else both for d in Direction}
        self._distinct = list({id(q): q for q in self._queues.values()}.values())
        self._last_end = [0.0] * len(self._distinct)
        self._ended: dict[int, float] = {}
        self._empty = dict.fromkeys(Direction, 0.0)  # about when all that is queued has ended
        self.seconds = dict.fromkeys(Direction, 0.0)  # that transfers took, in all
        self.moved = dict.fromkeys(Direction, 0)  # blocks of those not cancelled
        self.dropped = dict.fromkeys(Direction, 0)  # blocks of those cancelled

    def submit(self, transfer: Transfer, now: float) -> None:
        """Queue a transfer."""
        moving = _Moving(transfer, now, self.pricing.seconds(transfer))
        self._queues[transfer.direction].append(moving)
        empty = self._empty
        empty[transfer.direction] = max(empty[transfer.direction], now) + moving.seconds

    def cancel(self, ids: Iterable[int], now: float) -> None:
        """Drop what has not been moved of these."""
        if not ids:
            return
        for moving in (m for queue in self._distinct for m in queue):
            if moving.transfer.id in ids:
                moving.cancelled = now

    def next_end(self) -> float:
        """When the next transfer ends; never, if none is under way."""
        return min((end for _, end, _ in self._heads()), default=NEVER)

    def end_of(self, ids: Iterable[int]) -> float:
        """When the last of these ended, as far as time has come; never, if one has not."""
        return max((self._ended.get(i, NEVER) for i in ids), default=0.0)

    def busy_seconds(self, direction: Direction, now: float, seconds: float) -> float:
        """About how much of the `seconds` from `now` a direction will be moving bytes."""
        return min(seconds, max(0.0, self._empty[direction] - now))

    def advance(self, to: float, step_seconds: float | None = None) -> Observations:
        """Let time pass until `to`; what has ended by then."""
        if not any(self._distinct):
            return Observations(step_seconds=step_seconds)
        completed, failed, measured = [], [], []
        while heads := self._heads():
            begin, end, number = min(heads, key=lambda head: head[1])
            if end > to:
                break
            moving = self._distinct[number].popleft()
            transfer = moving.transfer
            self._ended[transfer.id] = self._last_end[number] = end
            self.seconds[transfer.direction] += end - begin
            if end >= moving.cancelled:
                failed.append(transfer.id)
                self.dropped[transfer.direction] += transfer.num_blocks
                continue
            completed.append(transfer.id)
            self.moved[transfer.direction] += transfer.num_blocks
            nbytes = transfer.num_blocks * self.pricing.block_bytes
            measured.append(Measurement(transfer.direction, nbytes, end - begin))
        return Observations(tuple(completed), tuple(failed), tuple(measured), step_seconds)

    def _heads(self) -> list[tuple[float, float, int]]:
        """(begin, end, number of queue) of those that are moving, one a queue at most."""
        heads = []
        for number, queue in enumerate(self._distinct):
            if queue and (after := self.end_of(queue[0].transfer.after)) < NEVER:
                moving = queue[0]
                begin = max(moving.submitted, after, self._last_end[number])
                end = begin + moving.seconds
                heads.append((begin, min(end, max(begin, moving.cancelled)), number))
        return heads

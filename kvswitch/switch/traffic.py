"""Transfers under way, and the device blocks that they hold.

A swap-out holds a reference on the blocks it reads, a swap-in on those it writes. Blocks that only
a swap-out still holds can be *taken*: by the sequence itself when it resumes, or by another whose
writer then waits for that transfer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies import Fill
from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds, Direction, Runs, Transfer
from kvswitch.switch.sequence import Incoming, Outgoing, SwapSequence
from kvswitch.transfer.plan import coalesce

__all__ = ["Traffic"]


class Traffic:
    """Planned and dispatched transfers of one planner, by id.

    Attributes
    ----------
    out, into : dict
        Swap-outs and swap-ins that have not ended, in order of id.
    leaving_blocks : int
        Device blocks that will be free when the swap-outs under way have ended.
    """

    def __init__(self, device: BlockGroupPool) -> None:
        self.out: dict[int, Outgoing] = {}
        self.into: dict[int, Incoming] = {}
        self.leaving_blocks = 0
        self._device = device
        self._next_id = 0
        self._planned: list[Transfer] = []
        self._cancelled: list[int] = []

    def plan(self, direction: Direction, runs: Runs, after: Iterable[int] = ()) -> Transfer:
        """Give a transfer its id and put it on the list of the next orders."""
        transfer = Transfer(self._next_id, direction, runs, tuple(sorted(set(after))))
        self._next_id += 1
        self._planned.append(transfer)
        return transfer

    def send(self, s: SwapSequence, fill: Fill, blocks: BlockIds) -> Outgoing:
        """Plan the swap-out of `blocks`; the caller's reference on them passes to the transfer."""
        transfer = self.plan(Direction.OUT, coalesce(blocks, fill.blocks))
        out = Outgoing(transfer, s, fill, blocks, np.zeros(len(blocks), np.bool_))
        self.out[transfer.id] = out
        s.outgoing.append(out)
        return out

    def cancel(self, transfer: int) -> None:
        """Nobody wants its bytes any more; it ends like any other, sooner perhaps."""
        self._cancelled.append(transfer)

    def take_orders(self) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """What has been planned and cancelled since the last call."""
        planned, cancelled = tuple(self._planned), tuple(self._cancelled)
        self._planned, self._cancelled = [], []
        return planned, tuple(t for t in cancelled if t in self.out or t in self.into)

    def end_out(self, transfer: int) -> Outgoing:
        """Forget an ended swap-out and release its blocks."""
        out = self.out.pop(transfer)
        if out.leaving:
            self.leaving_blocks -= int(np.count_nonzero(~out.taken))
        self._device.release(out.blocks)
        out.sequence.outgoing.remove(out)
        if out.sequence.left is out:
            out.sequence.left = None
        return out

    def end_in(self, transfer: int) -> Incoming:
        """Forget an ended swap-in and release its blocks."""
        incoming = self.into.pop(transfer)
        self._device.release(incoming.blocks)
        return incoming

    def mark_leaving(self, s: SwapSequence) -> None:
        """Count what `s`'s swap-outs hold as soon to be free: `s` itself needs it no more."""
        for out in s.outgoing:
            if not out.leaving:
                out.leaving = True
                self.leaving_blocks += len(out.blocks)

    def takeable_blocks(self) -> int:
        """Number of blocks that `take` can give."""
        return sum(int(np.count_nonzero(self._takeable(out))) for out in self.out.values())

    def take(self, sequence: Hashable, blocks: int) -> list[int]:
        """Give `sequence` blocks that swap-outs still read, oldest first; the ids to wait for."""
        after = []
        for out in self.out.values():
            if blocks == 0:
                break
            places = np.flatnonzero(self._takeable(out))[:blocks]
            if len(places):
                out.taken[places] = True
                self._device.attach(sequence, out.blocks[places])
                self.leaving_blocks -= len(places)
                after.append(out.transfer.id)
                blocks -= len(places)
        if blocks:
            raise IntegrityError(f"{blocks} blocks promised to {sequence!r} are not to be had")
        return after

    def _takeable(self, out: Outgoing) -> npt.NDArray[np.bool_]:
        if not out.leaving:
            return np.zeros(len(out.blocks), np.bool_)
        alone: npt.NDArray[np.bool_] = self._device.references(out.blocks) == 1
        return alone & ~out.taken

    def add_references(self, counts: npt.NDArray[np.int32]) -> None:
        """Add what transfers hold to `counts`, one a device block (for integrity checks)."""
        for held in self.out.values():
            np.add.at(counts, held.blocks, 1)
        for incoming in self.into.values():
            np.add.at(counts, incoming.blocks, 1)

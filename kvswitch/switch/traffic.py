"""Transfers under way, and the device blocks that they hold.

A swap-out holds a reference on the blocks it reads, a swap-in on those it writes. So a block goes
back to its pool when the last transfer that touches it has ended. Before that, a block that only
swap-outs still hold can be *taken*, by somebody whose writer then waits for them; and as long as
nobody has, it is *still here*: its sequence can have it back without a copy.
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies import Fill
from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds, Direction, Transfer
from kvswitch.switch.orders import OrderList
from kvswitch.switch.sequence import Incoming, Outgoing, SwapSequence
from kvswitch.transfer.plan import coalesce

__all__ = ["Traffic"]


class Traffic(OrderList):
    """Planned and dispatched transfers of one planner, by id.

    Attributes
    ----------
    out, into : dict
        Swap-outs and swap-ins that have not ended, in order of id.
    """

    def __init__(self, device: BlockGroupPool) -> None:
        self.out: dict[int, Outgoing] = {}
        self.into: dict[int, Incoming] = {}
        super().__init__()
        self._device = device
        # Of each block: how many swap-outs read it, the newest that did, and the id that was next
        # when it was last taken (what was planned before reads bytes that are about to change).
        self._readers = np.zeros(device.num_blocks, np.int32)
        self._newest = np.zeros(device.num_blocks, np.int64)
        self._taken = np.zeros(device.num_blocks, np.int64)

    # -- orders --------------------------------------------------------------------------------

    def take_orders(self) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """What has been planned and, of what is under way, cancelled since the last call."""
        planned, cancelled = self.take_list()
        return planned, tuple(t for t in cancelled if t in self.out or t in self.into)

    # -- begin and end -------------------------------------------------------------------------

    def send(self, s: SwapSequence, fill: Fill, blocks: BlockIds) -> Outgoing:
        """Plan the swap-out of `blocks`; the caller's reference on them passes to the transfer."""
        transfer = self.plan(Direction.OUT, coalesce(blocks, fill.blocks))
        out = self.out[transfer.id] = Outgoing(transfer, s, fill, blocks)
        s.outgoing.append(out)
        self._readers[blocks] += 1
        self._newest[blocks] = transfer.id
        return out

    def follow(self, s: SwapSequence, fill: Fill) -> None:
        """Let `s`'s `fill` be a part of the swap-out that it follows."""
        leader = next(out for out in self.out.values() if out.fill is fill.source)
        first = fill.first - leader.fill.first
        blocks = leader.blocks[first : first + len(fill.blocks)]
        follower = Outgoing(leader.transfer, s, fill, blocks)
        leader.followers.append(follower)
        s.outgoing.append(follower)

    def abandon(self, out: Outgoing) -> None:
        """`out`'s sequence does not want its bytes any more; cancelled if nobody else does."""
        if self._leads(out) and not out.followers:
            self.cancel(out.transfer)

    def end_out(self, transfer: int) -> Outgoing:
        """Forget an ended swap-out and release its blocks."""
        out = self.out.pop(transfer)
        self._readers[out.blocks] -= 1
        self._device.release(out.blocks)
        for each in (out, *out.followers):
            each.sequence.outgoing.remove(each)
        return out

    def begin_in(self, incoming: Incoming) -> None:
        """Let a planned swap-in hold the blocks it writes."""
        self._device.hold(incoming.blocks)
        self.into[incoming.transfer.id] = incoming

    def end_in(self, transfer: int) -> Incoming:
        """Forget an ended swap-in and release its blocks."""
        incoming = self.into.pop(transfer)
        self._device.release(incoming.blocks)
        return incoming

    # -- blocks that swap-outs read --------------------------------------------------------------

    def takeable_blocks(self) -> int:
        """Number of blocks that `take` can give."""
        return sum(int(np.count_nonzero(self._takeable(out))) for out in self.out.values())

    def take(self, sequence: Hashable, blocks: int) -> list[int]:
        """Give `sequence` blocks that only swap-outs still hold, those that end first.

        Returns
        -------
        list of int
            Ids of transfers that must have ended before the blocks are written.
        """
        after = []
        for out in self.out.values():
            if blocks == 0:
                break
            ids = out.blocks[self._takeable(out)][:blocks]
            if len(ids):
                self._device.attach(sequence, ids)
                self._taken[ids] = self._next_id
                after.append(out.transfer.id)
                blocks -= len(ids)
        if blocks:
            raise IntegrityError(f"{blocks} blocks promised to {sequence!r} are not to be had")
        return after

    def take_long_runs(self, sequence: Hashable, blocks: int) -> list[int]:
        """Give `sequence` up to `blocks` blocks, free ones too, in as long runs as can be.

        Returns
        -------
        list of int
            As for `take`.
        """
        leaving = [out.blocks[self._takeable(out)] for out in self.out.values()]
        ids = self._device.longest_runs(blocks, np.concatenate(leaving))
        self._device.attach(sequence, ids)
        taken = ids[self._readers[ids] > 0]
        self._taken[taken] = self._next_id
        after: list[int] = np.unique(self._newest[taken]).tolist()
        return after

    def _takeable(self, out: Outgoing) -> npt.NDArray[np.bool_]:
        # A block that several swap-outs read is given together with the newest: it ends last.
        only_read = self._device.references(out.blocks) == self._readers[out.blocks]
        mask: npt.NDArray[np.bool_] = only_read & (self._newest[out.blocks] == out.transfer.id)
        return mask

    def still_here(self, s: SwapSequence, blocks: int) -> BlockIds:
        """Which of `s`'s first `blocks` blocks the device still has, although it has left.

        Returns
        -------
        BlockIds
            Shape [blocks]; -1 where the bytes are on the host only.
        """
        here = np.full(blocks, -1, np.int32)
        for out in s.outgoing:  # a later one has what an earlier one was too early for
            first = out.fill.first
            ids = out.blocks[: max(0, blocks - first)]
            intact = self._taken[ids] <= out.transfer.id
            here[first : first + len(ids)] = np.where(intact, ids, -1)
        return here

    def shared(self, s: SwapSequence, block: int) -> bool:
        """Whether somebody else than `s` and its transfers uses a block."""
        own = (block in s.table) + sum(
            self._leads(out)
            and block in out.blocks
            and not any(block in follower.blocks for follower in out.followers)
            for out in s.outgoing
        )
        own += s.incoming is not None and block in s.incoming.blocks
        return int(self._device.references(np.array([block], np.int32))[0]) > own

    def _leads(self, out: Outgoing) -> bool:
        """Whether it holds the transfer's blocks; it follows one that does otherwise."""
        return self.out[out.transfer.id] is out

    # -- bookkeeping -----------------------------------------------------------------------------

    def add_references(self, counts: npt.NDArray[np.int32]) -> None:
        """Add what transfers hold to `counts`, one a device block (for integrity checks)."""
        readers = np.zeros_like(counts)
        for out in self.out.values():
            readers[out.blocks] += 1
        if (wrong := np.flatnonzero(readers != self._readers)).size:
            raise IntegrityError(f"wrong number of swap-outs on blocks {wrong[:8].tolist()}")
        counts += readers
        for incoming in self.into.values():
            counts[incoming.blocks] += 1

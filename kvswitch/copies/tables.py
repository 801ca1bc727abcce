"""Tables of host blocks: which are whose, and who loses them when memory is short."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies.keys import ContentKeys
from kvswitch.copies.owners import Owner, Owners
from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["HostTables"]

_NO_BLOCKS: BlockIds = np.empty(0, np.int32)
_TAKEN_AT_ONCE = 1 / 64
"""Share of the pool (twice as long swap-ins as with none at all, and no more recomputed: 1,000
ShareGPT conversations with copies of 60 GB, simulated; at 1 / 16 more is recomputed)."""


class HostTables:
    """The host pool, its owners, and the content keys of its blocks.

    Parameters
    ----------
    num_blocks, block_tokens, first_group, on_lost
        As for `HostCopies`.

    Attributes
    ----------
    pool : BlockGroupPool
        An owner's table is that of the sequence of the same id.
    owners : Owners
    keys : ContentKeys
    contaminated_blocks : int
        Blocks taken from owners so far.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        first_group: int,
        on_lost: Callable[[Hashable, int], None] | None,
    ) -> None:
        self.pool = BlockGroupPool(num_blocks, first_group=first_group)
        self.owners = Owners()
        self.keys = ContentKeys(num_blocks)
        self.contaminated_blocks = 0
        self._block_tokens = block_tokens
        self._on_lost = on_lost

    def of(self, entry: Owner | None) -> BlockIds:
        """Return the host blocks of an owner, in order."""
        if entry is None or entry.id not in self.pool:
            return _NO_BLOCKS
        return self.pool.table(entry.id)

    def grow(self, entry: Owner, size: int, first: int) -> BlockIds:
        """Grow `entry`'s table to `size` blocks; those from the `first` on, to be overwritten."""
        # Nobody knows how long a conversation gets, so as much room as there is: an equal share of
        # what is free, taken back when others need it.
        self.pool.allocate(entry.id, size, expected=self.pool.num_blocks)
        blocks = self.pool.table(entry.id)[first:]
        self.keys.forget(blocks)
        self.owners.last_block[entry.row] = blocks[-1]
        return blocks

    def attach(self, entry: Owner, blocks: BlockIds) -> None:
        """Append blocks with content to `entry`'s table: others' too, or found by their keys."""
        # Some may lie in room that is reserved behind others' copies, their content untouched.
        self.pool.end_reservations(blocks)
        self.pool.attach(entry.id, blocks)
        self.owners.last_block[entry.row] = blocks[-1]

    def cut(self, entry: Owner, size: int) -> None:
        """Cut `entry`'s table to at most `size` blocks; no more than they hold can be valid."""
        entry.limit(size * self._block_tokens)
        tail = self.of(entry)[size:]
        if not len(tail):
            return
        if size:
            self.pool.hold(tail)
            self.pool.truncate(entry.id, size)
        else:
            self.pool.detach(entry.id)
        self.owners.last_block[entry.row] = self.pool.table(entry.id)[-1] if size else -1
        self.release(tail)

    def release(self, blocks: BlockIds) -> None:
        """Give up one reference. What has a key can be adopted later, so it is used again last."""
        named = self.keys.named(blocks)
        if named.any():
            self.pool.release(blocks[named], cached=True)
            blocks = blocks[~named]
        self.pool.release(blocks)

    # -- contamination -------------------------------------------------------------------------

    def make_room(self, blocks: int, taker: Owner | None) -> int:
        """Get up to `blocks` blocks free for `taker`; how many can be allocated now.

        Where it must take any, it takes a small share of the pool at once, those who lose first all
        of it: taken one at a time, off one tail here and one there, they would leave no free run
        of any length.
        """
        short = blocks - self.pool.free_blocks
        if short > 0:
            short = max(short, int(self.pool.num_blocks * _TAKEN_AT_ONCE))
            lost: dict[Owner, None] = {}
            may = self.owners.may_lose(taker)
            for entry in self.owners.in_order(may):
                short -= self._contaminate(entry, short, may, lost)
                if short <= 0:
                    break
            if self._on_lost:
                for entry in lost:
                    self._on_lost(entry.id, entry.valid)
        return min(blocks, self.pool.free_blocks)

    def _contaminate(
        self, entry: Owner, want: int, may: npt.NDArray[np.bool_], lost: dict[Owner, None]
    ) -> int:
        """Take up to `want` blocks off the tail of `entry`'s copies; how many became free.

        A block with several owners counts as its highest owner's, and all of them lose it.
        """
        freed = 0
        while freed < want and (sharers := self.owners.sharers(entry, may)):
            tails = np.stack([self.of(owner)[freed - want :] for owner in sharers])
            # What all of them own at the end, nobody else owns, and no transfer holds.
            theirs = (tails == tails[0]).all(axis=0)
            theirs &= self.pool.references(tails[0]) == len(sharers)
            run = len(theirs) if theirs.all() else int(np.argmin(theirs[::-1]))
            if run == 0:
                break
            size = len(self.of(entry)) - run
            for owner in sharers:
                self.cut(owner, size)
                lost[owner] = None
            freed += run
            self.contaminated_blocks += run
            for lower in sharers[:-1]:  # its turn has passed, but it ends in other blocks now
                freed += self._contaminate(lower, want - freed, may, lost)
        return freed

    # -- bookkeeping -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves. Linear in the pool."""
        self.pool.check_integrity()
        self.owners.check_integrity()
        self.keys.check_integrity()
        for entry in self.owners:
            table = self.of(entry)
            if self.owners.last_block[entry.row] != (table[-1] if len(table) else -1):
                raise IntegrityError(f"the last host block of {entry.id!r} is not the one noted")
            if not self.keys.at_their_place(table):
                raise IntegrityError(f"a host block of {entry.id!r} has the key of another place")

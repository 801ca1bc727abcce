"""Free blocks with cached content, in the order in which they are to be given up."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["CachedBlocks"]


class CachedBlocks:
    """Free blocks with cached content, linked in the order in which they are to be given up.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool. At first none of them is cached.
    """

    def __init__(self, num_blocks: int) -> None:
        # A ring through one extra node, `num_blocks`, between the newest and the oldest. The
        # arrays are written one by one through `array`, and in bulk through numpy views.
        self._newer = array("i", [-1]) * (num_blocks + 1)
        self._older = array("i", [-1]) * (num_blocks + 1)
        self._ring = num_blocks
        self._newer[num_blocks] = self._older[num_blocks] = num_blocks
        self._newer_view = np.frombuffer(self._newer, np.int32)
        self._older_view = np.frombuffer(self._older, np.int32)
        self.blocks = 0

    def contains(self, ids: BlockIds) -> npt.NDArray[np.bool_]:
        """Return a mask: which of `ids` are cached."""
        return self._newer_view[ids] >= 0

    def add(self, ids: BlockIds) -> None:
        """Make `ids`, a part of a table in order, the newest; the last of them goes first."""
        order = ids[::-1]
        self._newer_view[order[:-1]] = order[1:]
        self._older_view[order[1:]] = order[:-1]
        first, last = int(order[0]), int(order[-1])
        self._link(self._older[self._ring], first)
        self._link(last, self._ring)
        self.blocks += len(ids)

    def remove(self, ids: BlockIds) -> None:
        """Take out `ids`, all of them cached. Neighbours in the order go together."""
        order = ids[::-1]
        breaks = (self._newer_view[order[:-1]] != order[1:]).nonzero()[0].tolist()
        begin = 0
        for end in (*breaks, len(order) - 1):
            self._link(self._older[int(order[begin])], self._newer[int(order[end])])
            begin = end + 1
        self._newer_view[ids] = -1
        self._older_view[ids] = -1
        self.blocks -= len(ids)

    def pop(self, count: int, *, more: int = 0) -> BlockIds:
        """Take out the `count` oldest, or all if there are fewer, and return them sorted.

        Parameters
        ----------
        count : int
            At least 1.
        more : int
            A rest of this length or less goes, too, if in memory it lies right before the last of
            those: what is left in the order would be of little use.
        """
        ids = np.fromiter(self._oldest(count + more + 1), np.int32)
        if len(ids) > count:
            apart = np.flatnonzero(ids[count:] != ids[count - 1 : -1] - 1)
            rest = int(apart[0]) if len(apart) else len(ids) - count
            ids = ids[: count + rest if rest <= more else count]
        if len(ids):
            self._link(self._ring, self._newer[int(ids[-1])])
            self._newer_view[ids] = -1
            self._older_view[ids] = -1
            self.blocks -= len(ids)
            ids.sort()
        return ids

    def ids(self) -> BlockIds:
        """Return all cached blocks, oldest first."""
        return np.fromiter(self._oldest(self.blocks), np.int32)

    def check_integrity(self) -> None:
        """Walk the ring both ways; raises IntegrityError."""
        ids = self.ids()
        chain = np.concatenate([[self._ring], ids, [self._ring]])
        if not np.array_equal(self._newer_view[chain[:-1]], chain[1:]) or not np.array_equal(
            self._older_view[chain[1:]], chain[:-1]
        ):
            raise IntegrityError("the order of cached blocks is broken")
        linked = np.flatnonzero(self._newer_view[:-1] >= 0)
        if not np.array_equal(np.sort(ids), linked):
            raise IntegrityError(f"{len(linked)} cached blocks are linked, {len(ids)} in the order")

    def _link(self, older: int, newer: int) -> None:
        self._newer[older] = newer
        self._older[newer] = older

    def _oldest(self, count: int) -> Iterator[int]:
        block = self._ring
        for _ in range(min(count, self.blocks)):
            block = self._newer[block]
            yield block

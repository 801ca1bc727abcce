"""Free memory of a pool: groups by size, and single blocks by age where content is cached.

`FreeGroups` keeps runs of free blocks apart by boundary tags, so that neighbours are found and
merged in O(1)::

    block      0  1  2  3  4  5  6  7  8  9
    state      used  [ free  ]  used [1]  used
    tags       0  0  3  0 -3  0  0   1  0  0     first block: length; last block: -length

`CachedBlocks` links free blocks whose content a prefix cache may still hit in the order in which
they are to be given up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["CachedBlocks", "FreeGroups", "runs_of"]

_SHIFT = 32
_MASK = (1 << _SHIFT) - 1


def runs_of(ids: BlockIds) -> Iterator[tuple[int, int]]:
    """Yield (first block, number of blocks) of each ascending run in `ids`, in order."""
    if not len(ids):
        return
    breaks = np.flatnonzero(ids[1:] != ids[:-1] + 1) + 1
    begin = 0
    for end in breaks.tolist():
        yield int(ids[begin]), end - begin
        begin = end
    yield int(ids[begin]), len(ids) - begin


class FreeGroups:
    """Runs of free blocks, merged with their neighbours, found by size and then address.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool. At first none of them is free.
    """

    def __init__(self, num_blocks: int) -> None:
        # One tag more than blocks: index num_blocks, which is also index -1, is never free.
        self._tags = array("i", bytes(4 * (num_blocks + 1)))
        self._by_size = SortedList()  # length << 32 | first block
        self.blocks = 0

    def __len__(self) -> int:
        return len(self._by_size)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (first block, length), smallest group first."""
        for key in self._by_size:
            yield key & _MASK, key >> _SHIFT

    @property
    def largest(self) -> int:
        """Length of the largest group; 0 if there is none."""
        return self._by_size[-1] >> _SHIFT if self._by_size else 0

    def best_fit(self, length: int) -> tuple[int, int] | None:
        """Return the smallest group of at least `length` blocks, of those the first; or None."""
        key = next(self._by_size.irange(length << _SHIFT), None)
        return None if key is None else (key & _MASK, key >> _SHIFT)

    def at(self, block: int) -> int:
        """Return the length of the group that starts with `block`; 0 if none does."""
        return max(self._tags[block], 0)

    def containing(self, block: int) -> tuple[int, int] | None:
        """Return the group that `block` is in, or None. Takes time linear in its length."""
        width = 64
        while True:
            low = max(block + 1 - width, 0)
            tagged = np.flatnonzero(self._view()[low : block + 1])
            if len(tagged) or not low:
                break
            width *= 8
        if not len(tagged):
            return None
        nearest = low + int(tagged[-1])
        length = self._tags[nearest]
        if length < 0 and nearest == block:
            return block + 1 + length, -length
        return (nearest, length) if block < nearest + length else None

    def add(self, start: int, length: int) -> None:
        """Make `length` blocks from `start` free; they merge with free neighbours."""
        tags = self._tags
        self.blocks += length
        end = start + length
        left = tags[start - 1]
        if left < 0 or left == 1:
            left = abs(left)
            tags[start - 1] = 0
            start -= left
            length += left
            self._by_size.remove(left << _SHIFT | start)
        right = tags[end]
        if right > 0:
            tags[end] = 0
            self._by_size.remove(right << _SHIFT | end)
            length += right
            end += right
        self._insert(start, length)

    def take(self, group: tuple[int, int], start: int, length: int) -> None:
        """Cut `length` blocks from `start` out of `group`; what is left of it stays free."""
        first, size = group
        self.blocks -= length
        self._by_size.remove(size << _SHIFT | first)
        self._tags[first] = self._tags[first + size - 1] = 0
        if start > first:
            self._insert(first, start - first)
        behind = first + size - (start + length)
        if behind:
            self._insert(start + length, behind)

    def check_integrity(self) -> None:
        """Compare tags with the order by size; raises IntegrityError."""
        tags = np.zeros(len(self._tags), np.int32)
        end = 0
        for start, length in sorted(self):
            if length < 1 or start < end or (start == end and end > 0):
                raise IntegrityError(f"free group {start}+{length} touches the one before it")
            end = start + length
            tags[end - 1] = -length
            tags[start] = length
        if end >= len(tags) or not np.array_equal(tags, self._view()):
            raise IntegrityError("boundary tags of the free groups are wrong")
        if self.blocks != sum(length for _, length in self):
            raise IntegrityError(f"{self.blocks} blocks counted in free groups")

    def _insert(self, start: int, length: int) -> None:
        self._tags[start + length - 1] = -length
        self._tags[start] = length
        self._by_size.add(length << _SHIFT | start)

    def _view(self) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._tags, np.int32)


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
        breaks = np.flatnonzero(self._newer_view[order[:-1]] != order[1:]).tolist()
        begin = 0
        for end in (*breaks, len(order) - 1):
            self._link(self._older[int(order[begin])], self._newer[int(order[end])])
            begin = end + 1
        self._newer_view[ids] = -1
        self._older_view[ids] = -1
        self.blocks -= len(ids)

    def pop(self, count: int) -> BlockIds:
        """Take out the `count` oldest, or all if there are fewer, and return them sorted."""
        count = min(count, self.blocks)
        ids = np.fromiter(self._oldest(count), np.int32, count)
        if count:
            self._link(self._ring, self._newer[int(ids[-1])])
            self._newer_view[ids] = -1
            self._older_view[ids] = -1
            self.blocks -= count
            ids.sort()
        return ids

    def ids(self) -> BlockIds:
        """Return all cached blocks, oldest first."""
        return np.fromiter(self._oldest(self.blocks), np.int32, self.blocks)

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
        for _ in range(count):
            block = self._newer[block]
            yield block

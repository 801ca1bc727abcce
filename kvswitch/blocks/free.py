"""Free groups: runs of free blocks, merged with their neighbours and found by size.

Boundary tags say where a group ends, so that neighbours are found and merged in O(1)::

    block      0  1  2  3  4  5  6  7  8  9
    state      used  [ free  ]  used [1]  used
    tags       0  0  3  0 -3  0  0   1  0  0     first block: length; last block: -length
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedList

from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["FreeGroups", "runs_of"]

_SHIFT = 32
_MASK = (1 << _SHIFT) - 1


def runs_of(ids: BlockIds) -> list[tuple[int, int]]:
    """Return (first block, number of blocks) of each ascending run in `ids`, in order."""
    if not len(ids):
        return []
    runs = []
    begin = 0
    for end in ((ids[1:] != ids[:-1] + 1).nonzero()[0] + 1).tolist():
        runs.append((int(ids[begin]), end - begin))
        begin = end
    runs.append((int(ids[begin]), len(ids) - begin))
    return runs


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

    def best_fit(self, length: int) -> tuple[int, int]:
        """Return the smallest group of at least `length` blocks (of equals the first)."""
        key = next(self._by_size.irange(length << _SHIFT))
        return key & _MASK, key >> _SHIFT

    def at(self, block: int) -> int:
        """Return the length of the group that starts with `block`; 0 if none does."""
        return max(self._tags[block], 0)

    def containing(self, block: int) -> tuple[int, int]:
        """Return the group that `block` is in, or (0, 0). Takes time linear in its length."""
        width = 64
        while True:
            low = max(block + 1 - width, 0)
            tagged = np.flatnonzero(self._view()[low : block + 1])
            if len(tagged) or not low:
                break
            width *= 8
        if not len(tagged):
            return 0, 0
        nearest = low + int(tagged[-1])
        length = self._tags[nearest]
        if length < 0 and nearest == block:
            return block + 1 + length, -length
        return (nearest, length) if block < nearest + length else (0, 0)

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

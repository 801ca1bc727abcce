"""What block groups are compared with: a list of free blocks, least recently freed first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from kvswitch.blocks import Groups
from kvswitch.errors import IntegrityError, OutOfBlocks
from kvswitch.messages import BlockIds

__all__ = ["FreeListPool"]


class FreeListPool:
    """Takes the interface of `kvswitch.blocks.BlockGroupPool`, and knows no groups.

    Every block comes from the head of one list and goes to its tail when it is freed, the last ones
    of a table first, as in vLLM's block pool.
    """

    def __init__(self, num_blocks: int, *, first_group: int = 60, headroom: float = 0.0) -> None:
        self.num_blocks = num_blocks
        self._headroom = int(num_blocks * headroom)
        self._free = OrderedDict.fromkeys(range(num_blocks))
        self._references = np.zeros(num_blocks, np.int32)
        self._tables: dict[Hashable, BlockIds] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def available(self, *, headroom: bool = True) -> int:
        return max(len(self._free) - self._headroom, 0) if headroom else len(self._free)

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._tables

    def __len__(self) -> int:
        return len(self._tables)

    def allocate(self, sequence: Hashable, blocks: int, *, expected: int | None = None) -> None:
        table = self._tables.get(sequence, np.empty(0, np.int32))
        need = max(0, blocks - len(table))
        if need > len(self._free):
            raise OutOfBlocks(f"{need} more blocks needed, {len(self._free)} are free")
        taken = [self._free.popitem(last=False)[0] for _ in range(need)]
        self._append(sequence, np.array(taken, np.int32))

    def table(self, sequence: Hashable) -> BlockIds:
        return self._tables[sequence]

    def size(self, sequence: Hashable) -> int:
        return len(self._tables[sequence])

    def attach(self, sequence: Hashable, ids: BlockIds) -> None:
        for block in ids[self._references[ids] == 0].tolist():
            del self._free[block]
        self._append(sequence, ids)

    def truncate(self, sequence: Hashable, blocks: int, *, cached: bool = False) -> None:
        table = self._tables[sequence]
        self._tables[sequence] = table[:blocks]
        self.release(table[blocks:])

    def detach(self, sequence: Hashable) -> BlockIds:
        return self._tables.pop(sequence)

    def free(self, sequence: Hashable, *, cached: bool = False) -> None:
        self.release(self.detach(sequence))

    def hold(self, ids: BlockIds) -> None:
        self._references[ids] += 1

    def release(self, ids: BlockIds, *, cached: bool = False) -> None:
        self._references[ids] -= 1
        self._free.update(dict.fromkeys(ids[self._references[ids] == 0][::-1].tolist()))

    def references(self, ids: BlockIds) -> npt.NDArray[np.int32]:
        counts: npt.NDArray[np.int32] = self._references[ids]
        return counts

    def groups(self) -> Groups:
        """One free group: any free block is as good as another."""
        return Groups(free=1, largest=len(self._free), uncached=len(self._free), cached=0, tails=0)

    def longest_runs(self, blocks: int, also: BlockIds) -> BlockIds:
        """Free blocks first, then the others."""
        return np.append(np.array(list(self._free), np.int32), also)[:blocks]

    def check_integrity(self) -> None:
        if sorted(self._free) != np.flatnonzero(self._references == 0).tolist():
            raise IntegrityError("the free list is not what nobody references")

    def _append(self, sequence: Hashable, ids: BlockIds) -> None:
        self._references[ids] += 1
        known = self._tables.get(sequence)
        self._tables[sequence] = ids if known is None else np.concatenate([known, ids])

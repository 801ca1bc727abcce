"""Active groups: the newest group of each sequence, whose unused tail it grows into."""

from __future__ import annotations

import heapq
from collections.abc import Collection
from itertools import count

from kvswitch.blocks.table import Table
from kvswitch.errors import IntegrityError

__all__ = ["ActiveGroups"]


class ActiveGroups:
    """Gives sequences their active groups, and finds the largest unused tail to take back.

    Parameters
    ----------
    num_blocks : int
        Blocks of the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        # 1 at the block behind each active group, where its sequence would like to go on.
        self._wanted = bytearray(num_blocks + 1)
        # A heap of (-length, serial number, table), corrected when looked at: between two
        # activations of a table its tail only shrinks.
        self._heap: list[tuple[int, int, Table]] = []
        self._compact_at = 64
        self._serial = count()

    def wants(self, block: int) -> bool:
        """Whether an active group ends right before `block`."""
        return self._wanted[block] != 0

    def activate(self, table: Table, start: int, length: int) -> None:
        """Make `length` blocks from `start` the tail of `table`, which has used its own up."""
        self._move(table, start, start + length)
        if len(self._heap) >= self._compact_at:
            live = {id(table): table for _, _, table in self._heap if table.end > table.next}
            self._heap = [(t.next - t.end, next(self._serial), t) for t in live.values()]
            heapq.heapify(self._heap)
            self._compact_at = 2 * len(live) + 64
        heapq.heappush(self._heap, (-length, next(self._serial), table))

    def end(self, table: Table) -> tuple[int, int]:
        """End the active group of `table`; return its tail: (first block, length)."""
        start, length = table.next, table.end - table.next
        self._move(table, 0, 0)
        return start, length

    def largest(self) -> int:
        """Return the length of the largest tail; 0 if there is none."""
        heap = self._heap
        while heap:
            length, serial, table = heap[0]
            now = table.next - table.end
            if now == length:
                return -length
            if now:
                heapq.heapreplace(heap, (now, serial, table))
            else:
                heapq.heappop(heap)
        return 0

    def take_back(self, length: int) -> tuple[int, int]:
        """Cut `length` blocks off the end of the `largest` tail; return (first block, length)."""
        table = self._heap[0][2]
        self._move(table, table.next, table.end - length)
        return table.end, length

    def check_integrity(self, tables: Collection[Table]) -> None:
        """Compare marks and heap with all `tables`; raises IntegrityError."""
        wanted = bytearray(len(self._wanted))
        for table in tables:
            wanted[table.end] = table.end > 0
        if wanted != self._wanted:
            raise IntegrityError("the ends of active groups are not where they are marked")
        known = {id(table): -length for length, _, table in sorted(self._heap, reverse=True)}
        if any(table.end - table.next > known.get(id(table), 0) for table in tables):
            raise IntegrityError("an unused tail is longer than what is known of it")

    def _move(self, table: Table, start: int, end: int) -> None:
        self._wanted[table.end] = 0
        table.next, table.end = start, end
        self._wanted[end] = end > 0

"""The blocks of one sequence, and the active group it grows in."""

from __future__ import annotations

import numpy as np

from kvswitch.messages import BlockIds

__all__ = ["Table"]


class Table:
    """Block ids in order, in a buffer that doubles; and what is left of the active group.

    Attributes
    ----------
    size : int
        Number of blocks.
    next, end : int
        The unused tail of the active group: blocks from `next` up to, not including, `end`.
    born, dropped : int
        Size after the first allocation (0 before it), and number of blocks truncated.
    """

    __slots__ = ("_buffer", "_ids", "born", "dropped", "end", "next", "size")

    def __init__(self) -> None:
        self._buffer: BlockIds = np.empty(8, np.int32)
        self._ids: BlockIds | None = None
        self.size = 0
        self.next = 0
        self.end = 0
        self.born = 0
        self.dropped = 0

    @property
    def last(self) -> int:
        """The last block; there must be one."""
        return int(self._buffer[self.size - 1])

    def ids(self) -> BlockIds:
        """Return the ids, shape [size], read-only; what was returned never changes."""
        ids = self._ids
        if ids is None:
            ids = self._ids = self._buffer[: self.size]
            ids.flags.writeable = False
        return ids

    def use_one(self) -> int:
        """Move the first block of the tail to the end of the table, and return it."""
        block = self.next
        size = self.size
        if size == len(self._buffer):
            self._reserve(size + 1)
        self._buffer[size] = block
        self._ids = None
        self.size = size + 1
        self.next = block + 1
        return block

    def extend(self, ids: BlockIds) -> None:
        """Append `ids`."""
        size = self.size + len(ids)
        if size > len(self._buffer):
            self._reserve(size)
        self._buffer[self.size : size] = ids
        self._ids = None
        self.size = size

    def truncate(self, size: int) -> BlockIds:
        """Keep the first `size` ids and return the others."""
        dropped = self.ids()[size:]
        self.dropped += len(dropped)
        self.size = size
        self._ids = None
        self._reserve(size)  # a new buffer, so that ids handed out before stay what they were
        return dropped

    def _reserve(self, size: int) -> None:
        kept = self._buffer[: min(size, self.size)]
        self._buffer = np.empty(max(8, size, 2 * len(kept)), np.int32)
        self._buffer[: len(kept)] = kept

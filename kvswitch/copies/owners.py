"""Owners of host copies, and the order in which they lose them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["Fill", "Lease", "Owner", "Owners"]

_Mask = npt.NDArray[np.bool_]
_Rows = npt.NDArray[np.intp]


@dataclass(slots=True, eq=False)
class Fill:
    """Host blocks that a swap-out is about to write; pending until `commit` or `abort`.

    Attributes
    ----------
    first : int
        Index, in the owner's table, of the first block to write.
    blocks : BlockIds
        The host blocks to write, in order; empty if the copy is complete already.
    tokens : int
        Valid tokens of the owner once this is committed. Less than was asked for if the host
        could not hold all; lowered by a truncation meanwhile.
    committed : bool
        Whether it has ended well.
    source : Fill or None
        The fill of another owner that writes these blocks, if this one only follows it.
    """

    _owner: Owner
    first: int
    blocks: BlockIds
    tokens: int
    committed: bool = False
    source: Fill | None = None
    _ended: bool = False


@dataclass(slots=True, eq=False)
class Lease:
    """Host blocks that a swap-in reads; they keep their bytes until `HostCopies.release`."""

    blocks: BlockIds
    _released: bool = False


@dataclass(slots=True, eq=False)
class Owner:
    """A request or conversation that has copies.

    Attributes
    ----------
    row : int
        Its place in the arrays of `Owners`.
    valid : int
        Leading tokens that the host holds.
    fills : list of Fill
        Pending ones in the order of `begin`, and committed ones that wait for an earlier one.
    """

    id: Hashable
    row: int
    valid: int = 0
    fills: list[Fill] = field(default_factory=list)

    def covered(self, block_tokens: int) -> int:
        """Tokens that are valid once every pending fill is committed."""
        covered = self.valid
        for fill in self.fills:
            if fill.first * block_tokens <= covered:  # else a fill that it builds on has failed
                covered = fill.tokens
        return covered

    def limit(self, tokens: int) -> None:
        """Let no more than `tokens` be valid, now or by a pending fill."""
        self.valid = min(self.valid, tokens)
        for fill in self.fills:
            fill.tokens = min(fill.tokens, tokens)

    def settle(self, block_tokens: int) -> None:
        """Count committed fills; each only on top of the earlier ones."""
        while self.fills and self.fills[0].committed:
            fill = self.fills.pop(0)
            if fill.first * block_tokens <= self.valid:
                self.valid = fill.tokens


class Owners:
    """All owners by id, with a row of numbers for each that decides who loses copies first.

    Attributes
    ----------
    priority : float64 ndarray, shape [rows]
        Larger is more important.
    resident : bool ndarray, shape [rows]
        Whether the KV is on the device too: the copies are redundant.
    last_block : int32 ndarray, shape [rows]
        Last host block in the owner's table, -1 if it has none. Owners that share a block have it
        at the same index, so those with the same last block have tables of the same length.
    """

    def __init__(self) -> None:
        self._owners: dict[Hashable, Owner] = {}
        self._by_row: list[Owner | None] = []
        self._free_rows: list[int] = []
        self._clock = 0
        self._last_use = np.zeros(0, np.int64)
        self.priority = np.zeros(0)
        self.resident = np.zeros(0, np.bool_)
        self.last_block = np.zeros(0, np.int32)

    def __contains__(self, owner: Hashable) -> bool:
        return owner in self._owners

    def __len__(self) -> int:
        return len(self._owners)

    def __iter__(self) -> Iterator[Owner]:
        return iter(self._owners.values())

    def get(self, owner: Hashable) -> Owner | None:
        """Return an owner, or None if there is none of this id."""
        return self._owners.get(owner)

    def add(self, owner: Hashable) -> Owner:
        """Create an owner, of priority 0, without copies."""
        if not self._free_rows:
            self._add_rows(max(64, len(self._by_row)))
        entry = self._owners[owner] = Owner(owner, self._free_rows.pop())
        self._by_row[entry.row] = entry
        self.priority[entry.row] = 0.0
        self.resident[entry.row] = False
        self.touch(entry)
        return entry

    def remove(self, entry: Owner) -> None:
        """Forget an owner, who must have no copies left."""
        del self._owners[entry.id]
        self._by_row[entry.row] = None
        self._free_rows.append(entry.row)

    def touch(self, entry: Owner) -> None:
        """Note that `entry`'s copies are being used now."""
        self._clock += 1
        self._last_use[entry.row] = self._clock

    # -- who loses copies first ----------------------------------------------------------------

    def may_lose(self, taker: Owner | None) -> _Mask:
        """Return a mask over rows: whose copies `taker` (None: one of priority 0) may take.

        Those of lower priority, and what is redundant of its equals.
        """
        limit = self.priority[taker.row] if taker else 0.0
        redundant = (self.priority == limit) & self.resident
        may: _Mask = (self.last_block >= 0) & ((self.priority < limit) | redundant)
        if taker:
            may[taker.row] = False
        return may

    def in_order(self, may: _Mask) -> Iterator[Owner]:
        """Yield the owners of a mask, who loses first first.

        Of owners whose tables end in the same block, only the highest: no other can give it up.
        """
        rows = np.flatnonzero(may)
        few = 64  # are mostly enough: sort no more than needed
        while len(rows):
            bound = np.inf
            if few < len(rows):
                bound = np.partition(self.priority[rows], few)[few]
            low = self.priority[rows] <= bound
            lowest = self._sorted(rows[low])[::-1]
            _, highest = np.unique(self.last_block[lowest], return_index=True)
            for row in lowest[np.sort(highest)[::-1]].tolist():
                yield self._at(row)
            rows = rows[~low]
            few *= 4

    def sharers(self, entry: Owner, may: _Mask) -> list[Owner]:
        """Owners that lose the last block of `entry` with it, in order, itself the last of them.

        None if one of them is not in the mask, or comes after `entry` in the order.
        """
        block = self.last_block[entry.row]
        if block < 0:
            return []
        rows = self._sorted(np.flatnonzero(self.last_block == block))
        if rows[-1] != entry.row or not may[rows].all():
            return []
        return [self._at(row) for row in rows.tolist()]

    def _sorted(self, rows: _Rows) -> _Rows:
        """Rows in the order in which they lose copies.

        Lowest priority first; redundant copies before only ones; least recently used first.
        """
        if len(rows) < 2:
            return rows
        keys = (self._last_use[rows], ~self.resident[rows], self.priority[rows])
        return rows[np.lexsort(keys)]

    # -- rows ----------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError if owners and rows contradict each other."""
        by_row = {row: entry for row, entry in enumerate(self._by_row) if entry is not None}
        if by_row != {entry.row: entry for entry in self} or sorted(
            [*by_row, *self._free_rows]
        ) != list(range(len(self._by_row))):
            raise IntegrityError("owners of host copies and their rows disagree")
        if (self.last_block[self._free_rows] >= 0).any():
            raise IntegrityError("a row without an owner has host copies")

    def _at(self, row: int) -> Owner:
        entry = self._by_row[row]
        if entry is None:
            raise IntegrityError(f"row {row} has host copies, but no owner")
        return entry

    def _add_rows(self, count: int) -> None:
        rows = len(self._by_row)
        self._by_row += [None] * count
        self._free_rows += range(rows + count - 1, rows - 1, -1)
        self._last_use = np.append(self._last_use, np.zeros(count, np.int64))
        self.priority = np.append(self.priority, np.zeros(count))
        self.resident = np.append(self.resident, np.zeros(count, np.bool_))
        self.last_block = np.append(self.last_block, np.full(count, -1, np.int32))

"""The pool of block groups (section 3.1): runs of contiguous blocks instead of single ones."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt

from kvswitch.blocks.free import CachedBlocks, FreeGroups, runs_of
from kvswitch.errors import (
    ConfigError,
    IntegrityError,
    InvalidTransition,
    OutOfBlocks,
    UnknownSequence,
)
from kvswitch.messages import BlockIds

__all__ = ["BlockGroupPool", "Groups"]


@dataclass(frozen=True)
class Groups:
    """How the free memory of a pool lies, in blocks.

    Attributes
    ----------
    free : int
        Number of free groups without cached content.
    largest : int
        Length of the largest of them.
    uncached, cached, tails : int
        Blocks in free groups, free blocks with cached content, and blocks in unused tails of
        active groups. Their sum is `BlockGroupPool.free_blocks`.
    """

    free: int
    largest: int
    uncached: int
    cached: int
    tails: int


class _Table:
    """A sequence's blocks, and the unused tail [next, end) of its active group."""

    __slots__ = ("born", "buffer", "end", "next", "size", "view")

    def __init__(self) -> None:
        self.buffer: BlockIds = np.empty(8, np.int32)
        self.view: BlockIds | None = None
        self.size = 0
        self.next = 0
        self.end = 0
        self.born = 0  # size after the first allocation

    def append(self, ids: BlockIds) -> None:
        size = self.size + len(ids)
        if size > len(self.buffer):
            grown = np.empty(max(size, 2 * len(self.buffer)), np.int32)
            grown[: self.size] = self.buffer[: self.size]
            self.buffer = grown
        self.buffer[self.size : size] = ids
        self.size = size
        self.view = None

    def ids(self) -> BlockIds:
        view = self.view
        if view is None:
            view = self.view = self.buffer[: self.size]
            view.flags.writeable = False
        return view


class BlockGroupPool:
    """Blocks of one memory, given to sequences in groups that are as contiguous as can be.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, at least 1.
    first_group : int, default 60
        Size in blocks of a sequence's first group while nothing has been learned yet.
    headroom : float, default 0.0
        Share of the pool, in [0, 1), that `available` leaves out so that free groups stay large.

    Raises
    ------
    ConfigError
        If a parameter is out of its range.
    """

    def __init__(self, num_blocks: int, *, first_group: int = 60, headroom: float = 0.0) -> None:
        if not 1 <= num_blocks < 2**31 - 1:
            raise ConfigError(f"num_blocks must be from 1 to 2**31 - 2, got {num_blocks}")
        if first_group < 1:
            raise ConfigError(f"first_group must be at least 1 block, got {first_group}")
        if not 0 <= headroom < 1:
            raise ConfigError(f"headroom is a share of the pool in [0, 1), got {headroom}")
        self.num_blocks = num_blocks
        self._headroom = int(num_blocks * headroom)
        self._growth = float(first_group)
        self._tables: dict[Hashable, _Table] = {}
        self._free = FreeGroups(num_blocks)
        self._free.add(0, num_blocks)
        self._cached = CachedBlocks(num_blocks)
        self._references = array("i", bytes(4 * num_blocks))
        self._references_view = np.frombuffer(self._references, np.int32)
        self._free_blocks = num_blocks
        self._tails: list[tuple[int, int, _Table]] = []  # heap of (-length, serial, table)
        self._serial = count()

    # --- how much there is ---

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody references: free groups, cached or not, and unused tails."""
        return self._free_blocks

    def available(self, *, headroom: bool = True) -> int:
        """Return `free_blocks`, less the soft headroom unless that is waived; at least 0."""
        return max(self._free_blocks - self._headroom, 0) if headroom else self._free_blocks

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._tables

    def __len__(self) -> int:
        return len(self._tables)

    # --- sequences ---

    def allocate(self, sequence: Hashable, blocks: int, *, expected: int | None = None) -> None:
        """Create `sequence`, or grow it, so that its table has `blocks` blocks; all or nothing.

        Parameters
        ----------
        sequence : Hashable
        blocks : int
            Size of the whole table afterwards. Nothing happens if it has as many.
        expected : int, optional
            Blocks the sequence is expected to need in all, which sizes its new active group.

        Raises
        ------
        OutOfBlocks
            If too few blocks are free. Nothing has changed.
        """
        table = self._tables.get(sequence)
        if table is None:
            if blocks < 0:
                raise ConfigError(f"cannot allocate {blocks} blocks")
            table = _Table()
            self._grow(table, blocks, expected)
            table.born = blocks
            self._tables[sequence] = table
        elif blocks > table.size:
            self._grow(table, blocks, expected)

    def table(self, sequence: Hashable) -> BlockIds:
        """Return the ids of the sequence's blocks in order: int32, shape [size], read-only."""
        return self._table(sequence).ids()

    def size(self, sequence: Hashable) -> int:
        """Return the number of blocks in the sequence's table."""
        return self._table(sequence).size

    def attach(self, sequence: Hashable, ids: BlockIds) -> None:
        """Append given blocks to the (new or existing) sequence; each gains a reference.

        Raises
        ------
        ConfigError
            If an id is not of this pool, or named twice.
        InvalidTransition
            If a block is reserved in the unused tail of an active group: its content means
            nothing.
        """
        ids = self._checked(ids)
        idle = ids[self._references_view[ids] == 0]
        in_cache = self._cached.contains(idle)
        cached, uncached = idle[in_cache], list(runs_of(idle[~in_cache]))
        for start, length in uncached:
            group = self._free.containing(start)
            if group is None or start + length > sum(group):
                raise InvalidTransition(
                    f"blocks {start} to {start + length - 1} are neither in use nor in a free "
                    "group, but reserved for a sequence's growth; they hold nothing to attach"
                )
        for start, length in uncached:
            group = self._free.containing(start)
            assert group is not None
            self._free.take(group, start, length)
        if len(cached):
            self._cached.remove(cached)
        self._free_blocks -= len(idle)
        self._references_view[ids] += 1
        table = self._tables.get(sequence)
        if table is None:
            table = self._tables[sequence] = _Table()
            table.born = len(ids)
        self._end_group(table)
        table.append(ids)

    def truncate(self, sequence: Hashable, blocks: int, *, cached: bool = False) -> None:
        """Keep the first `blocks` of the sequence's table; the others lose a reference."""
        table = self._table(sequence)
        if not 0 <= blocks <= table.size:
            raise InvalidTransition(f"cannot keep {blocks} blocks of a table of {table.size}")
        dropped = table.ids()[blocks:]
        # A new buffer: ids handed out before stay what they were.
        table.buffer = np.concatenate([table.buffer[:blocks], np.empty(8, np.int32)])
        table.size = blocks
        table.view = None
        self._end_group(table)
        self._release(dropped, cached)

    def detach(self, sequence: Hashable) -> BlockIds:
        """Forget the sequence; its references pass to the caller, who must `release` them."""
        table = self._table(sequence)
        del self._tables[sequence]
        self._growth += (table.size - table.born - self._growth) / 16
        self._end_group(table)
        return table.ids()

    def free(self, sequence: Hashable, *, cached: bool = False) -> None:
        """Forget the sequence and release its blocks."""
        self._release(self.detach(sequence), cached)

    # --- blocks ---

    def hold(self, ids: BlockIds) -> None:
        """Add a reference (a lease) to each of `ids`, which must be in use."""
        ids = self._checked(ids)
        self._require_references(ids)
        self._references_view[ids] += 1

    def release(self, ids: BlockIds, *, cached: bool = False) -> None:
        """Take a reference from each of `ids`; blocks without any become free."""
        ids = self._checked(ids)
        self._require_references(ids)
        self._release(ids, cached)

    def references(self, ids: BlockIds) -> npt.NDArray[np.int32]:
        """Return the reference counts of `ids`."""
        return self._references_view[self._checked(ids)]

    def forget_cached(self, ids: BlockIds) -> None:
        """Make those of `ids` that are free and cached ordinary free blocks."""
        ids = self._checked(ids)
        ids = ids[self._cached.contains(ids)]
        if len(ids):
            self._cached.remove(ids)
            for start, length in runs_of(ids):
                self._free.add(start, length)

    # --- reports ---

    def groups(self) -> Groups:
        """Return how the free memory lies."""
        uncached, cached = self._free.blocks, self._cached.blocks
        return Groups(
            free=len(self._free),
            largest=self._free.largest,
            uncached=uncached,
            cached=cached,
            tails=self._free_blocks - uncached - cached,
        )

    def check_integrity(self) -> None:
        """Compare all bookkeeping with itself; raises IntegrityError. Linear in the pool."""
        self._free.check_integrity()
        self._cached.check_integrity()
        owners = np.zeros(self.num_blocks, np.int32)
        claims = (self._references_view > 0).astype(np.int32)
        for start, length in self._free:
            claims[start : start + length] += 1
        claims[self._cached.ids()] += 1
        for sequence, table in self._tables.items():
            claims[table.next : table.end] += 1
            np.add.at(owners, table.ids(), 1)
            if not 0 <= table.size <= len(table.buffer):
                raise IntegrityError(f"{sequence!r} has {table.size} blocks in its table")
        if (wrong := np.flatnonzero(claims != 1)).size:
            raise IntegrityError(f"blocks {wrong[:8]} are claimed {claims[wrong[:8]]} times")
        if (wrong := np.flatnonzero(owners > self._references_view)).size:
            raise IntegrityError(f"blocks {wrong[:8]} are in more tables than they have references")
        if self._free_blocks != (free := int((self._references_view == 0).sum())):
            raise IntegrityError(f"{free} blocks are free, {self._free_blocks} were counted")

    # --- inside ---

    def _table(self, sequence: Hashable) -> _Table:
        try:
            return self._tables[sequence]
        except KeyError:
            raise UnknownSequence(f"sequence {sequence!r} has no blocks in this pool") from None

    def _checked(self, ids: BlockIds) -> BlockIds:
        ids = np.asarray(ids, np.int32)
        if ids.ndim != 1:
            raise ConfigError(f"block ids must have one dimension, got {ids.ndim}")
        ordered = ids if (ids[1:] > ids[:-1]).all() else np.sort(ids)
        if len(ids) and not 0 <= ordered[0] <= ordered[-1] < self.num_blocks:
            raise ConfigError(
                f"block ids from {ordered[0]} to {ordered[-1]} in a pool of {self.num_blocks}"
            )
        if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
            raise ConfigError(f"block {twice[0]} is named twice")
        return ids

    def _require_references(self, ids: BlockIds) -> None:
        if (idle := ids[self._references_view[ids] == 0]).size:
            raise InvalidTransition(f"blocks {idle[:8]} are not in use: nobody references them")

    def _release(self, ids: BlockIds, cached: bool) -> None:
        left = self._references_view[ids] - 1
        self._references_view[ids] = left
        ids = ids[left == 0]
        if not len(ids):
            return
        self._free_blocks += len(ids)
        if cached:
            self._cached.add(ids)
        else:
            for start, length in runs_of(ids):
                self._free.add(start, length)

    def _end_group(self, table: _Table) -> None:
        if table.end > table.next:
            self._free.add(table.next, table.end - table.next)
        table.next = table.end = 0

    def _grow(self, table: _Table, blocks: int, expected: int | None) -> None:
        need = blocks - table.size
        if need > self._free_blocks:
            raise OutOfBlocks(
                f"{need} more blocks needed, {self._free_blocks} of {self.num_blocks} are free; "
                "preempt a sequence or wait until one ends"
            )
        need -= self._use(table, need)
        if not need:
            return
        room = self._growth if expected is None else max(expected - blocks, 0)
        room = int(min(room, (self._free_blocks - need) // (len(self._tables) + 1)))
        if table.size:
            behind = int(table.buffer[table.size - 1]) + 1
            if length := self._free.at(behind):
                taken = min(length, need + room)
                self._free.take((behind, length), behind, taken)
                self._activate(table, behind, taken)
                need -= self._use(table, need)
        while need:
            self._activate(table, *self._find(need, room))
            need -= self._use(table, need)

    def _use(self, table: _Table, need: int) -> int:
        used = min(need, table.end - table.next)
        if used:
            stop = table.next + used
            self._references_view[table.next : stop] = 1
            table.append(np.arange(table.next, stop, dtype=np.int32))
            table.next = stop
            self._free_blocks -= used
        return used

    def _activate(self, table: _Table, start: int, length: int) -> None:
        table.next, table.end = start, start + length
        heapq.heappush(self._tails, (-length, next(self._serial), table))

    def _find(self, need: int, room: int) -> tuple[int, int]:
        group = self._fit(need, room)
        if group is None and self._cached.blocks:
            for start, length in runs_of(self._cached.pop(need + room)):
                self._free.add(start, length)
            group = self._fit(need, room)
        if group is not None:
            return group
        length = self._largest_tail()
        if length > self._free.largest:
            return self._take_back(min(length, need))
        length = self._free.largest
        group = self._free.best_fit(length)
        assert group is not None
        self._free.take(group, *group)
        return group

    def _fit(self, need: int, room: int) -> tuple[int, int] | None:
        largest = self._free.largest
        if largest < need:
            return None
        length = min(need + room, largest)
        group = self._free.best_fit(length)
        assert group is not None
        self._free.take(group, group[0], length)
        return group[0], length

    def _largest_tail(self) -> int:
        tails = self._tails
        while tails:
            length, serial, table = tails[0]
            now = table.next - table.end
            if now == length:
                return -length
            if now:
                heapq.heapreplace(tails, (now, serial, table))
            else:
                heapq.heappop(tails)
        return 0

    def _take_back(self, length: int) -> tuple[int, int]:
        table = self._tails[0][2]
        table.end -= length
        return table.end, length

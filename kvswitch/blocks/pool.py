"""The pool of block groups (section 3.1): runs of contiguous blocks instead of single ones.

Two sequences, A and B, after A has taken a second group::

    block  0   1   2   3   4   5   6   7   8   9   10  11  12  13  14  ...
           A   A   A   A   B   B   B   b   A   A   a   a   a   -   -   -
           [ group of A ]  [ active, B  ]  [    active, A   ]  [ free group

An active group's unused tail (b, a) is where its sequence grows into. Nobody references it, so it
counts as free, and it is taken back when free groups do not suffice.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvswitch.blocks.active import ActiveGroups
from kvswitch.blocks.cached import CachedBlocks
from kvswitch.blocks.free import FreeGroups, runs_of
from kvswitch.blocks.table import Table
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
    """How the free memory of a pool lies.

    Attributes
    ----------
    free : int
        Number of free groups without cached content.
    largest : int
        Blocks in the largest of them.
    uncached, cached, tails : int
        Blocks in free groups, free blocks with cached content, and blocks in unused tails of
        active groups. Their sum is `BlockGroupPool.free_blocks`.
    """

    free: int
    largest: int
    uncached: int
    cached: int
    tails: int


class BlockGroupPool:
    """Blocks of one memory, given to sequences in groups that are as contiguous as can be.

    A sequence grows in the tail of its active group, then in place into a free group right behind,
    then into the smallest free group that suffices: at first those without cached content, then
    blocks with it, oldest first. Last come the largest of free groups and of others' tails.
    An operation takes O(log n) time for n blocks in the pool, and O(1) for each run it touches.

    Parameters
    ----------
    num_blocks : int
        Blocks in the pool, at least 1.
    first_group : int, default 60
        Blocks in the tail of a new active group while nothing has been learned yet; later as many
        as sequences came to grow by, on average.
    headroom : float, default 0.0
        Share of the pool, in [0, 1), that `available` leaves out so that free groups stay large.
        When room is made by giving up cached content, as much is kept free of it.

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
        self._tables: dict[Hashable, Table] = {}
        self._free = FreeGroups(num_blocks)
        self._free.add(0, num_blocks)
        self._cached = CachedBlocks(num_blocks)
        self._references = array("i", bytes(4 * num_blocks))
        self._references_view = np.frombuffer(self._references, np.int32)
        self._free_blocks = num_blocks
        self._active = ActiveGroups(num_blocks)

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
            By default, and once it has more, this is learned from how much sequences came to grow.

        Raises
        ------
        ConfigError
            If `blocks` is negative.
        OutOfBlocks
            If too few blocks are free. Nothing has changed.
        """
        table = self._tables.get(sequence)
        if table is None:
            if blocks < 0:
                raise ConfigError(f"a table cannot have {blocks} blocks")
            table = Table()
            self._grow(table, blocks, expected)
            self._tables[sequence] = table
            return
        need = blocks - table.size
        if need == 1 and table.next < table.end:
            self._references[table.use_one()] = 1
            self._free_blocks -= 1
        elif need > 0:
            self._grow(table, blocks, expected)

    def table(self, sequence: Hashable) -> BlockIds:
        """Return the ids of the sequence's blocks in order: int32, shape [size], read-only."""
        return self._table(sequence).ids()

    def size(self, sequence: Hashable) -> int:
        """Return the number of blocks in the sequence's table."""
        return self._table(sequence).size

    def attach(self, sequence: Hashable, ids: BlockIds) -> None:
        """Append given blocks to the (new or existing) sequence; each gains a reference.

        Blocks in use become shared; free ones are taken out of the free groups, with their cached
        content. The active group ends: what the sequence grows by are other blocks.

        Raises
        ------
        ConfigError
            If an id is not of this pool, or named twice.
        InvalidTransition
            If a block is in the table already, or reserved in the unused tail of an active group.
        """
        ids = self._checked(ids)
        table = self._tables.get(sequence)
        if table is not None and (again := ids[np.isin(ids, table.ids())]).size:
            raise InvalidTransition(f"block {again[0]} is already in the table of {sequence!r}")
        counts = self._references_view[ids]
        idle = ids[counts == 0]
        in_cache = self._cached.contains(idle)
        cached, uncached = idle[in_cache], runs_of(idle[~in_cache])
        for start, length in uncached:
            if start + length > sum(self._free.containing(start)):
                raise InvalidTransition(
                    f"blocks {start} to {start + length - 1} are neither in use nor in a free "
                    "group, but reserved for a sequence's growth; they hold nothing to attach"
                )
        for start, length in uncached:
            self._free.take(self._free.containing(start), start, length)
        if len(cached):
            self._cached.remove(cached)
        self._free_blocks -= len(idle)
        self._references_view[ids] = counts + 1
        if table is None:
            table = self._tables[sequence] = Table()
        self._end_group(table)
        table.extend(ids)

    def end_reservations(self, ids: BlockIds) -> None:
        """Let `attach` have those of `ids` that lie in unused tails: these active groups end.

        Raises
        ------
        ConfigError
            If an id is not of this pool, or named twice.
        """
        ids = self._checked(ids)
        idle = ids[self._references_view[ids] == 0]
        idle = np.sort(idle[~self._cached.contains(idle)])
        if not any(
            start + length > sum(self._free.containing(start)) for start, length in runs_of(idle)
        ):
            return
        for table in self._tables.values():
            first, last = np.searchsorted(idle, (table.next, table.end))
            if first < last:
                self._end_group(table)

    def truncate(self, sequence: Hashable, blocks: int, *, cached: bool = False) -> None:
        """Keep the first `blocks` of the sequence's table; `release` the others.

        Raises
        ------
        InvalidTransition
            If the table has fewer than `blocks`.
        """
        table = self._table(sequence)
        if not 0 <= blocks <= table.size:
            raise InvalidTransition(
                f"cannot keep {blocks} blocks of {sequence!r}: its table has {table.size}"
            )
        if blocks < table.size:
            self._end_group(table)
            self._release(table.truncate(blocks), cached)

    def detach(self, sequence: Hashable) -> BlockIds:
        """Forget the sequence; its references pass to the caller, who must `release` them."""
        table = self._table(sequence)
        del self._tables[sequence]
        if table.born:
            grown = table.size + table.dropped - table.born
            self._growth += (grown - self._growth) / 16
        self._end_group(table)
        return table.ids()

    def free(self, sequence: Hashable, *, cached: bool = False) -> None:
        """Forget the sequence and `release` its blocks."""
        self._release(self.detach(sequence), cached)

    # --- blocks ---

    def hold(self, ids: BlockIds) -> None:
        """Add a reference, a lease, to each of `ids`, which must be in use.

        Raises
        ------
        ConfigError
            If an id is not of this pool, or named twice.
        InvalidTransition
            If nobody references one of them.
        """
        ids = self._checked(ids)
        self._references_view[ids] = self._in_use(ids) + 1

    def release(self, ids: BlockIds, *, cached: bool = False) -> None:
        """Take a reference from each of `ids`; blocks without any become free.

        Parameters
        ----------
        ids : BlockIds
            In the order of their table.
        cached : bool
            Whether a prefix cache may still hit their content. Such blocks are used again after
            all others: least recently released first, and of one release the last ones first.

        Raises
        ------
        ConfigError
            If an id is not of this pool, or named twice.
        InvalidTransition
            If nobody references one of them.
        """
        ids = self._checked(ids)
        self._in_use(ids)
        self._release(ids, cached)

    def references(self, ids: BlockIds) -> npt.NDArray[np.int32]:
        """Return the reference counts of `ids`."""
        return self._references_view[self._checked(ids)]

    def forget_cached(self, ids: BlockIds) -> None:
        """Make those of `ids` that are free with cached content ordinary free blocks."""
        ids = self._checked(ids)
        ids = ids[self._cached.contains(ids)]
        if len(ids):
            self._cached.remove(ids)
            self._set_free(ids)

    def longest_runs(self, blocks: int, also: BlockIds) -> BlockIds:
        """Choose up to `blocks` blocks, in few and long runs; nothing changes.

        Parameters
        ----------
        blocks : int
        also : BlockIds
            Blocks in use that may be chosen beside those of free groups without cached content.

        Returns
        -------
        BlockIds
            To be given to `attach`. Fewer than `blocks` if there are not as many.
        """
        runs: list[list[int]] = []
        for start, length in sorted([*self._free, *runs_of(np.sort(also))]):
            if runs and sum(runs[-1]) == start:
                runs[-1][1] += length
            else:
                runs.append([start, length])
        runs.sort(key=lambda run: run[1])
        chosen = [np.empty(0, np.int32)]
        while blocks and runs:
            # The shortest that suffices, or else the longest.
            place = bisect_left(runs, blocks, key=lambda run: run[1])
            start, length = runs.pop(min(place, len(runs) - 1))
            length = min(length, blocks)
            chosen.append(np.arange(start, start + length, dtype=np.int32))
            blocks -= length
        return np.concatenate(chosen)

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
        """Compare all bookkeeping with itself; linear in the pool.

        Raises
        ------
        IntegrityError
            With what is wrong. This is a bug.
        """
        self._free.check_integrity()
        self._cached.check_integrity()
        self._active.check_integrity(self._tables.values())
        owners = np.zeros(self.num_blocks, np.int32)
        claims = (self._references_view > 0).astype(np.int32)
        for start, length in self._free:
            claims[start : start + length] += 1
        claims[self._cached.ids()] += 1
        for table in self._tables.values():
            claims[table.next : table.end] += 1
            owners[table.ids()] += 1
        if (wrong := np.flatnonzero(claims != 1)).size:
            raise IntegrityError(f"blocks {wrong[:8]} are claimed {claims[wrong[:8]]} times")
        if (wrong := np.flatnonzero(owners > self._references_view)).size:
            raise IntegrityError(f"blocks {wrong[:8]} are in more tables than they have references")
        if self._free_blocks != (free := int((self._references_view == 0).sum())):
            raise IntegrityError(f"{free} blocks are free, {self._free_blocks} were counted")

    # --- inside ---

    def _table(self, sequence: Hashable) -> Table:
        try:
            return self._tables[sequence]
        except KeyError:
            raise UnknownSequence(f"sequence {sequence!r} has no blocks in this pool") from None

    def _checked(self, ids: BlockIds) -> BlockIds:
        ids = np.asarray(ids, np.int32)
        if ids.ndim != 1:
            raise ConfigError(f"block ids must have one dimension, got {ids.ndim}")
        if not len(ids):
            return ids
        ordered = ids
        if np.count_nonzero(ids[1:] <= ids[:-1]):
            ordered = np.sort(ids)
            if (twice := ordered[1:][ordered[1:] == ordered[:-1]]).size:
                raise ConfigError(f"block {twice[0]} is named twice")
        if ordered[0] < 0 or ordered[-1] >= self.num_blocks:
            raise ConfigError(
                f"block ids from {ordered[0]} to {ordered[-1]} in a pool of {self.num_blocks}"
            )
        return ids

    def _in_use(self, ids: BlockIds) -> npt.NDArray[np.int32]:
        """Return the reference counts of `ids`, none of which may be 0."""
        counts = self._references_view[ids]
        if np.count_nonzero(counts) < len(ids):
            idle = ids[counts == 0]
            raise InvalidTransition(f"blocks {idle[:8]} are not in use: nobody references them")
        return counts

    def _release(self, ids: BlockIds, cached: bool) -> None:
        left = self._references_view[ids] - 1
        self._references_view[ids] = left
        if np.count_nonzero(left):
            ids = ids[left == 0]
        if not len(ids):
            return
        self._free_blocks += len(ids)
        if cached:
            self._cached.add(ids)
        else:
            self._set_free(ids)

    def _set_free(self, ids: BlockIds) -> None:
        for start, length in runs_of(ids):
            self._free.add(start, length)

    def _grow(self, table: Table, blocks: int, expected: int | None) -> None:
        need = blocks - table.size
        if need > self._free_blocks:
            raise OutOfBlocks(
                f"{need} more blocks needed, {self._free_blocks} of {self.num_blocks} are free; "
                "preempt a sequence, or wait until one ends"
            )
        table.born = table.born or blocks
        need -= self._use(table, need)
        if not need:
            return
        room = self._room(blocks, need, expected)
        if table.size:
            behind = table.last + 1
            if length := self._free.at(behind):
                taken = min(length, need + room)
                self._free.take((behind, length), behind, taken)
                self._active.activate(table, behind, taken)
                need -= self._use(table, need)
        while need:
            self._active.activate(table, *self._find(need, room))
            need -= self._use(table, need)

    def _room(self, blocks: int, need: int, expected: int | None) -> int:
        """How many blocks beyond those needed a new active group should have."""
        wanted = self._growth if expected is None or expected < blocks else expected - blocks
        # An equal share, among all sequences, of two thirds of what is free, and of a tenth of
        # what would cost cached content (shares measured on tests/benchmarks/test_bench_blocks.py).
        cached = self._cached.blocks
        free = max(self._free_blocks - cached - need, 0) * 2 // 3 + cached // 10
        return int(min(wanted, free // (len(self._tables) + 1)))

    def _use(self, table: Table, need: int) -> int:
        """Move up to `need` blocks from the active group's tail to the table; return how many."""
        used = min(need, table.end - table.next)
        if used:
            start = table.next
            table.next += used
            self._references_view[start : table.next] = 1
            table.extend(np.arange(start, table.next, dtype=np.int32))
            self._free_blocks -= used
        return used

    def _find(self, need: int, room: int) -> tuple[int, int]:
        """Take a group (first block, length) for `need` blocks, or a part of them."""
        if self._free.largest < need and self._cached.blocks:
            missing = need + room + self._headroom - self._free.blocks
            if missing > 0:
                # What would be left of a run goes, too, if it is short beside what is needed (how
                # short was measured: tests/engines/vllm/test_block_pool.py).
                self._set_free(self._cached.pop(missing, more=need // 2))
        largest = self._free.largest
        if largest < need:
            tail = self._active.largest()
            if tail > largest:
                return self._active.take_back(min(tail, max(need, tail // 2)))
        length = min(need + room, largest)
        start, size = self._free.best_fit(length)
        # Leave room behind another sequence's active group, so that it can go on in place.
        gap = min(room, size - length) if self._active.wants(start) else 0
        self._free.take((start, size), start + gap, length)
        return start + gap, length

    def _end_group(self, table: Table) -> None:
        start, length = self._active.end(table)
        if length:
            self._free.add(start, length)

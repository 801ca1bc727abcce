"""The waiting, running and swapped queues: a row of numpy columns per sequence, no object."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.errors import IntegrityError, UnknownSequence

__all__ = ["RUNNING", "SWAPPED", "WAITING", "Queues", "RowNumbers", "State"]

RowNumbers: TypeAlias = npt.NDArray[np.intp]


class State(IntEnum):
    """The queue a sequence is in."""

    WAITING = 1  # never ran; nothing of it on the device or the host
    RUNNING = 2  # holds a slot and blocks; arriving included
    SWAPPED = 3  # switched out, or back for a new turn


# Columns hold plain integers, which compare faster.
WAITING: Final = int(State.WAITING)
RUNNING: Final = int(State.RUNNING)
SWAPPED: Final = int(State.SWAPPED)


class Queues:
    """All sequences, and the sums over those that run.

    Which queue a sequence is in is a column, so that all are ordered together without moving
    anything. Rows of removed sequences have state 0 and are used again.
    """

    def __init__(self) -> None:
        self.row_of: dict[Hashable, int] = {}
        self.sequences: list[Hashable] = []  # by row
        self._free: list[int] = []
        self.running = 0  # how many run
        self.held = 0  # blocks that they hold
        self.needed = 0  # blocks that they need
        self.state = np.zeros(0, np.int8)
        self.came_from = np.zeros(0, np.int8)  # running: state before it was switched in
        self.index = np.zeros(0, np.int64)  # in a priority trace
        self.base = np.zeros(0, np.float64)  # priority given
        self.priority = np.zeros(0, np.float64)  # what the policy makes of it
        self.cost = np.zeros(0, np.float64)  # of switching it out
        self.blocks_held = np.zeros(0, np.int64)  # 0 unless running
        self.blocks_needed = np.zeros(0, np.int64)  # never below those held
        self.arrival = np.zeros(0, np.int64)  # order of arrival
        self.ran = np.zeros(0, np.int64)  # not running: epoch in which it last ran, or arrived
        self.entered = np.zeros(0, np.int64)  # running: iteration it was switched in

    def add(self, sequence: Hashable) -> int:
        """Give `sequence` a row, and return it. The caller fills its columns."""
        if not self._free:
            self._grow()
        row = self._free.pop()
        self.row_of[sequence] = row
        self.sequences[row] = sequence
        return row

    def remove(self, row: int) -> None:
        """Take the row of a sequence that does not run back."""
        del self.row_of[self.sequences[row]]
        self.sequences[row] = None
        self.state[row] = 0
        self._free.append(row)

    def row(self, sequence: Hashable) -> int:
        """Return the row of `sequence`; UnknownSequence if it has none."""
        try:
            return self.row_of[sequence]
        except KeyError:
            raise UnknownSequence(f"{sequence!r} was never added, or has been removed") from None

    def names(self, rows: RowNumbers) -> tuple[Hashable, ...]:
        """Return the sequences of these rows."""
        return tuple(self.sequences[row] for row in rows.tolist())

    def switch_in(self, rows: RowNumbers, iteration: int) -> None:
        """Let these run, each holding what it needs."""
        needed = self.blocks_needed[rows]
        self.came_from[rows] = self.state[rows]
        self.state[rows] = RUNNING
        self.entered[rows] = iteration
        self.blocks_held[rows] = needed
        blocks = int(needed.sum())
        self.running += rows.size
        self.held += blocks
        self.needed += blocks

    def switch_out(self, rows: RowNumbers, to: int) -> None:
        """Move these, which run, to another queue; they hold nothing any more."""
        self.running -= rows.size
        self.held -= int(self.blocks_held[rows].sum())
        self.needed -= int(self.blocks_needed[rows].sum())
        self.blocks_held[rows] = 0
        self.state[rows] = to

    def resize(self, row: int, held: int, needed: int) -> int:
        """Set the blocks one holds and needs; return by how many the need has grown."""
        growth: int = needed - self.blocks_needed.item(row)
        self.blocks_needed[row] = needed
        if self.state.item(row) == RUNNING:
            self.needed += growth
            self.held += held - self.blocks_held.item(row)
            self.blocks_held[row] = held
        return growth

    def order(self) -> tuple[RowNumbers, npt.NDArray[np.bool_]]:
        """Return all rows, the most important first, and which of them run.

        By priority; equal ones running before the others, the dearest to switch out first; then by
        arrival.
        """
        used = np.flatnonzero(self.state)
        running = self.state[used] == RUNNING
        cost = np.where(running, self.cost[used], 0.0)
        by = np.lexsort((self.arrival[used], -cost, ~running, -self.priority[used]))
        return used[by], running[by]

    def least_important(self, exclude: Collection[Hashable]) -> Hashable | None:
        """Return the running sequence that is last in `order`, other than those excluded."""
        running = np.flatnonzero(self.state == RUNNING)
        if exclude:
            spared = [self.row_of[sequence] for sequence in exclude if sequence in self.row_of]
            running = running[~np.isin(running, spared)]
        if not running.size:
            return None
        by = np.lexsort((-self.arrival[running], self.cost[running], self.priority[running]))
        return self.sequences[int(running[by[0]])]

    def inverted(self) -> int:
        """Count those that do not run, with a higher priority than one that does."""
        running = self.priority[self.state == RUNNING]
        outside = self.priority[(self.state == WAITING) | (self.state == SWAPPED)]
        return int((outside > running.min()).sum()) if running.size else 0

    def _grow(self) -> None:
        old = len(self.sequences)
        more = max(64, old)
        for name, column in vars(self).items():
            if isinstance(column, np.ndarray):
                setattr(self, name, np.concatenate([column, np.zeros(more, column.dtype)]))
        self.sequences += [None] * more
        self._free += range(old + more - 1, old - 1, -1)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless rows, sums and blocks agree."""
        used = sorted(self.row_of.values())
        if used != np.flatnonzero(self.state).tolist():
            raise IntegrityError("scheduler: the rows in use are not those of its sequences")
        if sorted(used + self._free) != list(range(len(self.sequences))):
            raise IntegrityError("scheduler: a row is neither free nor used, or both")
        if any(self.sequences[row] != sequence for sequence, row in self.row_of.items()):
            raise IntegrityError("scheduler: a row names another sequence")
        running = self.state == RUNNING
        held, needed = self.blocks_held, self.blocks_needed
        sums = (int(running.sum()), int(held[running].sum()), int(needed[running].sum()))
        if sums != (self.running, self.held, self.needed):
            raise IntegrityError(
                f"scheduler: running, held and needed are {sums}, "
                f"booked as {(self.running, self.held, self.needed)}"
            )
        if held[~running].any() or (held > needed)[running].any():
            raise IntegrityError("scheduler: a sequence holds blocks outside, or beyond its need")

"""Device blocks of a planner: who needs them, and how many are to be had.

A block is *needed* while a sequence that is running or arriving has it in its table, or a swap-in
writes it. All others can be had without preempting anybody::

    | needed | idle: its sequence would have to leave | only swap-outs read it | free |
              `------------------------- available_blocks ---------------------------'
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.errors import IntegrityError, OutOfBlocks
from kvswitch.messages import BlockIds
from kvswitch.switch.sequence import NO_BLOCKS, ON_DEVICE, Incoming, SwapSequence
from kvswitch.switch.traffic import Traffic

__all__ = ["DeviceRoom"]


class DeviceRoom:
    """Gives sequences their device blocks, and counts those that are needed."""

    def __init__(self, pool: BlockGroupPool, traffic: Traffic, block_tokens: int) -> None:
        self._pool = pool
        self._traffic = traffic
        self._block_tokens = block_tokens
        self._needs = np.zeros(pool.num_blocks, np.int32)
        self._needed = 0

    @property
    def available(self) -> int:
        """Number of blocks that nobody needs."""
        return self._pool.num_blocks - self._needed

    @property
    def free(self) -> int:
        """Number of blocks that are available at once."""
        return self._pool.free_blocks

    def blocks(self, tokens: int) -> int:
        """Number of blocks that hold `tokens`."""
        return -(-tokens // self._block_tokens)

    def require(self, sequence: Hashable, blocks: int, beside: BlockIds = NO_BLOCKS) -> None:
        """Raise OutOfBlocks unless `blocks` can be had, not counting those in `beside`."""
        available = self.available - int(np.count_nonzero(self._needs[beside] == 0))
        if blocks > available:
            if blocks + len(beside) > self._pool.num_blocks:
                what = "it can never fit: shorten it, or give the device more"
            else:
                what = "preempt a sequence, or ask again later"
            raise OutOfBlocks(
                f"{sequence!r} needs {blocks} more device blocks, {available} of "
                f"{self._pool.num_blocks} are to be had; {what}"
            )

    def grow(self, s: SwapSequence, blocks: int, expected: int | None) -> list[int]:
        """Grow `s`'s table to `blocks`; ids of transfers that its writers must wait for.

        What runs gets free blocks first, and for the rest those that swap-outs read. What arrives
        gets both where no free group is large enough: its swap-in has fewer copies to make then,
        and can wait better than a batch.
        """
        size, after = len(s.table), []
        need, short = blocks - size, 0
        if s.state in ON_DEVICE:
            short = max(0, need - self._pool.free_blocks)
        elif self._traffic.out and need > self._pool.groups().largest:
            after = self._traffic.take_long_runs(s.id, need)
        self._pool.allocate(s.id, blocks - short, expected=expected)
        if short:
            after = self._traffic.take(s.id, short)
        self._set_table(s)
        # Nobody needed these: no look at what was there before.
        self._needs[s.table[size:]] = 1
        self._needed += blocks - size
        return after

    def attach(self, s: SwapSequence, blocks: BlockIds) -> None:
        """Append given blocks to `s`'s table."""
        self._pool.attach(s.id, blocks)
        self._set_table(s)
        self._need(blocks)

    def shrink(self, s: SwapSequence, blocks: int) -> None:
        """Keep the first `blocks` of `s`'s table."""
        if blocks < len(s.table):
            if s.state in ON_DEVICE:
                self._spare(s.table[blocks:])
            self._pool.truncate(s.id, blocks)
            self._set_table(s)

    def rest(self, s: SwapSequence) -> None:
        """`s` becomes idle: others may have its blocks."""
        self._spare(s.table)

    def wake(self, s: SwapSequence) -> None:
        """`s` is idle no more."""
        self._need(s.table)

    def has_spare(self, s: SwapSequence) -> bool:
        """Whether some of `s`'s blocks are needed by nobody (it is idle)."""
        return bool(np.count_nonzero(self._needs[s.table]) < len(s.table))

    def vacate(self, s: SwapSequence) -> BlockIds:
        """Empty `s`'s table; its references pass to the caller."""
        if s.state in ON_DEVICE:
            self._spare(s.table)
        s.table, s.capacity = NO_BLOCKS, 0
        return self._pool.detach(s.id) if s.id in self._pool else NO_BLOCKS

    def begin_in(self, incoming: Incoming) -> None:
        """A swap-in needs the blocks it writes, whatever becomes of its sequence."""
        self._traffic.begin_in(incoming)
        self._need(incoming.blocks)

    def end_in(self, transfer: int) -> Incoming:
        """End a swap-in; see `begin_in`."""
        incoming = self._traffic.end_in(transfer)
        self._spare(incoming.blocks)
        return incoming

    def _set_table(self, s: SwapSequence) -> None:
        s.table = self._pool.table(s.id)
        s.capacity = len(s.table) * self._block_tokens

    def _need(self, blocks: BlockIds) -> None:
        needs = self._needs[blocks]
        self._needs[blocks] = needs + 1
        self._needed += len(blocks) - int(np.count_nonzero(needs))

    def _spare(self, blocks: BlockIds) -> None:
        needs = self._needs[blocks] - 1
        self._needs[blocks] = needs
        self._needed -= len(blocks) - int(np.count_nonzero(needs))

    def check_integrity(self, sequences: Iterable[SwapSequence]) -> None:
        """Raise IntegrityError if tables, references and needs contradict each other."""
        references = np.zeros(self._pool.num_blocks, np.int32)
        needs = references.copy()
        for s in sequences:
            known = self._pool.table(s.id) if s.id in self._pool else NO_BLOCKS
            if not np.array_equal(known, s.table):
                raise IntegrityError(f"{s.id!r} is {s.state.name}, the pool gives it {known}")
            if s.capacity != len(s.table) * self._block_tokens:
                raise IntegrityError(f"{s.id!r}: {len(s.table)} blocks, {s.capacity} slots")
            references[s.table] += 1
            if s.state in ON_DEVICE:
                needs[s.table] += 1
        for incoming in self._traffic.into.values():
            needs[incoming.blocks] += 1
        self._traffic.add_references(references)
        every = np.arange(self._pool.num_blocks, dtype=np.int32)
        if (wrong := np.flatnonzero(self._pool.references(every) != references)).size:
            raise IntegrityError(f"leaked or lost references on device blocks {wrong[:8].tolist()}")
        if (wrong := np.flatnonzero(needs != self._needs)).size:
            raise IntegrityError(f"wrong count of who needs device blocks {wrong[:8].tolist()}")
        if self._needed != np.count_nonzero(needs):
            raise IntegrityError(f"{np.count_nonzero(needs)} blocks needed, not {self._needed}")

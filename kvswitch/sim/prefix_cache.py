"""A model of vLLM V1's memory: preemption recomputes, freed blocks stay findable until reused.

Full blocks that nobody uses any more keep their content until they are given out again, least
recently freed first, the last blocks of a sequence before its first. Whoever comes back finds what
is left of its prefix. With offloading, full blocks are also copied to the host as soon as they are
computed, a copy for each block, layer, and K or V, and loaded from there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping

import numpy as np

from kvswitch.errors import IntegrityError, OutOfBlocks
from kvswitch.messages import Direction, Transfer
from kvswitch.sim.link import NEVER, VirtualLink
from kvswitch.sim.systems import System
from kvswitch.switch import SwapStats

__all__ = ["PrefixCacheMemory"]


class _Lru:
    """Blocks of sequences, taken off the tail of whoever came first."""

    def __init__(self) -> None:
        self._of: OrderedDict[Hashable, int] = OrderedDict()
        self.blocks = 0

    def get(self, sequence: Hashable) -> int:
        return self._of.get(sequence, 0)

    def put(self, sequence: Hashable, blocks: int) -> None:
        """Let `sequence` have so many, and be the last to lose them."""
        self.blocks += blocks - self._of.pop(sequence, 0)
        if blocks:
            self._of[sequence] = blocks

    def take(self, blocks: int) -> None:
        """Take `blocks` away."""
        self.blocks -= blocks
        while blocks:
            sequence = next(iter(self._of))
            taken = min(blocks, self._of[sequence])
            blocks -= taken
            self._of[sequence] -= taken
            if not self._of[sequence]:
                del self._of[sequence]


class PrefixCacheMemory:
    """See the module's text, and `Memory` for the methods."""

    def __init__(
        self, system: System, link: VirtualLink, *, blocks: int, host_blocks: int, block_tokens: int
    ) -> None:
        self.link = link
        # Transfer, tokens when it has landed, blocks that were there before.
        self._arriving: dict[Hashable, tuple[int, int, int]] = {}
        self.overhead = 0.0
        self.stats = SwapStats()
        self._blocks = blocks
        self._host_blocks = host_blocks if system.offload != "none" else 0
        self._block_tokens = block_tokens
        self._prompts_only = system.offload == "prompts"
        self._held: dict[Hashable, int] = {}
        self._cached = _Lru()
        self._free = blocks
        self._stored = _Lru()
        self._store_of: dict[Hashable, int] = {}  # the newest store of a sequence
        self._fresh: dict[Hashable, int] = {}  # blocks to store, by sequence
        self._planned: list[Transfer] = []
        self._moving: set[int] = set()
        self._wait: set[int] = set()
        self._next_id = 0
        self._landed: dict[Hashable, int] = {}

    @property
    def arriving(self) -> Mapping[Hashable, object]:
        """See `Memory`."""
        return self._arriving

    def available(self) -> int:
        """See `Memory`."""
        return self._free + self._cached.blocks

    def start(self, sequence: Hashable, tokens: int, expected: int) -> None:
        """See `Memory`."""
        self._hold(sequence, -(-tokens // self._block_tokens))

    def resume(self, sequence: Hashable, tokens: int) -> int:
        """See `Memory`."""
        full = tokens // self._block_tokens
        here = min(self._cached.get(sequence), full)
        there = min(self._stored.get(sequence), full)
        blocks = max(here, there)
        if blocks > self.available():
            raise OutOfBlocks(f"{blocks} blocks needed, {self.available()} are free")
        cached = self._cached.get(sequence)
        self._cached.put(sequence, 0)
        self._free += cached
        self._hold(sequence, blocks)
        self.stats.resumptions += 1
        self.stats.tokens_lost += tokens - blocks * self._block_tokens
        if there > here:
            self._stored.put(sequence, self._stored.get(sequence))  # it has been used
            after = (self._store_of[sequence],) if sequence in self._store_of else ()
            transfer = self._plan(Direction.IN, there - here, after)
            self.stats.blocks_in += there - here
            self.stats.copies_in += there - here
            self._arriving[sequence] = (transfer.id, blocks * self._block_tokens, here)
        return blocks * self._block_tokens

    def grow(self, sequence: Hashable, tokens: int, expected: int) -> int:
        """See `Memory`."""
        blocks = -(-tokens // self._block_tokens)
        if blocks > self._held[sequence]:
            self._hold(sequence, blocks)
            if not self._prompts_only and sequence not in self._arriving:
                self._store(sequence, blocks - 1)
        return self._held[sequence]

    def prefilled(self, sequence: Hashable, tokens: int) -> None:
        """See `Memory`."""
        self._store(sequence, tokens // self._block_tokens)

    def preempt(self, sequence: Hashable, tokens: int) -> None:
        """See `Memory`."""
        self.stats.preemptions += 1
        self._leave(sequence, tokens)
        if sequence in self._fresh or self._store_of.get(sequence) in self._moving:
            # Stores of a preempted request are flushed before its blocks are given away.
            self._wait.add(self._flush(sequence))

    def end_turn(self, sequence: Hashable, tokens: int) -> bool:
        """See `Memory`."""
        self._leave(sequence, tokens)
        return True

    def free(self, sequence: Hashable, tokens: int) -> None:
        """See `Memory`: content stays until its blocks are used again."""
        self._leave(sequence, tokens)

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Nothing happens: a cache knows no priorities."""

    def switch(self, now: float, last_step: float | None) -> float:
        """See `Memory`."""
        self._observe(now)
        for sequence in list(self._fresh):
            self._flush(sequence)
        planned, self._planned = self._planned, []
        for transfer in planned:
            self.link.submit(transfer, now)
        if not self._wait:
            return now
        while (ready := self.link.end_of(self._wait)) == NEVER:
            self._observe(self.link.next_end())
        self._wait.clear()
        return max(now, ready)

    def landed(self) -> dict[Hashable, int]:
        """See `Memory`."""
        landed, self._landed = self._landed, {}
        return landed

    def close(self, now: float) -> None:
        """See `Memory`."""
        self.switch(now, None)
        self._observe(NEVER)
        if self._held or self._arriving or self._free + self._cached.blocks != self._blocks:
            raise IntegrityError(f"{len(self._held)} sequences hold blocks at the end")

    # -- inside --------------------------------------------------------------------------------

    def _hold(self, sequence: Hashable, blocks: int) -> None:
        need = blocks - self._held.get(sequence, 0)
        if need > self.available():
            raise OutOfBlocks(f"{need} blocks needed, {self.available()} are free")
        if need > self._free:
            self._cached.take(need - self._free)
            self._free = need
        self._free -= need
        self._held[sequence] = blocks

    def _leave(self, sequence: Hashable, tokens: int) -> None:
        held = self._held.pop(sequence)
        full = min(tokens // self._block_tokens, held)
        if sequence in self._arriving:
            full = min(full, self._arriving.pop(sequence)[2])
        self._cached.put(sequence, full)
        self._free += held - full

    def _store(self, sequence: Hashable, blocks: int) -> None:
        new = blocks - self._stored.get(sequence)
        if not self._host_blocks or new <= 0 or blocks > self._host_blocks:
            return
        self._stored.put(sequence, blocks)
        self._stored.take(max(0, self._stored.blocks - self._host_blocks))
        self._fresh[sequence] = self._fresh.get(sequence, 0) + new

    def _flush(self, sequence: Hashable) -> int:
        """Send what is to be stored of a sequence; the transfer after which all of it is."""
        blocks = self._fresh.pop(sequence, 0)
        if blocks:
            self.stats.blocks_out_full += blocks
            self.stats.copies_out_full += blocks
            self._store_of[sequence] = self._plan(Direction.OUT, blocks).id
        return self._store_of[sequence]

    def _plan(self, direction: Direction, blocks: int, after: tuple[int, ...] = ()) -> Transfer:
        runs = np.array([[0, 0, blocks]], np.int32)
        transfer = Transfer(self._next_id, direction, runs, after)
        self._next_id += 1
        self._planned.append(transfer)
        self._moving.add(transfer.id)
        return transfer

    def _observe(self, now: float) -> None:
        completed = self.link.advance(now).completed
        if not completed:
            return
        self._moving.difference_update(completed)
        ended = set(completed)
        for sequence, (transfer, tokens, _) in list(self._arriving.items()):
            if transfer in ended:
                del self._arriving[sequence]
                self._landed[sequence] = tokens

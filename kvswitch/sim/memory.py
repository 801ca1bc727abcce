"""KV memory as the simulated engine sees it: kvswitch's planner over a virtual link."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from time import process_time
from typing import Protocol

from kvswitch.errors import HostMemoryExhausted, IntegrityError
from kvswitch.sim.link import NEVER, VirtualLink
from kvswitch.sim.systems import System
from kvswitch.switch import SequenceState, SwapManager, SwapStats

__all__ = ["Memory", "SwitchMemory"]


class Memory(Protocol):
    """What an engine asks of its KV memory; sequences are conversations over many turns.

    Attributes
    ----------
    link : VirtualLink
    overhead : float
        CPU seconds spent deciding.
    """

    link: VirtualLink
    overhead: float

    @property
    def arriving(self) -> Mapping[Hashable, object]:
        """Sequences whose blocks are there, but not yet their content."""

    def available(self) -> int:
        """Blocks that can be had without preempting anybody."""

    def start(self, sequence: Hashable, tokens: int, expected: int) -> None:
        """Give a new sequence blocks for `tokens`; OutOfBlocks if there are not as many."""

    def resume(self, sequence: Hashable, tokens: int) -> int:
        """Bring a sequence back; how many of its `tokens` are, or will be, valid. OutOfBlocks."""

    def grow(self, sequence: Hashable, tokens: int, expected: int) -> int:
        """Give a sequence blocks for `tokens`; how many it has then. OutOfBlocks."""

    def prefilled(self, sequence: Hashable, tokens: int) -> None:
        """Note that all prompt tokens, up to `tokens`, are computed."""

    def preempt(self, sequence: Hashable, tokens: int) -> None:
        """Take a sequence, of which `tokens` are computed, off the device."""

    def end_turn(self, sequence: Hashable, tokens: int) -> bool:
        """End a turn; False if nothing of the sequence is kept."""

    def free(self, sequence: Hashable, tokens: int) -> None:
        """End a conversation."""

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Set how important a sequence is."""

    def switch(self, now: float, last_step: float | None) -> float:
        """Let what has been decided begin; when the forward may."""

    def landed(self) -> dict[Hashable, int]:
        """Sequences that have arrived since the last call, and how many tokens."""

    def close(self, now: float) -> None:
        """Forget all sequences, let all transfers end, and check that nothing has leaked."""


class SwitchMemory:
    """The real planner.

    Parameters
    ----------
    blocks, host_blocks, block_tokens, first_group
        See `SwapManager`.
    system : System
    link : VirtualLink
    headroom : float
    """

    def __init__(
        self,
        system: System,
        link: VirtualLink,
        *,
        blocks: int,
        host_blocks: int,
        block_tokens: int,
        headroom: float,
        first_group: int = 60,
    ) -> None:
        self.planner = SwapManager(
            blocks,
            host_blocks,
            block_tokens,
            block_bytes=link.pricing.block_bytes,
            first_group=first_group,
            headroom=headroom,
            strategy=system.strategy,
            reuse=system.reuse,
            swap=system.swap,
        )
        self.link = link
        self._arriving = self.planner.queue(SequenceState.ARRIVING)
        self.overhead = 0.0
        self._next_turn = system.next_turn
        self._inline = system.dispatcher == "engine" and not system.serial

    @property
    def arriving(self) -> Mapping[Hashable, object]:
        """See `Memory`."""
        return self._arriving

    @property
    def stats(self) -> SwapStats:
        """The planner's counters."""
        return self.planner.stats()

    def available(self) -> int:
        """See `Memory`."""
        return self.planner.available_blocks(headroom=False, returning=True)

    def start(self, sequence: Hashable, tokens: int, expected: int) -> None:
        """See `Memory`."""
        self.planner.allocate(sequence, tokens, expected=expected)

    def resume(self, sequence: Hashable, tokens: int) -> int:
        """See `Memory`."""
        return self.planner.resume(sequence, tokens).tokens

    def grow(self, sequence: Hashable, tokens: int, expected: int) -> int:
        """See `Memory`."""
        return len(self.planner.allocate(sequence, tokens, expected=expected))

    def prefilled(self, sequence: Hashable, tokens: int) -> None:
        """Nothing happens: copies are made when a sequence leaves."""

    def preempt(self, sequence: Hashable, tokens: int) -> None:
        """See `Memory`."""
        try:
            self.planner.preempt(sequence, tokens)
        except HostMemoryExhausted:
            self.planner.preempt(sequence, tokens, copy=False)

    def end_turn(self, sequence: Hashable, tokens: int) -> bool:
        """See `Memory`."""
        if self._next_turn == "drop":
            self.planner.free(sequence)
            return False
        if self._next_turn == "keep":
            self.planner.end_turn(sequence, tokens)
        else:
            self.preempt(sequence, tokens)
        return True

    def free(self, sequence: Hashable, tokens: int) -> None:
        """See `Memory`."""
        self.planner.free(sequence)

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """See `Memory`."""
        self.planner.set_priority(sequence, priority)

    def switch(self, now: float, last_step: float | None) -> float:
        """See `Memory`."""
        planner, link = self.planner, self.link
        observed = link.advance(now, last_step)
        begin = process_time()
        planner.observe(observed)
        orders = planner.orders()
        self.overhead += process_time() - begin
        for transfer in orders.transfers:
            link.submit(transfer, now)
            if self._inline:  # copies go on meanwhile
                now += link.pricing.dispatch_seconds(transfer)
        link.cancel(orders.cancel, now)
        if not orders.wait:
            return now
        while (ready := link.end_of(orders.wait)) == NEVER:
            observed = link.advance(link.next_end())
            begin = process_time()
            planner.observe(observed)
            self.overhead += process_time() - begin
        return max(now, ready)

    def landed(self) -> dict[Hashable, int]:
        """See `Memory`."""
        return self.planner.landed()

    def close(self, now: float) -> None:
        """See `Memory`."""
        for state in SequenceState:
            for sequence in list(self.planner.queue(state)):
                self.planner.free(sequence)
        self.switch(now, None)
        self.planner.observe(self.link.advance(NEVER))
        self.planner.check_integrity()
        leases, copies = self.planner.copies.num_leases(), self.planner.copies
        free = (self.planner.device.free_blocks, copies.pool.free_blocks)
        if leases or free != (self.planner.device.num_blocks, copies.pool.num_blocks):
            raise IntegrityError(f"{leases} leases, {free} device and host blocks free at the end")

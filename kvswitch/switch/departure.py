"""Leaving the device: swap-outs, and idle sequences that make room (Algorithm 1, step 3)."""

from __future__ import annotations

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies import Fill, HostCopies
from kvswitch.errors import HostMemoryExhausted
from kvswitch.messages import BlockIds
from kvswitch.switch.room import DeviceRoom
from kvswitch.switch.sequence import Sequences, SequenceState, SwapSequence
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.traffic import Traffic

__all__ = ["Departures"]


class Departures:
    """Takes sequences off the device.

    Parameters
    ----------
    swap : bool
        False: send nothing, ever.
    ahead : bool
        Send idle sequences' KV ahead of need, while no other swap-out is under way.
    """

    def __init__(
        self,
        device: BlockGroupPool,
        copies: HostCopies,
        sequences: Sequences,
        room: DeviceRoom,
        traffic: Traffic,
        stats: SwapStats,
        *,
        swap: bool,
        ahead: bool,
    ) -> None:
        self._device = device
        self._copies = copies
        self._sequences = sequences
        self._room = room
        self._traffic = traffic
        self._stats = stats
        self._swap = swap
        self._ahead = swap and ahead
        self._uncopied: dict[SwapSequence, None] = {}

    # -- leaving -------------------------------------------------------------------------------

    def leave(self, s: SwapSequence, tokens: int, *, copy: bool = True) -> None:
        """Take `s`, of which `tokens` are computed, off the device.

        Blocks that the host has a copy of, or does not get one of, are released at once; the
        others by the end of their swap-out.

        Raises
        ------
        HostMemoryExhausted
            The host holds nothing of it and cannot take anything. Nothing has changed.
        """
        copy = copy and self._swap
        fill = self._fill(s, tokens) if copy else None
        self._copies.truncate(s.id, tokens)
        del s.keys[tokens // self._copies.block_tokens :]
        blocks = self._room.vacate(s)
        sent = 0
        if fill is not None:
            sent = len(fill.blocks)
            first, last = fill.first, fill.first + sent
            self._send(s, fill, blocks[first:last])
            blocks = np.concatenate((blocks[:first], blocks[last:]))
        if len(blocks):
            self._device.release(blocks)
        if copy:
            covered = self._room.blocks(self._copies.covered(s.id))
            self._stats.blocks_spared += covered - sent
        s.tokens = tokens
        self.forget(s)
        self.left(s)

    def left(self, s: SwapSequence) -> None:
        """Queue a sequence that is off the device by what is still under way of it."""
        self._copies.set_resident(s.id, False)
        state = SequenceState.LEAVING if s.outgoing else SequenceState.HOST
        self._sequences.move(s, state)

    def _fill(self, s: SwapSequence, tokens: int) -> Fill | None:
        """Host blocks for what the host lacks of `s`; None if it lacks nothing, or has no room."""
        copies = self._copies
        known = s.id in copies
        if s.keys:
            # What others of the same content have sent, or are sending, need not be sent again.
            keys = s.keys[: tokens // copies.block_tokens]
            copies.adopt(s.id, keys)
            for followed in copies.follow(s.id, keys):
                self._traffic.follow(s, followed)
        # Copies of what lies behind `tokens` cover nothing; they are cut when `s` has left.
        covered = min(copies.covered(s.id), tokens)
        if tokens == covered:
            return None
        copies.set_priority(s.id, s.priority)
        try:
            return copies.begin(s.id, tokens)
        except HostMemoryExhausted:
            if covered:
                return None
            if not known:
                copies.drop(s.id)
            raise

    def _send(self, s: SwapSequence, fill: Fill, blocks: BlockIds) -> None:
        transfer = self._traffic.send(s, fill, blocks).transfer
        self._copies.announce(fill, s.keys)
        if fill.first:
            self._stats.blocks_out_incremental += len(blocks)
            self._stats.copies_out_incremental += len(transfer.runs)
        else:
            self._stats.blocks_out_full += len(blocks)
            self._stats.copies_out_full += len(transfer.runs)

    def end_out(self, transfer: int, *, ok: bool) -> None:
        """Take note that a swap-out has ended."""
        leader = self._traffic.end_out(transfer)
        outs = (leader, *leader.followers)
        if not ok and any(out.sequence in self._sequences for out in outs):
            self._stats.transfers_failed += 1
        for out in outs:
            self._settle(out.sequence, out.fill, ok=ok)

    def _settle(self, s: SwapSequence, fill: Fill, *, ok: bool) -> None:
        """Count what has been written for `s`, or not."""
        if ok:
            self._copies.commit(fill)
        else:
            self._copies.abort(fill)
        if s not in self._sequences:
            return
        self.publish(s, fill.first)
        if s.state is SequenceState.LEAVING and not s.outgoing:
            self._sequences.move(s, SequenceState.HOST)

    def publish(self, s: SwapSequence, first: int) -> None:
        """Let others adopt the copies of `s`'s named blocks, from the `first` on."""
        complete = self._copies.valid(s.id) // self._copies.block_tokens
        for index in range(first, min(len(s.keys), complete)):
            self._copies.publish(s.id, index, s.keys[index])

    # -- idle sequences --------------------------------------------------------------------------

    def rest(self, s: SwapSequence) -> None:
        """Let a running sequence become idle."""
        self._room.rest(s)
        self._sequences.move(s, SequenceState.IDLE)
        if self._ahead and self._copies.covered(s.id) < s.tokens:
            self._uncopied[s] = None

    def wake(self, s: SwapSequence) -> None:
        """Let an idle sequence run again."""
        self._room.wake(s)
        self._sequences.move(s, SequenceState.RUNNING)
        self.forget(s)

    def forget(self, s: SwapSequence) -> None:
        """Do not send `s` ahead: it is idle no more."""
        self._uncopied.pop(s, None)

    def copy_ahead(self) -> None:
        """If nothing goes out, send the KV of one idle sequence, which stays where it is."""
        if self._traffic.out or not self._uncopied:
            return
        s = next(iter(self._uncopied))
        del self._uncopied[s]
        try:
            fill = self._fill(s, s.tokens)
        except HostMemoryExhausted:
            return
        if fill is not None:
            blocks = s.table[fill.first : fill.first + len(fill.blocks)].copy()
            self._device.hold(blocks)
            self._send(s, fill, blocks)
            self._copies.set_resident(s.id, True)
            self._stats.idle_copies += 1

    def make_room(self, blocks: int) -> None:
        """Let idle sequences leave until `blocks` are free or only read by swap-outs.

        Those with complete copies go first: they cost nothing now. Then come blocks that are
        leaving anyway, then idle sequences that must be sent. `DeviceRoom.require` has said that
        there are enough.
        """
        if blocks <= self._room.free:
            return
        self.keep_free(blocks)
        for s in list(self._sequences.queues[SequenceState.IDLE].values()):
            if blocks <= self._room.free + self._traffic.takeable_blocks():
                return
            self._evict(s)

    def keep_free(self, blocks: int) -> None:
        """Let idle sequences with complete copies leave until `blocks` are free, or none is left.

        Called with the headroom once a step: free groups stay large only where some memory is free,
        and idle sequences would otherwise fill all of it.
        """
        if blocks <= self._room.free:
            return
        for s in list(self._sequences.queues[SequenceState.IDLE].values()):
            if not s.outgoing and self._copies.valid(s.id) >= s.tokens:
                self._evict(s)
                if blocks <= self._room.free:
                    return

    def _evict(self, s: SwapSequence) -> None:
        if not self._room.has_spare(s):
            return  # others need all of it
        try:
            self.leave(s, s.tokens)
        except HostMemoryExhausted:
            self.leave(s, s.tokens, copy=False)
        self._stats.evictions += 1

"""Coming back to the device: blocks taken back, and swap-ins (Algorithm 1, steps 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies import HostCopies
from kvswitch.messages import BlockIds, Direction
from kvswitch.switch.departure import Departures
from kvswitch.switch.room import DeviceRoom
from kvswitch.switch.sequence import (
    Incoming,
    Sequences,
    SequenceState,
    SwapSequence,
)
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.strategy import Arrival, Strategy
from kvswitch.switch.traffic import Traffic
from kvswitch.transfer.plan import coalesce

__all__ = ["Arrivals", "Resumption"]


@dataclass(frozen=True, slots=True)
class Resumption:
    """What `SwapManager.resume` brings back.

    Attributes
    ----------
    tokens : int
        Leading tokens that are valid (once the swap-in has landed); the rest is to be recomputed.
    transfer : int or None
        Id of the swap-in, None if everything is on the device already.
    """

    tokens: int
    transfer: int | None


class Arrivals:
    """Brings sequences back to the device.

    Parameters
    ----------
    block_bytes : int
        Bytes in a block, for the estimates of the strategy.
    reuse : bool
        Keep the host copies of a sequence that is back.
    """

    def __init__(
        self,
        device: BlockGroupPool,
        copies: HostCopies,
        sequences: Sequences,
        room: DeviceRoom,
        traffic: Traffic,
        departures: Departures,
        stats: SwapStats,
        *,
        block_bytes: int,
        reuse: bool,
    ) -> None:
        self._device = device
        self._copies = copies
        self._sequences = sequences
        self._room = room
        self._traffic = traffic
        self._departures = departures
        self._stats = stats
        self._block_bytes = block_bytes
        self._reuse = reuse
        self._landed: dict[SwapSequence, int] = {}  # not yet reported
        self._short: set[SwapSequence] = set()  # those with fewer tokens than promised
        self._last_end = 0  # steps planned when a swap-in last ended

    def bring_back(self, s: SwapSequence, accepted: int, step: int) -> Resumption:
        """Resume a sequence that has left the device.

        Raises
        ------
        OutOfBlocks
            Nothing has changed.
        """
        block_tokens = self._copies.block_tokens
        valid = min(accepted, self._copies.covered(s.id))
        here = self._traffic.still_here(s, self._room.blocks(valid))
        if valid % block_tokens and here[-1] >= 0 and self._traffic.shared(s, int(here[-1])):
            here[-1] = -1  # it is going to be written: take a block of its own
        gone, back = np.flatnonzero(here < 0), here[here >= 0]
        self._room.require(s.id, len(gone), beside=back)
        # From here on nothing can fail. What is going to be read, here and on the host, is held
        # before idle sequences leave: they might be given it.
        self._copies.truncate(s.id, accepted)
        del s.keys[accepted // block_tokens :]
        lease = self._copies.pin(s.id, valid) if len(gone) else None
        self._device.hold(back)
        self._departures.make_room(len(gone))
        after = self._build_table(s, here) if len(back) else self._room.grow(s, len(gone), None)
        self._device.release(back)
        s.tokens = valid
        self._stats.resumptions += 1
        self._stats.take_backs += len(back) > 0
        self._stats.tokens_lost += accepted - valid
        if lease is None:
            self._arrived(s)
            return Resumption(valid, None)
        # What is loaded may still be on its way to the host: then those swap-outs come first.
        needs = []
        for out in s.outgoing:
            first = out.fill.first
            needed = gone[(gone >= first) & (gone < first + len(out.blocks))]
            if len(needed):
                after.append(out.transfer.id)
                needs.append((out.fill, int(needed[0]) * block_tokens))
        blocks = s.table[gone]
        runs = coalesce(lease.blocks[gone], blocks)
        transfer = self._traffic.plan(Direction.IN, runs, after)
        first = int(gone[0]) * block_tokens
        s.incoming = Incoming(transfer, s, lease, blocks, first, valid, tuple(needs), step)
        self._room.begin_in(s.incoming)
        self._stats.blocks_in += len(blocks)
        self._stats.copies_in += len(transfer.runs)
        self._sequences.move(s, SequenceState.ARRIVING)
        return Resumption(valid, transfer.id)

    def _build_table(self, s: SwapSequence, here: BlockIds) -> list[int]:
        """Give `s` the blocks in `here`, and others where there are none; ids to wait for."""
        after: list[int] = []
        edges = (np.flatnonzero(np.diff(here >= 0)) + 1).tolist()
        for start, stop in zip([0, *edges], [*edges, len(here)], strict=True):
            if start == stop or here[start] < 0:
                last = stop == len(here)
                after += self._room.grow(s, stop, None if last else stop)
            else:
                self._room.attach(s, here[start:stop])
        return after

    def end_in(self, transfer: int, step: int, *, ok: bool) -> None:
        """Take note that a swap-in has ended, when `step` steps had been planned."""
        self._last_end = step
        incoming = self._room.end_in(transfer)
        self._copies.release(incoming.lease)
        s = incoming.sequence
        if s.incoming is not incoming:
            return  # freed, or preempted while arriving
        s.incoming = None
        valid = incoming.tokens
        for fill, tokens in incoming.needs:
            if not fill.committed:
                valid = min(valid, tokens)
        if not ok:
            # Whether the link, the copy or its swap-out was at fault: do not try it twice.
            self._stats.transfers_failed += 1
            valid = min(valid, incoming.first)
            self._copies.truncate(s.id, valid)
        if valid < incoming.tokens:
            self._stats.tokens_lost += incoming.tokens - valid
            s.tokens = valid
            self._short.add(s)
        self._landed[s] = valid
        self._arrived(s)

    def _arrived(self, s: SwapSequence) -> None:
        self._sequences.move(s, SequenceState.RUNNING)
        self.keep_copies(s)

    def keep_copies(self, s: SwapSequence) -> None:
        """Keep or drop the host copies of a sequence that is on the device."""
        if self._reuse:
            self._copies.set_resident(s.id, True)
        else:
            self._copies.truncate(s.id, 0)

    def turn_back(self, s: SwapSequence, tokens: int) -> None:
        """Take an arriving sequence off the device: the host has what it had."""
        incoming = s.incoming
        assert incoming is not None
        self._traffic.cancel(incoming.transfer)
        s.incoming = None
        s.tokens = min(incoming.tokens, tokens)
        self._copies.truncate(s.id, s.tokens)
        del s.keys[s.tokens // self._copies.block_tokens :]
        self._device.release(self._room.vacate(s))
        self._departures.left(s)

    def to_await(self, strategy: Strategy, step: int) -> list[int]:
        """Which of the swap-ins under way the batch of `step` should wait for (step 4)."""
        queues = self._sequences.queues
        arriving = [s.incoming for s in queues[SequenceState.ARRIVING].values() if s.incoming]
        if not arriving:
            return []
        arriving.sort(key=lambda incoming: incoming.transfer.id)
        arrivals: list[Arrival] = []
        for incoming in arriving:
            nbytes: float = len(incoming.blocks) * self._block_bytes
            if not arrivals:
                # They land in order: only the oldest has got anything, since the last one landed.
                steps = step - 1 - max(incoming.step, self._last_end)
                nbytes -= min(nbytes, steps * strategy.bandwidth * strategy.step_seconds)
            arrivals.append(Arrival(incoming.transfer.id, nbytes))
        count = strategy.wait_for(arrivals, len(queues[SequenceState.RUNNING]))
        return [arrival.transfer for arrival in arrivals[:count]]

    def at_most(self, s: SwapSequence, tokens: int) -> int:
        """`tokens`, or what has landed of `s` if that is less and has not been reported yet."""
        return min(tokens, self._landed[s]) if s in self._short else tokens

    def cut(self, s: SwapSequence) -> None:
        """Only the first `s.tokens` are wanted any more, of what lands or has landed, too."""
        if s.incoming is not None:
            s.incoming.tokens = min(s.incoming.tokens, s.tokens)
        if s in self._landed:
            self._landed[s] = min(self._landed[s], s.tokens)

    def forget(self, s: SwapSequence) -> None:
        """Do not report `s` as landed: it is not there any more."""
        self._landed.pop(s, None)
        self._short.discard(s)

    def take_landed(self) -> dict[SwapSequence, int]:
        """Sequences whose swap-in has ended since the last call, with their valid tokens."""
        landed, self._landed = self._landed, {}
        self._short.clear()
        return landed

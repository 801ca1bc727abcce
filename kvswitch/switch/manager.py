"""The planner: who is where, and what has to move (paper section 3.2, Algorithm 1).

`SwapManager` is a pure state machine. Verbs (`allocate`, `preempt`, `resume`, ...) decide in
integers what happens to which blocks; `step` takes in what has happened and gives out what every
worker must do. It reads no clock, starts no thread and touches no device, so that every rank, the
simulator and a replay come to the same decisions from the same inputs.

Two rules keep bytes safe (a transfer reads or writes exactly the blocks it holds):

* a block goes back to its pool when the last reference goes, and every transfer holds one;
* a block that a swap-out still reads may be given to another sequence only together with that
  transfer's id, which the next writer waits for: a swap-in through `Transfer.after`, the engine's
  forward through `SwapOrders.wait`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.config import StrategyName
from kvswitch.copies import Fill, HostCopies
from kvswitch.errors import (
    HostMemoryExhausted,
    IntegrityError,
    InvalidTransition,
    OutOfBlocks,
    UnknownSequence,
)
from kvswitch.messages import BlockIds, Direction, Observations, SwapOrders
from kvswitch.switch.sequence import Incoming, SequenceState, SwapSequence
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.strategy import Arrival, Strategy
from kvswitch.switch.traffic import Traffic
from kvswitch.transfer.plan import coalesce

__all__ = ["Resumption", "SwapManager"]

_ON_DEVICE = (SequenceState.RUNNING, SequenceState.ARRIVING)
_SWAPPED = (SequenceState.LEAVING, SequenceState.HOST)


@dataclass(frozen=True, slots=True)
class Resumption:
    """What `resume` brings back.

    Attributes
    ----------
    tokens : int
        Leading tokens that are valid (once the swap-in has landed); the rest is to be recomputed.
    transfer : int or None
        Id of the swap-in, None if everything is on the device already.
    """

    tokens: int
    transfer: int | None


class SwapManager:
    """Decides which blocks move when; see the module's text.

    Parameters
    ----------
    device_blocks, host_blocks : int
        Sizes of the pools.
    block_tokens : int
        Token slots in a block.
    block_bytes : int
        Bytes in a block over all layers; scales the estimates of the adaptive strategy.
    first_group : int
        Expected size of a sequence's first block group, in blocks.
    headroom : float
        Share of the device pool that admission leaves free (`available_blocks`).
    strategy : {"adaptive", "async", "sync", "serial"}
        Whether the batch waits for swap-ins.
    swap : bool
        False: send nothing, ever; what leaves the device is recomputed (for comparison).
    reuse : bool
        Keep host copies after a swap-in, so that the next swap-out is incremental.
    on_lost : callable, optional
        Called with (sequence, valid tokens left) when a copy is contaminated.
    """

    def __init__(
        self,
        device_blocks: int,
        host_blocks: int,
        block_tokens: int,
        *,
        block_bytes: int = 1,
        first_group: int = 60,
        headroom: float = 0.06,
        strategy: StrategyName = "adaptive",
        swap: bool = True,
        reuse: bool = True,
        on_lost: Callable[[Hashable, int], None] | None = None,
    ) -> None:
        self.device = BlockGroupPool(device_blocks, first_group=first_group, headroom=headroom)
        self.copies = HostCopies(
            host_blocks, block_tokens, first_group=first_group, on_lost=on_lost
        )
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes
        self._stats = SwapStats()
        self._strategy = Strategy(strategy)
        self._swap = swap
        self._reuse = reuse
        self._headroom = device_blocks - self.device.available()
        self._sequences: dict[Hashable, SwapSequence] = {}
        self._queues: dict[SequenceState, dict[Hashable, SwapSequence]] = {
            state: {} for state in SequenceState
        }
        self._step = 0
        self._traffic = Traffic(self.device)
        self._forward_waits: set[int] = set()
        self._landed: dict[Hashable, int] = {}
        self._uncopied: dict[Hashable, SwapSequence] = {}
        self._idle_blocks = 0

    # -- questions ---------------------------------------------------------------------------

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._sequences

    def state(self, sequence: Hashable) -> SequenceState:
        """Where `sequence`'s KV cache is."""
        return self._get(sequence).state

    def tokens(self, sequence: Hashable) -> int:
        """Tokens that `sequence` holds or, off the device, had when it left."""
        return self._get(sequence).tokens

    def table(self, sequence: Hashable) -> BlockIds:
        """Device blocks of `sequence`, in order; empty when it is off the device."""
        self._get(sequence)
        return self.device.table(sequence) if sequence in self.device else np.empty(0, np.int32)

    def queue(self, state: SequenceState) -> Mapping[Hashable, SwapSequence]:
        """Sequences in a state, longest there first (Algorithm 1's queues)."""
        return MappingProxyType(self._queues[state])

    def available_blocks(self, *, headroom: bool = True) -> int:
        """Device blocks that `allocate` and `resume` can get without preempting anybody.

        Counts free blocks, those of idle sequences and those that a swap-out will have left.
        `headroom=False` counts the headroom too: for sequences that already run.
        """
        total = self.device.free_blocks + self._idle_blocks + self._traffic.leaving_blocks
        return max(0, total - self._headroom) if headroom else total

    def stats(self) -> SwapStats:
        """Counters so far."""
        self._stats.contaminated_blocks = self.copies.contaminated_blocks
        return self._stats

    # -- verbs -------------------------------------------------------------------------------

    def allocate(self, sequence: Hashable, tokens: int, *, expected: int | None = None) -> BlockIds:
        """Create `sequence`, or grow it, so that its device blocks hold `tokens`.

        Parameters
        ----------
        expected : int, optional
            Tokens that it is expected to come to; the pool learns by itself if not given.

        Raises
        ------
        OutOfBlocks
            Not enough blocks even after evicting idle sequences.
        InvalidTransition
            The sequence is off the device, or idle: `resume` it first.
        """
        if (table := self.grow(sequence, tokens)) is not None:
            return table
        s = self._sequences.get(sequence)
        if s is not None and s.state not in _ON_DEVICE:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: resume it before it can grow")
        if tokens < 0:
            raise InvalidTransition(f"cannot allocate {tokens} tokens for {sequence!r}")
        blocks = self._blocks(tokens)
        want = None if expected is None else self._blocks(max(tokens, expected))
        conflicts = self._get_blocks(sequence, blocks, want)
        if s is None:
            s = self._sequences[sequence] = SwapSequence(sequence)
            self._queues[s.state][sequence] = s
        s.tokens, s.capacity = tokens, blocks * self.block_tokens
        self._forward_waits.update(conflicts)
        return self.table(sequence)

    def grow(self, sequence: Hashable, tokens: int) -> BlockIds | None:
        """Count `tokens` as allocated if `sequence` has the blocks for them; its block table.

        None if it has not, or is not on the device: `allocate` is needed. This is the hot path.
        """
        s = self._sequences.get(sequence)
        if s is None or tokens > s.capacity or s.state not in _ON_DEVICE:
            return None
        s.tokens = max(s.tokens, tokens)
        return self.table(sequence)

    def preempt(self, sequence: Hashable, tokens: int | None = None, *, copy: bool = True) -> None:
        """Take `sequence` off the device; what the host lacks of it is swapped out.

        Blocks that the host has valid copies of are free at once, the others when their transfer
        has ended. If the host can hold only a part, the rest will have to be recomputed.

        Parameters
        ----------
        tokens : int, optional
            Tokens whose KV has been computed; all it was allocated for if not given.
        copy : bool
            False: send nothing; whatever the host lacks is to be recomputed.

        Raises
        ------
        HostMemoryExhausted
            The host holds nothing of it and cannot take anything; it stays as it was.
        InvalidTransition
            It is off the device already.
        """
        s = self._get(sequence)
        if s.state in _SWAPPED:
            raise InvalidTransition(
                f"{sequence!r} is {s.state.name}: it has been preempted already"
            )
        if s.state is SequenceState.ARRIVING:
            self._turn_back(s, tokens)
        else:
            self._leave(s, s.tokens if tokens is None else min(tokens, s.capacity), copy=copy)
        self._stats.preemptions += 1

    def resume(self, sequence: Hashable, tokens: int | None = None) -> Resumption:
        """Bring `sequence` back to the device.

        Blocks that are still on the device are taken back; the others are swapped in.

        Parameters
        ----------
        tokens : int, optional
            Tokens that the engine has accepted; what lies behind them is dropped.

        Raises
        ------
        OutOfBlocks
            Not enough device blocks now. Preempt somebody, or try again later.
        InvalidTransition
            It is running or arriving.
        """
        s = self._get(sequence)
        if s.state in _ON_DEVICE:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: there is nothing to resume")
        accepted = s.tokens if tokens is None else min(tokens, s.tokens)
        if s.state is SequenceState.IDLE:
            self._idle_blocks -= s.capacity // self.block_tokens
            kept = self._truncate_device(s, accepted)
            self._uncopied.pop(sequence, None)
            self._move(s, SequenceState.RUNNING)
            self._stats.resumptions += 1
            return Resumption(kept, None)
        return self._return(s, accepted)

    def end_turn(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Mark the turn as over: a context switch at idle priority.

        Its blocks stay on the device until somebody needs them; its KV goes out before that. The
        next turn resumes it.
        """
        s = self._get(sequence)
        if s.state is SequenceState.ARRIVING:
            self._turn_back(s, tokens)
            return
        if s.state is not SequenceState.RUNNING:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: it has no turn to end")
        self._truncate_device(s, s.tokens if tokens is None else min(tokens, s.capacity))
        self._move(s, SequenceState.IDLE)
        self._idle_blocks += s.capacity // self.block_tokens
        # In series nothing can be sent ahead of need: the batch would wait for it.
        ahead = self._swap and self._strategy.mode != "serial"
        if ahead and self.copies.covered(sequence) < s.tokens:
            self._uncopied[sequence] = s

    def truncate(self, sequence: Hashable, tokens: int) -> int:
        """Keep only the first `tokens` (speculation rolled back, stale output).

        Returns
        -------
        int
            Tokens kept: fewer than asked for if the boundary lies inside a block that others
            share, since shared blocks are never written.
        """
        s = self._get(sequence)
        if tokens < 0:
            raise InvalidTransition(f"cannot truncate {sequence!r} to {tokens} tokens")
        if s.state in (SequenceState.RUNNING, SequenceState.IDLE):
            before = s.capacity
            self._truncate_device(s, min(tokens, s.tokens))
            if s.state is SequenceState.IDLE:
                self._idle_blocks -= (before - s.capacity) // self.block_tokens
            return s.tokens
        s.tokens = self._whole_blocks_if_shared(s, min(tokens, s.tokens))
        self.copies.truncate(sequence, s.tokens)
        if s.incoming is not None:
            s.incoming.tokens = min(s.incoming.tokens, s.tokens)
        return s.tokens

    def free(self, sequence: Hashable) -> None:
        """Forget `sequence`: its device blocks and host copies go, its transfers are cancelled."""
        s = self._get(sequence)
        if s.state is SequenceState.IDLE:
            self._idle_blocks -= s.capacity // self.block_tokens
        for out in s.outgoing:
            self._traffic.cancel(out.transfer.id)
        if s.incoming is not None:
            self._traffic.cancel(s.incoming.transfer.id)
        if sequence in self.device:
            self.device.free(sequence)
        if sequence in self.copies:
            self.copies.drop(sequence)
        self._uncopied.pop(sequence, None)
        self._landed.pop(sequence, None)
        self._traffic.mark_leaving(s)
        del self._queues[s.state][sequence]
        del self._sequences[sequence]

    def fork(self, parent: Hashable, child: Hashable, tokens: int) -> int:
        """Create `child` with the leading full blocks of `parent`, shared, not copied.

        Returns
        -------
        int
            Tokens that `child` starts with: `tokens` rounded down to whole blocks.
        """
        source = self._get(parent)
        if child in self._sequences:
            raise InvalidTransition(f"{child!r} exists already")
        if source.state not in (SequenceState.RUNNING, SequenceState.IDLE):
            raise InvalidTransition(f"{parent!r} is {source.state.name}: resume it before forking")
        blocks = min(tokens, source.tokens) // self.block_tokens
        # Content keys make a shared block go out once: who is second adopts the first one's copy.
        while len(source.keys) < blocks:
            source.keys.append(object())
        self._publish(source, 0)
        s = self._sequences[child] = SwapSequence(child, keys=source.keys[:blocks])
        self._queues[s.state][child] = s
        if blocks:
            self.device.attach(child, self.device.table(parent)[:blocks])
        s.tokens = s.capacity = blocks * self.block_tokens
        return s.tokens

    def tag(self, sequence: Hashable, keys: Sequence[Hashable]) -> None:
        """Name the content of `sequence`'s leading full blocks.

        Copies of tagged blocks are published when they are complete, and adopted by whoever has the
        same keys. A key must name all tokens up to its block's end, the tenant's salt included.
        """
        s = self._get(sequence)
        s.keys = list(keys)
        self._publish(s, 0)

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Set how much `sequence` matters (larger is more): decides who loses host copies first."""
        s = self._get(sequence)
        s.priority = priority
        if sequence in self.copies:
            self.copies.set_priority(sequence, priority)

    # -- Algorithm 1 -------------------------------------------------------------------------

    def step(self, observations: Observations) -> SwapOrders:
        """One iteration: take in what has ended, give out what is to be done."""
        self.observe(observations)
        return self.orders()

    def observe(self, observations: Observations) -> None:
        """Step 1: transfers that have ended; measurements for the strategy."""
        self._strategy.observe(observations.measurements, observations.step_seconds)
        ended = dict.fromkeys(observations.completed, True)
        ended.update(dict.fromkeys(observations.failed, False))
        for transfer in sorted(ended):
            if transfer in self._traffic.out:
                self._end_out(transfer, ok=ended[transfer])
            elif transfer in self._traffic.into:
                self._end_in(transfer, ok=ended[transfer])
            else:
                raise IntegrityError(f"transfer {transfer} ended, but was not under way")

    def orders(self) -> SwapOrders:
        """Steps 2 to 4: swap-ins and swap-outs planned since the last call, conflicts, strategy."""
        self._step += 1
        if not self._traffic.out and self._uncopied:
            self._copy_idle(next(iter(self._uncopied)))
        wait = {t for t in self._forward_waits if t in self._traffic.out}
        self._forward_waits.clear()
        self._stats.conflicts += len(wait)
        wait.update(self._swap_ins_to_await())
        if self._strategy.mode == "serial":
            wait.update(self._traffic.out)
        transfers, cancelled = self._traffic.take_orders()
        return SwapOrders(self._step, transfers, cancelled, tuple(sorted(wait)))

    def landed(self) -> dict[Hashable, int]:
        """Sequences whose swap-in has ended since the last call, with their valid tokens."""
        landed, self._landed = self._landed, {}
        return landed

    def _swap_ins_to_await(self) -> list[int]:
        queue = self._queues[SequenceState.ARRIVING].values()
        arriving = sorted((s.incoming for s in queue if s.incoming), key=lambda i: i.transfer.id)
        if not arriving:
            return []
        moved = self._strategy.bandwidth * self._strategy.step_seconds  # in a step, as it seems
        arrivals = [
            Arrival(i.transfer.id, max(0.0, len(i.blocks) * self.block_bytes - age * moved))
            for i in arriving
            for age in (self._step - i.step,)
        ]
        count = self._strategy.wait_for(arrivals, len(self._queues[SequenceState.RUNNING]))
        return [incoming.transfer.id for incoming in arriving[:count]]

    # -- leaving the device --------------------------------------------------------------------

    def _leave(self, s: SwapSequence, tokens: int, *, copy: bool) -> None:
        del s.keys[tokens // self.block_tokens :]
        self.copies.truncate(s.id, tokens)
        copy = copy and self._swap
        fill = self._fill(s, tokens) if copy else None
        if s.state is SequenceState.IDLE:
            self._idle_blocks -= s.capacity // self.block_tokens
            self._uncopied.pop(s.id, None)
        blocks = self.device.detach(s.id) if s.id in self.device else np.empty(0, np.int32)
        sent = 0
        if fill is not None:
            sent = len(fill.blocks)
            going = slice(fill.first, fill.first + sent)
            self._send(s, fill, blocks[going])
            blocks = np.delete(blocks, going)
        self.device.release(blocks)
        if copy:
            self._stats.blocks_spared += self._blocks(self.copies.covered(s.id)) - sent
        s.tokens, s.capacity = tokens, 0
        s.left = s.outgoing[-1] if s.outgoing else None
        self._landed.pop(s.id, None)
        self._traffic.mark_leaving(s)
        self.copies.set_resident(s.id, False)
        self._move(s, SequenceState.LEAVING if s.outgoing else SequenceState.HOST)

    def _fill(self, s: SwapSequence, tokens: int) -> Fill | None:
        """Host blocks for what the host lacks of `s`; None if it lacks nothing, or has no room."""
        if s.keys:
            self.copies.adopt(s.id, s.keys[: tokens // self.block_tokens])
        covered = self.copies.covered(s.id)
        if tokens <= covered:
            return None
        self.copies.set_priority(s.id, s.priority)
        try:
            return self.copies.begin(s.id, tokens)
        except HostMemoryExhausted:
            if covered == 0:
                raise
            return None

    def _send(self, s: SwapSequence, fill: Fill, blocks: BlockIds) -> None:
        transfer = self._traffic.send(s, fill, blocks).transfer
        if fill.first:
            self._stats.blocks_out_incremental += len(blocks)
            self._stats.copies_out_incremental += len(transfer.runs)
        else:
            self._stats.blocks_out_full += len(blocks)
            self._stats.copies_out_full += len(transfer.runs)

    def _copy_idle(self, sequence: Hashable) -> None:
        """Send an idle sequence's KV ahead of need; it stays on the device."""
        s = self._uncopied.pop(sequence)
        try:
            fill = self._fill(s, s.tokens)
        except HostMemoryExhausted:
            return
        if fill is not None:
            blocks = self.device.table(sequence)[fill.first : fill.first + len(fill.blocks)].copy()
            self.device.hold(blocks)
            self._send(s, fill, blocks)
            self.copies.set_resident(sequence, True)
            self._stats.idle_copies += 1

    def _turn_back(self, s: SwapSequence, tokens: int | None) -> None:
        """Preempt an arriving sequence: nothing is copied out, the host has what it had."""
        incoming = s.incoming
        assert incoming is not None
        self._traffic.cancel(incoming.transfer.id)
        s.incoming = None
        s.tokens = min(incoming.tokens, s.tokens if tokens is None else tokens)
        s.capacity = 0
        self.copies.truncate(s.id, s.tokens)
        self.device.free(s.id)
        self._move(s, SequenceState.LEAVING if s.outgoing else SequenceState.HOST)

    def _end_out(self, transfer: int, *, ok: bool) -> None:
        out = self._traffic.end_out(transfer)
        s = out.sequence
        if ok:
            self.copies.commit(out.fill)
        else:
            self.copies.abort(out.fill)
        if self._sequences.get(s.id) is not s:
            return
        self._stats.transfers_failed += not ok
        self._publish(s, out.fill.first)
        if s.state is SequenceState.LEAVING and not s.outgoing:
            self._move(s, SequenceState.HOST)

    # -- coming back -----------------------------------------------------------------------------

    def _return(self, s: SwapSequence, accepted: int) -> Resumption:
        accepted = self._whole_blocks_if_shared(s, accepted)
        self.copies.truncate(s.id, accepted)
        valid = min(accepted, self.copies.covered(s.id))
        total = self._blocks(valid)
        # Blocks [back, front) are still on the device, read by the swap-out they left with.
        back = front = 0
        if s.left is not None:
            free = ~s.left.taken
            kept = len(free) if free.all() else int(np.argmin(free))
            back = min(s.left.fill.first, total)
            front = min(back + kept, total)
            s.left.taken[: front - back] = True
        try:
            self._make_room(s.id, total - (front - back) - self.device.free_blocks)
        except OutOfBlocks:
            if s.left is not None:
                s.left.taken[: front - back] = False
            raise
        after = self._get_blocks(s.id, back, back)
        if front > back:
            assert s.left is not None
            self.device.attach(s.id, s.left.blocks[: front - back])
            self._traffic.leaving_blocks -= front - back
            self._stats.take_backs += 1
        after += self._get_blocks(s.id, total, None)
        s.left = None
        self._stats.resumptions += 1
        self._stats.tokens_lost += accepted - valid
        s.tokens, s.capacity = valid, total * self.block_tokens
        loads = np.r_[0:back, front:total]
        if not len(loads):
            self._forward_waits.update(after)
            self._arrived(s, valid)
            return Resumption(valid, None)
        # What is loaded may still be on its way to the host: then those swap-outs come first.
        end = total if front < total else back
        pending = (
            s.outgoing if min(valid, end * self.block_tokens) > self.copies.valid(s.id) else []
        )
        after += [out.transfer.id for out in pending]
        lease = self.copies.pin(s.id, min(valid, end * self.block_tokens))
        blocks = self.device.table(s.id)[loads]
        self.device.hold(blocks)
        runs = coalesce(self.copies.table(s.id)[loads], blocks)
        transfer = self._traffic.plan(Direction.IN, runs, after)
        s.incoming = self._traffic.into[transfer.id] = Incoming(
            transfer=transfer,
            sequence=s,
            lease=lease,
            blocks=blocks,
            first=0 if back else front * self.block_tokens,
            tokens=valid,
            needs=tuple(out.fill for out in pending),
            step=self._step,
        )
        self._stats.blocks_in += len(blocks)
        self._stats.copies_in += len(transfer.runs)
        self._move(s, SequenceState.ARRIVING)
        return Resumption(valid, transfer.id)

    def _end_in(self, transfer: int, *, ok: bool) -> None:
        incoming = self._traffic.end_in(transfer)
        s = incoming.sequence
        self.copies.release(incoming.lease)
        if s.incoming is not incoming:
            return  # freed, or preempted while arriving
        s.incoming = None
        valid = incoming.tokens
        if not ok:
            # Whether the link, the copy or a swap-out before it was at fault: do not try it twice.
            self._stats.transfers_failed += 1
            valid = min(valid, incoming.first)
            self.copies.truncate(s.id, valid)
        for fill in incoming.needs:
            if not fill.committed:
                valid = min(valid, fill.first * self.block_tokens)
        if valid < incoming.tokens:
            self._stats.tokens_lost += incoming.tokens - valid
            s.tokens = valid
        self._landed[s.id] = valid
        self._arrived(s, valid)

    def _arrived(self, s: SwapSequence, valid: int) -> None:
        self._move(s, SequenceState.RUNNING)
        if self._reuse:
            self.copies.set_resident(s.id, True)
        else:
            self.copies.truncate(s.id, 0)

    # -- room on the device --------------------------------------------------------------------

    def _get_blocks(self, sequence: Hashable, blocks: int, expected: int | None) -> list[int]:
        """Grow `sequence`'s table to `blocks`; ids of transfers that its writers must wait for."""
        size = self.device.size(sequence) if sequence in self.device else 0
        short = max(0, blocks - size - self.device.free_blocks)
        if short:
            self._make_room(sequence, short)
            short = max(0, blocks - size - self.device.free_blocks)
        self.device.allocate(sequence, blocks - short, expected=expected)
        return self._traffic.take(sequence, short) if short else []

    def _make_room(self, sequence: Hashable, short: int) -> None:
        """Make `short` more blocks obtainable, as free ones or as ones that a swap-out leaves.

        Idle sequences with complete copies go first: they cost nothing now. Then come blocks that
        are leaving anyway, then idle sequences that must be sent.
        """
        if short <= 0:
            return
        idle = sorted(
            self._queues[SequenceState.IDLE].values(),
            key=lambda s: bool(s.outgoing) or self.copies.valid(s.id) < s.tokens,
        )
        leaving = self._traffic.takeable_blocks()
        gains = [self._exclusive_blocks(s) for s in idle]
        if short > leaving + sum(gains):
            raise OutOfBlocks(
                f"{sequence!r} needs {short} device blocks more than are free; "
                f"{leaving + sum(gains)} can be made free ({self.device.num_blocks} in all). "
                "Preempt a sequence, or ask again later"
            )
        for s, gain in zip(idle, gains, strict=True):
            complete = not s.outgoing and self.copies.valid(s.id) >= s.tokens
            if short <= 0 or (not complete and short <= leaving):
                return
            try:
                self._leave(s, s.tokens, copy=True)
            except HostMemoryExhausted:
                self._leave(s, s.tokens, copy=False)
            self._stats.evictions += 1
            short -= gain

    def _exclusive_blocks(self, s: SwapSequence) -> int:
        """Device blocks that nobody else needs once `s` has left (its own swap-outs included)."""
        table = self.table(s.id)
        references = self.device.references(table)
        for out in s.outgoing:
            references[np.isin(table, out.blocks)] -= 1
        return int(np.count_nonzero(references == 1))

    # -- bookkeeping ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError if blocks, copies and states contradict each other."""
        self.device.check_integrity()
        self.copies.check_integrity()
        references = np.zeros(self.device.num_blocks, np.int32)
        for sequence, s in self._sequences.items():
            if self._queues[s.state].get(sequence) is not s:
                raise IntegrityError(
                    f"{sequence!r} is not in the queue of its state {s.state.name}"
                )
            if (s.state in _SWAPPED or not s.capacity) and len(self.table(sequence)):
                raise IntegrityError(
                    f"{sequence!r} is {s.state.name}, its device blocks say otherwise"
                )
            if (s.state is SequenceState.ARRIVING) != (s.incoming is not None):
                raise IntegrityError(f"{sequence!r} is {s.state.name}, its swap-in says otherwise")
            np.add.at(references, self.table(sequence), 1)
        self._traffic.add_references(references)
        every = np.arange(self.device.num_blocks, dtype=np.int32)
        if (wrong := np.flatnonzero(self.device.references(every) != references)).size:
            raise IntegrityError(f"leaked or lost references on device blocks {wrong[:8].tolist()}")

    @property
    def under_way(self) -> tuple[int, ...]:
        """Ids of transfers that have not ended."""
        return (*self._traffic.out, *self._traffic.into)

    def _get(self, sequence: Hashable) -> SwapSequence:
        try:
            return self._sequences[sequence]
        except KeyError:
            raise UnknownSequence(
                f"no sequence {sequence!r}: it was never allocated, or has been freed"
            ) from None

    def _move(self, s: SwapSequence, state: SequenceState) -> None:
        del self._queues[s.state][s.id]
        s.state = state
        self._queues[state][s.id] = s

    def _publish(self, s: SwapSequence, first: int) -> None:
        """Let others adopt the copies of `s`'s named blocks, from the `first` on."""
        complete = self.copies.valid(s.id) // self.block_tokens
        for index in range(first, min(len(s.keys), complete)):
            self.copies.publish(s.id, index, s.keys[index])

    def _truncate_device(self, s: SwapSequence, tokens: int) -> int:
        """Cut a sequence that is on the device; how many tokens are kept."""
        s.tokens = self._whole_blocks_if_shared(s, tokens)
        blocks = self._blocks(s.tokens)
        if s.id in self.device:
            self.device.truncate(s.id, blocks)
        self.copies.truncate(s.id, s.tokens)
        s.capacity = blocks * self.block_tokens
        return s.tokens

    def _whole_blocks_if_shared(self, s: SwapSequence, tokens: int) -> int:
        """Round `tokens` down where the boundary lies in a named block: it is never written."""
        whole = tokens // self.block_tokens
        if whole < len(s.keys):
            tokens = whole * self.block_tokens
            del s.keys[whole:]
        return tokens

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

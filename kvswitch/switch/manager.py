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

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from types import MappingProxyType

from kvswitch.blocks import BlockGroupPool
from kvswitch.config import StrategyName
from kvswitch.copies import HostCopies
from kvswitch.errors import ConfigError, IntegrityError, InvalidTransition
from kvswitch.messages import BlockIds, Observations, SwapOrders
from kvswitch.switch.arrival import Arrivals, Resumption
from kvswitch.switch.departure import Departures
from kvswitch.switch.room import DeviceRoom
from kvswitch.switch.sequence import ON_DEVICE, Sequences, SequenceState, SwapSequence
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.strategy import Strategy
from kvswitch.switch.traffic import Traffic

__all__ = ["Resumption", "SwapManager"]

_LEFT = (SequenceState.LEAVING, SequenceState.HOST)


class SwapManager:
    """Decides which blocks move when; see the module's text.

    Every verb that raises leaves everything as it was.

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
        Share of the device pool that admission (`available_blocks`) and idle sequences leave free.
    strategy : {"adaptive", "async", "sync", "serial"}
        Whether the batch waits for swap-ins.
    swap : bool
        False: send nothing, ever; what leaves the device is recomputed (for comparison).
    reuse : bool
        Keep host copies after a swap-in, so that the next swap-out is incremental.
    on_lost : callable, optional
        Called with (sequence, valid tokens left) when a copy is contaminated. It must not raise,
        nor call back.

    Raises
    ------
    ConfigError
        A size is out of its range.
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
        if block_bytes < 1:
            raise ConfigError(f"block_bytes must be at least 1, got {block_bytes}")
        self.device = BlockGroupPool(device_blocks, first_group=first_group, headroom=headroom)
        self.copies = HostCopies(
            host_blocks, block_tokens, first_group=first_group, on_lost=on_lost
        )
        self.block_tokens = block_tokens
        self.block_bytes = block_bytes
        self._headroom = device_blocks - self.device.available()
        self._stats = SwapStats()
        self._strategy = Strategy(strategy)
        self._sequences = Sequences()
        self._all = self._sequences.all
        self._traffic = Traffic(self.device)
        self._room = DeviceRoom(self.device, self._traffic, block_tokens)
        books = (self.device, self.copies, self._sequences, self._room, self._traffic)
        # In series nothing can be sent ahead of need: the batch would wait for it.
        self._departures = Departures(*books, self._stats, swap=swap, ahead=strategy != "serial")
        self._arrivals = Arrivals(
            *books, self._departures, self._stats, block_bytes=block_bytes, reuse=reuse
        )
        self._forward_waits: set[int] = set()
        self._step = 0

    # -- questions ---------------------------------------------------------------------------

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._all

    def state(self, sequence: Hashable) -> SequenceState:
        """Where `sequence`'s KV cache is."""
        return self._sequences.get(sequence).state

    def tokens(self, sequence: Hashable) -> int:
        """Tokens that `sequence` holds or, off the device, had when it left."""
        return self._sequences.get(sequence).tokens

    def table(self, sequence: Hashable) -> BlockIds:
        """Device blocks of `sequence`, in order; empty when it is off the device."""
        return self._sequences.get(sequence).table

    def queue(self, state: SequenceState) -> Mapping[Hashable, SwapSequence]:
        """Sequences in a state, longest there first (Algorithm 1's queues)."""
        return MappingProxyType(self._sequences.queues[state])

    def available_blocks(self, *, headroom: bool = True, returning: bool = False) -> int:
        """Device blocks that `allocate` and `resume` can get without preempting anybody.

        Counts free blocks, those of idle sequences and those that a swap-out will have left.

        Parameters
        ----------
        headroom : bool
            False counts the headroom too: for sequences that already run.
        returning : bool
            True counts those too that a swap-in still writes whose sequence was turned back: not
            to be had now, but before long. For decisions that should hold until then.
        """
        available = self._room.available
        if returning and self._traffic.into:
            arriving = self._sequences.queues[SequenceState.ARRIVING].values()
            wanted = {s.incoming.transfer.id for s in arriving if s.incoming}
            into = self._traffic.into.items()
            available += sum(len(one.blocks) for id_, one in into if id_ not in wanted)
        return max(0, available - self._headroom) if headroom else available

    def is_under_way(self, transfer: int) -> bool:
        """Whether a transfer has been planned and, as far as observed, has not ended."""
        return transfer in self._traffic.out or transfer in self._traffic.into

    @property
    def under_way(self) -> tuple[int, ...]:
        """Ids of transfers that have not ended."""
        return (*self._traffic.out, *self._traffic.into)

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
        s = self._all.get(sequence)
        if tokens < 0:
            raise InvalidTransition(f"cannot allocate {tokens} tokens for {sequence!r}")
        if s is None:
            s = SwapSequence(sequence)
        elif s.state not in ON_DEVICE:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: resume it before it can grow")
        blocks = self._room.blocks(tokens)
        need = blocks - len(s.table)
        if need > self.device.free_blocks:
            self._room.require(sequence, need)
            self._departures.make_room(need)
        want = None if expected is None else self._room.blocks(max(tokens, expected))
        self._forward_waits.update(self._room.grow(s, blocks, want))
        s.tokens = tokens
        if sequence not in self._all:
            self._sequences.add(s)
        return s.table

    def grow(self, sequence: Hashable, tokens: int) -> BlockIds | None:
        """Count `tokens` as allocated if `sequence` has the blocks for them; its block table.

        None if it has not, or is not on the device: `allocate` is needed. This is the hot path.
        """
        s = self._all.get(sequence)
        if s is None or not 0 <= tokens <= s.capacity or s.state not in ON_DEVICE:
            return None
        s.tokens = max(s.tokens, tokens)
        return s.table

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
            It is off the device already, or has no room for so many tokens.
        """
        s = self._sequences.get(sequence)
        if s.state in _LEFT:
            raise InvalidTransition(
                f"{sequence!r} is {s.state.name}: it has been preempted already"
            )
        computed = self._computed(s, tokens)
        if s.state is SequenceState.ARRIVING:
            self._arrivals.turn_back(s, computed)
        else:
            self._departures.leave(s, computed, copy=copy)
            self._arrivals.forget(s)
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
        s = self._sequences.get(sequence)
        if s.state in ON_DEVICE:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: there is nothing to resume")
        if tokens is not None and tokens < 0:
            raise InvalidTransition(f"cannot resume {sequence!r} with {tokens} tokens")
        accepted = s.tokens if tokens is None else min(tokens, s.tokens)
        if s.state is not SequenceState.IDLE:
            return self._arrivals.bring_back(s, accepted, self._step)
        self._cut(s, accepted)
        self._departures.wake(s)
        self._arrivals.keep_copies(s)
        self._stats.resumptions += 1
        self._stats.tokens_lost += accepted - s.tokens
        return Resumption(s.tokens, None)

    def end_turn(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Mark the turn as over: a context switch at idle priority.

        Its blocks stay on the device until somebody needs them; its KV goes out before that. The
        next turn resumes it.

        Raises
        ------
        InvalidTransition
            It is not on the device, its turn has ended already, or it has no room for so many
            tokens.
        """
        s = self._sequences.get(sequence)
        if s.state not in ON_DEVICE:
            raise InvalidTransition(f"{sequence!r} is {s.state.name}: it has no turn to end")
        computed = self._computed(s, tokens)
        if s.state is SequenceState.ARRIVING:
            self._arrivals.turn_back(s, computed)
            return
        self._cut(s, computed)
        self._arrivals.forget(s)
        self._departures.rest(s)

    def truncate(self, sequence: Hashable, tokens: int) -> int:
        """Keep only the first `tokens` (speculation rolled back, stale output).

        Returns
        -------
        int
            Tokens kept: fewer than asked for if the boundary lies inside a block that others
            share, since shared blocks are never written, or if less has landed.
        """
        s = self._sequences.get(sequence)
        if tokens < 0:
            raise InvalidTransition(f"cannot truncate {sequence!r} to {tokens} tokens")
        self._cut(s, self._arrivals.at_most(s, min(tokens, s.tokens)))
        return s.tokens

    def free(self, sequence: Hashable) -> None:
        """Forget `sequence`: its device blocks and host copies go, its transfers are cancelled."""
        s = self._sequences.get(sequence)
        for out in s.outgoing:
            self._traffic.abandon(out)
        if s.incoming is not None:
            self._traffic.cancel(s.incoming.transfer)
            s.incoming = None
        self.device.release(self._room.vacate(s))
        if sequence in self.copies:
            self.copies.drop(sequence)
        self._departures.forget(s)
        self._arrivals.forget(s)
        self._sequences.remove(s)

    def fork(self, parent: Hashable, child: Hashable, tokens: int) -> int:
        """Create `child` with the leading full blocks of `parent`, shared, not copied.

        Returns
        -------
        int
            Tokens that `child` starts with: `tokens` rounded down to whole blocks.

        Raises
        ------
        InvalidTransition
            `child` exists, or `parent` is not on the device.
        """
        source = self._sequences.get(parent)
        if child in self._all:
            raise InvalidTransition(f"{child!r} exists already: free it before forking {parent!r}")
        if source.state not in (SequenceState.RUNNING, SequenceState.IDLE):
            raise InvalidTransition(f"{parent!r} is {source.state.name}: resume it before forking")
        if tokens < 0:
            raise InvalidTransition(f"cannot fork {tokens} tokens of {parent!r}")
        tokens = self._arrivals.at_most(source, min(tokens, source.tokens))
        blocks = tokens // self.block_tokens
        # Content keys make a shared block go out once: who is second adopts the first one's copy.
        while len(source.keys) < blocks:
            source.keys.append(object())
        self._departures.publish(source, 0)
        s = SwapSequence(child, priority=source.priority, keys=source.keys[:blocks])
        if blocks:
            self._room.attach(s, source.table[:blocks])
        s.tokens = s.capacity
        self._sequences.add(s)
        return s.tokens

    def tag(self, sequence: Hashable, keys: Sequence[Hashable]) -> None:
        """Name the content of `sequence`'s leading full blocks.

        Copies of tagged blocks are published when they are complete, and adopted by whoever has the
        same keys. A key must name all tokens up to its block's end, the tenant's salt included.
        """
        s = self._sequences.get(sequence)
        s.keys = list(keys)
        self._departures.publish(s, 0)

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Set how much `sequence` matters (larger is more): decides who loses host copies first."""
        s = self._sequences.get(sequence)
        if not math.isfinite(priority):
            raise ConfigError(f"priority={priority}: give a finite number")
        s.priority = priority
        if sequence in self.copies:
            self.copies.set_priority(sequence, priority)

    # -- Algorithm 1 -------------------------------------------------------------------------

    def step(self, observations: Observations) -> SwapOrders:
        """One iteration: take in what has ended, give out what is to be done."""
        self.observe(observations)
        return self.orders()

    def observe(self, observations: Observations) -> None:
        """Step 1: transfers that have ended; measurements for the strategy.

        Raises
        ------
        InvalidTransition
            A transfer is not under way: it has been reported twice, or was never planned.
        """
        ended = {*observations.completed, *observations.failed}
        for transfer in ended:
            if not self.is_under_way(transfer):
                raise InvalidTransition(
                    f"transfer {transfer} cannot have ended, it is not under way: report each "
                    "planned transfer once"
                )
        self._strategy.observe(observations.measurements, observations.step_seconds)
        for transfer in sorted(ended):
            ok = transfer not in observations.failed
            if transfer in self._traffic.out:
                self._departures.end_out(transfer, ok=ok)
            else:
                self._arrivals.end_in(transfer, self._step, ok=ok)

    def orders(self) -> SwapOrders:
        """Steps 2 to 4: swap-ins and swap-outs planned since the last call, conflicts, strategy."""
        self._step += 1
        self._departures.keep_free(self._headroom)
        self._departures.copy_ahead()
        wait: set[int] = set()
        if self._forward_waits:
            wait.update(t for t in self._forward_waits if t in self._traffic.out)
            self._forward_waits.clear()
            self._stats.conflicts += len(wait)
        wait.update(self._arrivals.to_await(self._strategy, self._step))
        if self._strategy.mode == "serial":
            wait.update(self._traffic.out)
        transfers, cancelled = self._traffic.take_orders()
        return SwapOrders(self._step, transfers, cancelled, tuple(sorted(wait)))

    @property
    def has_news(self) -> bool:
        """Whether something was planned, or is to be waited for, that no orders have said yet."""
        return self._traffic.has_planned or bool(self._forward_waits)

    def absent(self, orders: SwapOrders) -> list[Hashable]:
        """Sequences that will still be arriving when what `orders` wait for has ended."""
        arriving = self._sequences.queues[SequenceState.ARRIVING].values()
        return [s.id for s in arriving if s.incoming and s.incoming.transfer.id not in orders.wait]

    def landed(self) -> dict[Hashable, int]:
        """Sequences whose swap-in has ended since the last call, with their valid tokens."""
        return {s.id: tokens for s, tokens in self._arrivals.take_landed().items()}

    # -- bookkeeping ---------------------------------------------------------------------------

    def _computed(self, s: SwapSequence, tokens: int | None) -> int:
        """How many tokens of `s` the engine can have computed, if it says `tokens`."""
        if tokens is None:
            tokens = s.tokens
        if not 0 <= tokens <= s.capacity:
            raise InvalidTransition(
                f"{s.id!r} cannot have computed {tokens} tokens: its blocks hold {s.capacity}"
            )
        return self._arrivals.at_most(s, tokens)

    def _cut(self, s: SwapSequence, tokens: int) -> None:
        """Let `s` have `tokens`, or as few less as it takes not to write a shared block."""
        whole, part = divmod(tokens, self.block_tokens)
        if part and whole < len(s.table) and self._traffic.shared(s, int(s.table[whole])):
            tokens -= part
        s.tokens = tokens
        del s.keys[whole:]
        self.copies.truncate(s.id, tokens)
        if s.state in (SequenceState.RUNNING, SequenceState.IDLE):
            self._room.shrink(s, self._room.blocks(tokens))
        self._arrivals.cut(s)

    def check_integrity(self) -> None:
        """Raise IntegrityError if blocks, copies and states contradict each other."""
        self.device.check_integrity()
        self.copies.check_integrity()
        self._sequences.check_integrity()
        self._room.check_integrity(self._all.values())
        for sequence, s in self._all.items():
            if s.state in _LEFT and sequence in self.device:
                raise IntegrityError(f"{sequence!r} is {s.state.name}, but has device blocks")
            if s.state not in _LEFT and s.tokens > s.capacity:
                raise IntegrityError(f"{sequence!r}: {s.tokens} tokens, {s.capacity} slots")
            if self.copies.covered(sequence) > s.tokens:
                raise IntegrityError(f"{sequence!r}: the host has more than its {s.tokens} tokens")

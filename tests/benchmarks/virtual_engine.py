"""An engine without a model and without a clock: the real planner and scheduler in virtual time.

One iteration, in the order of the custom engine of examples/: decide, grow, switch, forward. The
forward takes `Machine.step_seconds`, whatever the batch; transfers take bytes / bandwidth, in order
within a direction. Same conversations, same settings, same figures, on every machine.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, fields

from kvswitch.config import StrategyName
from kvswitch.errors import HostMemoryExhausted, OutOfBlocks
from kvswitch.messages import Direction, Measurement, Observations, Transfer
from kvswitch.scheduling import PriorityPolicy, PriorityScheduler
from kvswitch.switch import SequenceState, SwapManager, SwapStats

__all__ = ["Link", "Machine", "Script", "Served", "VirtualEngine"]


@dataclass(frozen=True)
class Machine:
    """What there is and how fast it is. The defaults are about LLaMA-3-8B on an A10 with 24 GB.

    `slots` and `epoch`, `quantum` (in iterations) are the scheduler's; `prefill_tokens` is the most
    that an iteration prefills; `bandwidth` is bytes a second in each direction.
    """

    device_blocks: int = 2_700
    host_blocks: int = 30_720
    block_tokens: int = 16
    block_bytes: int = 2 << 20
    slots: int = 64
    epoch: int = 25
    quantum: int = 5
    prefill_tokens: int = 512
    base_seconds: float = 0.030
    prefill_seconds: float = 0.0002
    bandwidth: float = 25e9
    strategy: StrategyName = "adaptive"
    reuse: bool = True
    first_group: int = 60
    headroom: float = 0.06

    def step_seconds(self, prefilled: int) -> float:
        """Duration of a forward that prefills so many tokens. Decoding is bound by the weights."""
        return self.base_seconds + prefilled * self.prefill_seconds


@dataclass(frozen=True)
class Script:
    """A conversation: when it begins, (prompt, output) tokens a turn, seconds between turns."""

    arrival: float
    turns: list[tuple[int, int]]
    pauses: list[float]


@dataclass
class Served:
    """What a stretch of iterations did; `occupancy` is the mean share of needed device blocks."""

    tokens: int = 0
    recomputed: int = 0
    turns: int = 0
    iterations: int = 0
    seconds: float = 0.0
    stall: float = 0.0
    occupancy: float = 0.0
    stats: SwapStats = field(default_factory=SwapStats)

    @property
    def throughput(self) -> float:
        """New tokens per virtual second."""
        return self.tokens / self.seconds


@dataclass(eq=False)
class _Moving:
    transfer: Transfer
    submitted: float
    cancelled: float = float("inf")


class Link:
    """Moves transfers: one at a time and in order in each direction, at `bandwidth`."""

    def __init__(self, bandwidth: float, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._block_seconds = block_bytes / bandwidth
        self._queues: dict[Direction, deque[_Moving]] = {d: deque() for d in Direction}
        self._ended: dict[int, float] = {}
        self._last_end = dict.fromkeys(Direction, 0.0)

    def submit(self, transfer: Transfer, now: float) -> None:
        self._queues[transfer.direction].append(_Moving(transfer, now))

    def cancel(self, ids: Iterable[int], now: float) -> None:
        """Stop these where they are; they end, as failed, when their turn comes."""
        for moving in (m for queue in self._queues.values() for m in queue):
            if moving.transfer.id in ids:
                moving.cancelled = now

    def next_end(self) -> float:
        """When the next transfer ends; infinite if none is under way."""
        return min((self._times(m)[1] for m in self._heads()), default=float("inf"))

    def time_of(self, ids: Iterable[int]) -> float:
        """When these, which have been seen to end, ended."""
        return max((self._ended[i] for i in ids), default=0.0)

    def has_ended(self, ids: Iterable[int]) -> bool:
        return all(i in self._ended for i in ids)

    def advance(self, to: float, step_seconds: float | None = None) -> Observations:
        """Let time pass until `to`; what has ended meanwhile."""
        completed, failed, measured = [], [], []
        while heads := self._heads():
            moving = min(heads, key=lambda m: self._times(m)[1])
            begin, now = self._times(moving)
            if now > to:
                break
            transfer = moving.transfer
            self._queues[transfer.direction].popleft()
            self._ended[transfer.id] = self._last_end[transfer.direction] = now
            if now >= moving.cancelled:
                failed.append(transfer.id)
                continue
            completed.append(transfer.id)
            nbytes = transfer.num_blocks * self._block_bytes
            measured.append(Measurement(transfer.direction, nbytes, now - begin))
        return Observations(tuple(completed), tuple(failed), tuple(measured), step_seconds)

    def _heads(self) -> list[_Moving]:
        heads = [queue[0] for queue in self._queues.values() if queue]
        return [m for m in heads if self.has_ended(m.transfer.after)]

    def _times(self, moving: _Moving) -> tuple[float, float]:
        transfer = moving.transfer
        ready = max(moving.submitted, self.time_of(transfer.after))
        begin = max(ready, self._last_end[transfer.direction])
        end = begin + transfer.num_blocks * self._block_seconds
        return begin, min(end, max(begin, moving.cancelled))


@dataclass(eq=False)
class _Conversation:
    id: int
    script: Script
    turn: int = 0
    length: int = 0  # tokens so far, the prompt of the present turn included
    computed: int = 0
    furthest: int = 0  # most tokens ever computed
    stop: int = 0  # length at which the turn is over
    started: bool = False


class VirtualEngine:
    """Serves scripts; `serve` runs some iterations, `close` ends everything.

    Parameters
    ----------
    scripts : list of Script
        The i-th is sequence i, and number i in the priority trace.
    policy : PriorityPolicy
    machine : Machine
    check_every : int
        Iterations between integrity checks.
    """

    def __init__(
        self,
        scripts: list[Script],
        policy: PriorityPolicy,
        machine: Machine,
        *,
        check_every: int = 500,
    ) -> None:
        m = self.machine = machine
        self.planner = SwapManager(
            m.device_blocks,
            m.host_blocks,
            m.block_tokens,
            block_bytes=m.block_bytes,
            first_group=m.first_group,
            headroom=m.headroom,
            strategy=m.strategy,
            reuse=m.reuse,
        )
        self.scheduler = PriorityScheduler(
            policy,
            blocks=m.device_blocks,
            slots=m.slots,
            epoch=m.epoch,
            quantum=m.quantum,
            headroom=int(m.headroom * m.device_blocks),
        )
        self.link = Link(m.bandwidth, m.block_bytes)
        self.now = 0.0
        self._check_every = check_every
        self._conversations = [_Conversation(i, script) for i, script in enumerate(scripts)]
        self._due = [(script.arrival, i) for i, script in enumerate(scripts)]
        heapq.heapify(self._due)
        self._running: dict[Hashable, _Conversation] = {}
        self._epoch = -1
        self._iteration = 0
        self._last_step: float | None = None
        self._served = Served()

    def serve(self, iterations: int | None = None) -> Served:
        """Run so many iterations, or until all is served; what they did."""
        stats = self.planner.stats()
        before = {f.name: getattr(stats, f.name) for f in fields(SwapStats)}
        begin, served = self.now, Served()
        self._served = served
        while (self._due or len(self.scheduler)) and served.iterations != iterations:
            self._step()
        served.seconds = self.now - begin
        served.occupancy /= max(served.iterations, 1)
        served.stats = SwapStats(**{n: getattr(stats, n) - old for n, old in before.items()})
        return served

    def close(self) -> None:
        """Free what is left, end all transfers, and check that nothing has leaked."""
        for c in self._conversations:
            if c.id in self.planner:
                self.planner.free(c.id)
        self._switch()
        self.planner.observe(self.link.advance(float("inf")))
        self.planner.check_integrity()
        assert self.planner.device.free_blocks == self.machine.device_blocks
        assert self.planner.copies.pool.free_blocks == self.machine.host_blocks
        assert self.planner.copies.num_leases() == 0

    # -- one iteration -------------------------------------------------------------------------

    def _step(self) -> None:
        while self._due and self._due[0][0] <= self.now:
            self._begin_turn(self._conversations[heapq.heappop(self._due)[1]])
        decision = self.scheduler.schedule(self.planner.available_blocks(headroom=False))
        if self.scheduler.current_epoch != self._epoch:
            self._tell_priorities()
        for i in decision.preempt:
            self._preempt(i)
        for i in (*decision.resume, *decision.admit):
            self._switch_in(self._conversations[i])
        batch = self._plan_batch()
        self._switch()
        arriving = self.planner.queue(SequenceState.ARRIVING)
        self._forward({c: n for c, n in batch.items() if c.id not in arriving})
        self._iteration += 1
        if self._iteration % self._check_every == 0:
            self.planner.check_integrity()
            self.scheduler.check_integrity()

    def _begin_turn(self, c: _Conversation) -> None:
        prompt, output = c.script.turns[c.turn]
        c.length += prompt
        c.stop = c.length + output
        self.scheduler.add(c.id, need=self._blocks(c.length), index=c.id, swapped=c.started)

    def _preempt(self, i: Hashable) -> None:
        c = self._running.pop(i)
        try:
            self.planner.preempt(i, c.computed)
        except HostMemoryExhausted:
            self.planner.preempt(i, c.computed, copy=False)

    def _switch_in(self, c: _Conversation) -> None:
        try:
            if c.started:
                c.computed = self.planner.resume(c.id, c.computed).tokens
            else:
                self.planner.allocate(c.id, c.length, expected=c.stop)
                c.started = True
        except OutOfBlocks:
            self.scheduler.deferred(c.id)
        else:
            self._running[c.id] = c

    def _plan_batch(self) -> dict[_Conversation, int]:
        batch: dict[_Conversation, int] = {}
        budget = self.machine.prefill_tokens
        for c in list(self._running.values()):
            missing = c.length - c.computed
            if not self._grow(c, batch):
                continue
            tokens = 1 if missing == 1 else min(missing, budget)
            if tokens:
                batch[c] = tokens
                budget -= tokens if missing > 1 else 0
        return batch

    def _grow(self, c: _Conversation, batch: dict[_Conversation, int]) -> bool:
        """Get blocks for all of `c`'s tokens; False if it is gone, or had to give way itself."""
        while c.id in self._running:
            try:
                table = self.planner.allocate(c.id, c.length, expected=c.stop)
            except OutOfBlocks:
                victim = self.scheduler.victim()
                self._preempt(victim)
                self.scheduler.yielded(victim)
                batch.pop(self._conversations[victim], None)
            else:
                self.scheduler.update(c.id, held=len(table))
                return True
        return False

    def _switch(self) -> None:
        self.planner.observe(self.link.advance(self.now, self._last_step))
        orders = self.planner.orders()
        for transfer in orders.transfers:
            self.link.submit(transfer, self.now)
        self.link.cancel(orders.cancel, self.now)
        while not self.link.has_ended(orders.wait):
            self.planner.observe(self.link.advance(self.link.next_end()))
        if (ready := self.link.time_of(orders.wait)) > self.now:
            self._served.stall += ready - self.now
            self.now = ready
        for i, tokens in self.planner.landed().items():
            self._conversations[i].computed = tokens

    def _forward(self, work: dict[_Conversation, int]) -> None:
        if not work:  # until something lands or somebody comes
            self._last_step = None
            event = min(self.link.next_end(), self._due[0][0] if self._due else float("inf"))
            self.now = max(self.now, event) if event < float("inf") else self._idle()
            return
        served = self._served
        prefilled = sum(n for n in work.values() if n > 1)
        self._last_step = self.machine.step_seconds(prefilled)
        self.now += self._last_step
        served.iterations += 1
        free = self.planner.available_blocks(headroom=False)
        served.occupancy += 1 - free / self.machine.device_blocks
        for c, tokens in work.items():
            done = c.computed + tokens
            served.recomputed += max(0, min(c.furthest, done) - c.computed)
            c.computed, c.furthest = done, max(c.furthest, done)
            if done == c.length:
                c.length += 1
                served.tokens += 1
                if c.length == c.stop:
                    self._end_turn(c)

    def _end_turn(self, c: _Conversation) -> None:
        self._served.turns += 1
        self.scheduler.remove(c.id)
        del self._running[c.id]
        c.turn += 1
        if c.turn < len(c.script.turns):
            self.planner.end_turn(c.id, c.computed)
            heapq.heappush(self._due, (self.now + c.script.pauses[c.turn - 1], c.id))
        else:
            self.planner.free(c.id)

    def _idle(self) -> float:
        raise RuntimeError("nothing runs, nothing moves, nobody comes: the engine is stuck")

    def _tell_priorities(self) -> None:
        self._epoch = self.scheduler.current_epoch
        for c in self._conversations:
            if c.started and c.id in self.scheduler:
                self.planner.set_priority(c.id, self.scheduler.priority(c.id))

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.machine.block_tokens)

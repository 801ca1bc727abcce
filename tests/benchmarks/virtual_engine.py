"""An engine without a model and without a clock: the real planner and scheduler in virtual time.

One iteration, in the order of the engine in examples/: decide, grow, switch, forward. A forward
takes `Machine.step_seconds`, transfers take bytes / bandwidth. The same conversations on the same
machine give the same figures everywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, replace

from serving_workloads import Machine, Script
from virtual_link import NEVER, VirtualLink

from kvswitch.errors import HostMemoryExhausted, OutOfBlocks
from kvswitch.scheduling import PriorityPolicy, PriorityScheduler
from kvswitch.switch import SequenceState, SwapManager, SwapStats

__all__ = ["Served", "VirtualEngine"]


@dataclass
class Served:
    """What some iterations did; `occupancy` is the mean share of device blocks that were needed."""

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
class _Conversation:
    id: int
    script: Script
    turn: int = 0
    length: int = 0  # tokens so far, with the prompt of the present turn
    computed: int = 0
    furthest: int = 0  # most tokens ever computed: what is computed below it is computed again
    stop: int = 0  # length at which the turn is over
    started: bool = False


class VirtualEngine:
    """Serves scripts, the i-th as sequence i with number i in the priority trace."""

    def __init__(self, scripts: list[Script], policy: PriorityPolicy, machine: Machine) -> None:
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
        self.link = VirtualLink(m.bandwidth, m.block_bytes)
        self.now = 0.0
        self._conversations: dict[Hashable, _Conversation] = {
            i: _Conversation(i, script) for i, script in enumerate(scripts)
        }
        self._due = [(script.arrival, i) for i, script in enumerate(scripts)]
        heapq.heapify(self._due)
        self._running: dict[Hashable, _Conversation] = {}
        self._epoch = -1
        self._last_step: float | None = None
        self._served = Served()

    def serve(self, iterations: int | None = None) -> Served:
        """Run so many iterations, or until all is served; what they did."""
        served = self._served = Served()
        before, begin = replace(self.planner.stats()), self.now
        while (self._due or len(self.scheduler)) and served.iterations != iterations:
            self._step()
            if served.iterations % 500 == 0:
                self.planner.check_integrity()
                self.scheduler.check_integrity()
        served.seconds = self.now - begin
        served.occupancy /= max(served.iterations, 1)
        after = asdict(self.planner.stats())
        served.stats = SwapStats(
            **{name: after[name] - old for name, old in asdict(before).items()}
        )
        return served

    def close(self) -> None:
        """Free what is left and end all transfers; nothing may have leaked."""
        for c in self._conversations.values():
            if c.id in self.planner:
                self.planner.free(c.id)
        self._switch()
        self.planner.observe(self.link.advance(NEVER))
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

    def _begin_turn(self, c: _Conversation) -> None:
        prompt, output = c.script.turns[c.turn]
        c.length += prompt
        c.stop = c.length + output
        need = -(-c.length // self.machine.block_tokens)
        self.scheduler.add(c.id, need=need, index=c.id, swapped=c.started)

    def _tell_priorities(self) -> None:
        self._epoch = self.scheduler.current_epoch
        for c in self._conversations.values():
            if c.started and c.id in self.scheduler:
                self.planner.set_priority(c.id, self.scheduler.priority(c.id))

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
        """Tokens that each computes: one if it decodes, its share of the budget if it prefills."""
        batch: dict[_Conversation, int] = {}
        budget = self.machine.prefill_tokens
        for c in list(self._running.values()):
            if not self._grow(c, batch):
                continue
            missing = c.length - c.computed
            tokens = missing if missing == 1 else min(missing, budget)
            if tokens:
                batch[c] = tokens
                budget -= tokens if missing > 1 else 0
        return batch

    def _grow(self, c: _Conversation, batch: dict[_Conversation, int]) -> bool:
        """Get blocks for all of `c`'s tokens; False if it had to give way."""
        while c.id in self._running:
            try:
                table = self.planner.allocate(c.id, c.length, expected=c.stop)
            except OutOfBlocks:
                victim = self.scheduler.victim()  # at least `c` itself
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
        while (ready := self.link.end_of(orders.wait)) == NEVER:
            self.planner.observe(self.link.advance(self.link.next_end()))
        self._served.stall += max(0.0, ready - self.now)
        self.now = max(self.now, ready)
        for i, tokens in self.planner.landed().items():
            self._conversations[i].computed = tokens

    def _forward(self, work: dict[_Conversation, int]) -> None:
        if not work:
            self._wait()
            return
        prefilled = sum(tokens for tokens in work.values() if tokens > 1)
        self._last_step = self.machine.step_seconds(prefilled)
        self.now += self._last_step
        needed = self.machine.device_blocks - self.planner.available_blocks(headroom=False)
        self._served.iterations += 1
        self._served.occupancy += needed / self.machine.device_blocks
        for c, tokens in work.items():
            done = c.computed + tokens
            self._served.recomputed += max(0, min(c.furthest, done) - c.computed)
            c.computed, c.furthest = done, max(c.furthest, done)
            if done == c.length:
                c.length += 1
                self._served.tokens += 1
                if c.length == c.stop:
                    self._end_turn(c)

    def _wait(self) -> None:
        """Let time pass until something lands or somebody comes."""
        self._last_step = None
        event = min([self.link.next_end(), *(arrival for arrival, _ in self._due[:1])])
        if event == NEVER:
            raise RuntimeError(f"stuck after {self.now} s: nothing runs, moves or comes")
        self.now = max(self.now, event)

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

"""The scheduler against a naive model: plain lists, and everything sorted anew every iteration.

That the two agree also shows that the scheduler skips an iteration only where nothing can change.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from kvswitch.scheduling import (
    Decision,
    FixedPolicy,
    InversionMeter,
    PriorityPolicy,
    PriorityScheduler,
    PriorityTrace,
    State,
    TracePolicy,
)

BLOCKS = 24
TRACE = PriorityTrace.random(0, sequences=4, epochs=7, levels=3)


@dataclass(eq=False)
class Entry:
    name: int
    index: int
    base: float
    need: int
    cost: int
    arrival: int
    state: State
    priority: float = 0.0
    held: int = 0
    ran: int = 0
    entered: int = 0
    came_from: State = State.WAITING


class Model:
    def __init__(
        self, ageing: int | None, slots: int, epoch: int, quantum: int, headroom: int
    ) -> None:
        self.ageing, self.slots, self.headroom = ageing, slots, headroom
        self.interval, self.quantum = epoch, quantum
        self.iteration, self.epoch = -1, 0
        self.entries: list[Entry] = []

    def rank(self, entry: Entry) -> None:
        if self.ageing == 0:  # a trace
            entry.priority = float(TRACE.levels[self.epoch % TRACE.epochs][entry.index])
        elif self.ageing is None or entry.state == State.RUNNING:
            entry.priority = entry.base
        else:
            entry.priority = entry.base + (self.epoch - entry.ran) // self.ageing

    def running(self) -> list[Entry]:
        return [entry for entry in self.order() if entry.state == State.RUNNING]

    def order(self) -> list[Entry]:
        def key(entry: Entry) -> tuple[float, ...]:
            if entry.state == State.RUNNING:
                return (-entry.priority, 0, -entry.cost, entry.arrival)
            return (-entry.priority, 1, 0, entry.arrival)

        return sorted(self.entries, key=key)

    def target(self, capacity: int) -> list[Entry]:
        taken: list[Entry] = []
        used = 0
        for entry in self.order():
            spare = self.headroom
            if entry.state == State.RUNNING:
                below_a_newcomer = any(other.state != State.RUNNING for other in taken)
                spare = self.headroom // 2 if below_a_newcomer else 0
            spare = spare if taken else 0
            if len(taken) < self.slots and used + entry.need + spare <= capacity:
                taken.append(entry)
                used += entry.need
        return taken

    def exchange(
        self, newcomers: list[Entry], victims: list[Entry], capacity: int
    ) -> tuple[list[Entry], list[Entry]]:
        """As many of the newcomers as can come in, for as few of the victims as possible."""
        running = self.running()
        for ins in range(len(newcomers), -1, -1):
            for outs in range(len(victims) + 1):
                batch = [*running, *newcomers[:ins]]
                batch = [entry for entry in batch if entry not in victims[:outs]]
                if len(batch) <= self.slots and sum(e.need for e in batch) <= capacity:
                    return newcomers[:ins], victims[:outs]
        return [], victims

    def schedule(self, capacity: int) -> Decision:
        self.iteration += 1
        if self.iteration % self.interval == 0:
            self.epoch = self.iteration // self.interval
            for entry in self.entries:
                self.rank(entry)
        target = self.target(capacity)
        newcomers = [entry for entry in target if entry.state != State.RUNNING]
        victims = [
            entry
            for entry in reversed(self.running())
            if entry not in target and self.iteration >= entry.entered + self.quantum
        ]
        # Half of the headroom is made free along with room for somebody, and not for its own sake.
        reserve = max(0, min(self.headroom // 2, capacity - sum(e.need for e in target)))
        newcomers, victims = self.exchange(newcomers, victims, capacity - reserve)
        if not newcomers and sum(e.need for e in self.running()) <= capacity:
            victims = []
        for entry in newcomers:
            entry.came_from, entry.state = entry.state, State.RUNNING
            entry.held, entry.entered = entry.need, self.iteration
        for entry in victims:
            self.preempt(entry)
        return Decision(
            preempt=tuple(entry.name for entry in victims),
            resume=tuple(e.name for e in newcomers if e.came_from == State.SWAPPED),
            admit=tuple(e.name for e in newcomers if e.came_from == State.WAITING),
        )

    def preempt(self, entry: Entry) -> None:
        entry.state, entry.held, entry.ran = State.SWAPPED, 0, self.epoch


class SchedulerMachine(RuleBasedStateMachine):
    names = Bundle("names")

    @initialize(
        ageing=st.sampled_from([None, 0, 1, 2]),
        slots=st.integers(1, 6),
        epoch=st.integers(1, 6),
        quantum=st.integers(0, 5),
        headroom=st.integers(0, 4),
    )
    def start(
        self, ageing: int | None, slots: int, epoch: int, quantum: int, headroom: int
    ) -> None:
        quantum = min(quantum, epoch - 1)
        policy: PriorityPolicy = TracePolicy(TRACE) if ageing == 0 else FixedPolicy(ageing)
        self.scheduler = PriorityScheduler(
            policy, blocks=BLOCKS, slots=slots, epoch=epoch, quantum=quantum, headroom=headroom
        )
        self.model = Model(ageing, slots, epoch, quantum, headroom)
        self.meter = InversionMeter()
        self.seconds = self.request_seconds = 0
        self.elsewhere = 0  # blocks of the pool that others use
        self.arrivals = 0
        self.last = Decision()

    def entry(self, name: Hashable) -> Entry:
        return next(entry for entry in self.model.entries if entry.name == name)

    def free(self) -> int:
        return BLOCKS - self.elsewhere - sum(entry.held for entry in self.model.entries)

    @rule(
        target=names,
        need=st.integers(1, BLOCKS),
        base=st.integers(0, 3),
        cost=st.integers(0, 2),
        index=st.integers(0, 3),
        swapped=st.booleans(),
    )
    def add(self, need: int, base: int, cost: int, index: int, swapped: bool) -> int:
        name = self.arrivals
        self.arrivals += 1
        self.scheduler.add(name, need=need, priority=base, index=index, cost=cost, swapped=swapped)
        state = State.SWAPPED if swapped else State.WAITING
        entry = Entry(name, index, base, need, cost, name, state, ran=self.model.epoch)
        self.model.rank(entry)
        self.model.entries.append(entry)
        return name

    @rule(target=names, needs=st.lists(st.integers(1, 8), max_size=6))
    def add_many(self, needs: list[int]) -> object:
        return multiple(
            *(self.add(need, i % 3, i % 2, i % 4, swapped=False) for i, need in enumerate(needs))
        )

    @rule(name=consumes(names))
    def remove(self, name: int) -> None:
        self.scheduler.remove(name)
        self.model.entries.remove(self.entry(name))
        assert name not in self.scheduler

    @rule(name=names, base=st.integers(0, 3))
    def set_priority(self, name: int, base: int) -> None:
        self.scheduler.set_priority(name, base)
        entry = self.entry(name)
        entry.base = base
        self.model.rank(entry)

    @rule(name=names, cost=st.integers(0, 2))
    def set_cost(self, name: int, cost: int) -> None:
        self.scheduler.update(name, cost=cost)
        self.entry(name).cost = cost

    @rule(name=names, more=st.integers(1, 4))
    def grow(self, name: int, more: int) -> None:
        """Grow as an engine does: who is least important gives way until there is room."""
        entry = self.entry(name)
        held = entry.held + more
        if entry.state != State.RUNNING or held > BLOCKS - self.elsewhere:
            return
        while self.free() < more:
            victim = self.model.running()[-1]
            assert self.scheduler.victim() == victim.name
            self.scheduler.yielded(victim.name)
            self.model.preempt(victim)
            if victim is entry:
                return
        self.scheduler.update(name, held=held)
        entry.held = entry.need = held

    @rule(name=names, need=st.integers(1, BLOCKS))
    def announce(self, name: int, need: int) -> None:
        entry = self.entry(name)
        need = max(need, entry.held)
        self.scheduler.update(name, need=need)
        entry.need = need

    @rule(name=names, held=st.integers(1, BLOCKS))
    def shrink(self, name: int, held: int) -> None:
        entry = self.entry(name)
        if entry.state == State.RUNNING:
            held = min(held, entry.held)
            self.scheduler.update(name, held=held)
            entry.held = entry.need = held

    @rule(blocks=st.integers(0, BLOCKS))
    def others_use(self, blocks: int) -> None:
        self.elsewhere = min(blocks, self.elsewhere + self.free())

    @precondition(lambda self: self.last.resume or self.last.admit)
    @rule(data=st.data())
    def defer(self, data: st.DataObject) -> None:
        came_in = [
            name
            for name in self.last.resume + self.last.admit
            if name in self.scheduler and self.scheduler.state(name) == State.RUNNING
        ]
        for name in data.draw(st.sets(st.sampled_from(came_in))) if came_in else ():
            self.scheduler.deferred(name)
            entry = self.entry(name)
            entry.state, entry.held = entry.came_from, 0

    @rule(times=st.integers(1, 8))
    def schedule(self, times: int) -> None:
        for _ in range(times):
            self.schedule_once()

    def schedule_once(self) -> None:
        model = self.model
        before: dict[Hashable, State] = {entry.name: entry.state for entry in model.entries}
        protected = {
            entry.name
            for entry in model.running()
            if model.iteration + 1 < entry.entered + model.quantum
        }
        capacity = self.free() + sum(entry.held for entry in model.entries)

        decision = self.last = self.scheduler.schedule(self.free())
        assert decision == model.schedule(capacity)
        self.meter.observe(1, self.scheduler)
        self.count_inversion()

        # What holds whatever the model says.
        assert all(before[name] == State.RUNNING for name in decision.preempt)
        assert all(before[name] == State.SWAPPED for name in decision.resume)
        assert all(before[name] == State.WAITING for name in decision.admit)
        assert not protected.intersection(decision.preempt)
        running = model.running()
        assert len(running) <= model.slots
        assert sum(entry.held for entry in running) <= capacity
        if not protected and sum(entry.need for entry in running) <= capacity:
            self.check_nobody_waits_for_a_lower_one(capacity)

    def check_nobody_waits_for_a_lower_one(self, capacity: int) -> None:
        """Who is outside would not fit beside the higher ones that run, with its headroom."""
        model = self.model
        for waiting in model.entries:
            if waiting.state == State.RUNNING:
                continue
            higher = [e for e in model.running() if e.priority >= waiting.priority]
            used = sum(entry.need for entry in higher) + waiting.need
            spare = model.headroom if higher else 0
            assert len(higher) == model.slots or used + spare > capacity

    def count_inversion(self) -> None:
        priorities = [entry.priority for entry in self.model.running()]
        inverted = sum(
            entry.state != State.RUNNING and entry.priority > min(priorities, default=9e9)
            for entry in self.model.entries
        )
        assert self.scheduler.inverted == inverted
        self.seconds += bool(inverted)
        self.request_seconds += inverted
        assert self.meter.seconds == self.seconds
        assert self.meter.request_seconds == self.request_seconds

    @invariant()
    def same_states(self) -> None:
        if not hasattr(self, "model"):
            return
        self.scheduler.check_integrity()
        assert len(self.scheduler) == len(self.model.entries)
        for entry in self.model.entries:
            assert self.scheduler.state(entry.name) == entry.state
            assert self.scheduler.priority(entry.name) == entry.priority
        assert self.scheduler.current_epoch == self.model.epoch


TestSchedulerAgainstModel = SchedulerMachine.TestCase
TestSchedulerAgainstModel.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)

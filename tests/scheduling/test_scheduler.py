from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from kvswitch.scheduling import (
    Decision,
    FixedPolicy,
    PriorityPolicy,
    PriorityScheduler,
    PriorityTrace,
    State,
    TracePolicy,
)


class Pool:
    """A scheduler, and a device pool in which all blocks that nobody holds are free."""

    def __init__(
        self, *, blocks: int = 100, policy: PriorityPolicy | None = None, **settings: Any
    ) -> None:
        settings = {"slots": 8, "epoch": 10, "quantum": 0} | settings
        self.blocks = blocks
        self.scheduler = PriorityScheduler(policy or FixedPolicy(), blocks=blocks, **settings)
        self.need: dict[Hashable, int] = {}
        self.held: dict[Hashable, int] = {}

    def add(self, sequence: Hashable, need: int, priority: float = 0.0, **more: Any) -> None:
        self.scheduler.add(sequence, need=need, priority=priority, **more)
        self.need[sequence] = need

    def remove(self, sequence: Hashable) -> None:
        self.scheduler.remove(sequence)
        self.held.pop(sequence, None)

    def resize(self, sequence: Hashable, held: int) -> None:
        self.scheduler.update(sequence, held=held)
        self.need[sequence] = self.held[sequence] = held

    def preempt(self, sequence: Hashable) -> None:
        self.scheduler.yielded(sequence)
        del self.held[sequence]

    def schedule(self) -> Decision:
        decision = self.scheduler.schedule(self.blocks - sum(self.held.values()))
        for sequence in decision.preempt:
            del self.held[sequence]
        for sequence in decision.resume + decision.admit:
            self.held[sequence] = self.need[sequence]
        self.scheduler.check_integrity()
        return decision

    def run(self, iterations: int) -> None:
        for _ in range(iterations):
            assert self.schedule() == Decision()

    def running(self) -> set[Hashable]:
        assert all(self.scheduler.state(sequence) == State.RUNNING for sequence in self.held)
        return set(self.held)


# -- who runs --------------------------------------------------------------------------------------


def test_nobody_is_there() -> None:
    pool = Pool()
    assert pool.schedule() == Decision()
    assert len(pool.scheduler) == 0
    assert "a" not in pool.scheduler


def test_the_highest_that_fit_are_admitted_in_order() -> None:
    pool = Pool(blocks=100)
    for name, need, priority in [("low", 50, 1), ("high", 60, 3), ("middle", 40, 2)]:
        pool.add(name, need, priority)
    assert pool.schedule() == Decision(admit=("high", "middle"))
    assert pool.scheduler.state("high") == State.RUNNING
    assert pool.scheduler.state("low") == State.WAITING


def test_who_does_not_fit_does_not_keep_smaller_ones_from_running() -> None:
    pool = Pool(blocks=100)
    for name, need, priority in [("first", 60, 3), ("large", 50, 2), ("small", 40, 1)]:
        pool.add(name, need, priority)
    assert pool.schedule().admit == ("first", "small")


def test_no_more_run_than_there_are_slots() -> None:
    pool = Pool(slots=2)
    for name in "abc":
        pool.add(name, 1)
    assert pool.schedule().admit == ("a", "b")


def test_a_conversation_that_comes_back_is_resumed_not_admitted() -> None:
    pool = Pool()
    pool.add("old", 1, swapped=True)
    pool.add("new", 1)
    assert pool.scheduler.state("old") == State.SWAPPED
    assert pool.schedule() == Decision(resume=("old",), admit=("new",))


def test_of_equals_those_that_run_go_on() -> None:
    pool = Pool(slots=1)
    pool.add("first", 1)
    pool.schedule()
    pool.add("second", 1)
    pool.run(25)
    assert pool.running() == {"first"}


def test_of_equals_that_wait_the_first_to_arrive_runs_also_after_a_preemption() -> None:
    pool = Pool(slots=1)
    for name in "abc":
        pool.add(name, 1)
    pool.schedule()
    pool.preempt("a")
    assert pool.schedule() == Decision(resume=("a",))
    pool.remove("a")
    assert pool.schedule() == Decision(admit=("b",))


def test_of_equals_that_run_the_cheapest_is_switched_out() -> None:
    pool = Pool(slots=3)
    for name, cost in [("dear", 9), ("cheap", 1), ("fair", 5)]:
        pool.add(name, 1, cost=cost)
    pool.schedule()
    pool.add("urgent", 1, 1.0)
    assert pool.schedule() == Decision(preempt=("cheap",), admit=("urgent",))


def test_the_cost_may_change_while_running() -> None:
    pool = Pool(slots=2)
    pool.add("a", 1, cost=1)
    pool.add("b", 1, cost=2)
    pool.schedule()
    pool.scheduler.update("a", cost=3)
    pool.add("urgent", 1, 1.0)
    assert pool.schedule().preempt == ("b",)


def test_a_swapped_sequence_comes_back_when_there_is_room() -> None:
    pool = Pool(blocks=10)
    pool.add("low", 6, 0)
    pool.schedule()
    pool.add("high", 6, 1)
    assert pool.schedule() == Decision(preempt=("low",), admit=("high",))
    assert pool.scheduler.state("low") == State.SWAPPED
    pool.remove("high")
    assert pool.schedule() == Decision(resume=("low",))


# -- epochs ----------------------------------------------------------------------------------------


def test_priorities_change_at_epochs_only() -> None:
    trace = PriorityTrace(np.array([[1, 0], [0, 1], [1, 1]], np.uint8))
    pool = Pool(slots=1, epoch=10, policy=TracePolicy(trace))
    pool.add("a", 1, index=0)
    pool.add("b", 1, index=1)
    assert pool.schedule() == Decision(admit=("a",))
    pool.run(9)
    assert (pool.scheduler.current_epoch, pool.scheduler.priority("b")) == (0, 0)
    assert pool.schedule() == Decision(preempt=("a",), admit=("b",))
    assert (pool.scheduler.current_epoch, pool.scheduler.priority("b")) == (1, 1)
    pool.run(19)
    assert pool.schedule() == Decision(preempt=("b",), resume=("a",))  # the trace starts anew


def test_who_arrives_within_an_epoch_gets_the_priority_of_that_epoch() -> None:
    trace = PriorityTrace(np.array([[5, 0], [0, 5]], np.uint8))
    pool = Pool(slots=1, epoch=10, policy=TracePolicy(trace))
    pool.add("a", 1, index=0)
    for _ in range(12):
        pool.schedule()
    pool.add("b", 1, index=1)
    assert pool.scheduler.priority("b") == 5
    assert pool.schedule() == Decision(preempt=("a",), admit=("b",))


def test_a_policy_is_asked_with_the_epochs_waited_since_last_running() -> None:
    asked = []

    class Recorder(FixedPolicy):
        def priorities(self, epoch: int, index: Any, base: Any, waited: Any) -> Any:
            asked.append((epoch, index.tolist(), base.tolist(), waited.tolist()))
            return super().priorities(epoch, index, base, waited)

    pool = Pool(slots=1, epoch=2, policy=Recorder())
    pool.add("a", 1, 2.0, index=7)
    pool.add("b", 1, 1.0)
    for _ in range(5):
        pool.schedule()
    pool.scheduler.set_priority("b", 3.0)
    for _ in range(4):
        pool.schedule()
    # One sequence is asked for when it is added or given a priority, all at an epoch.
    assert asked == [
        (0, [7], [2.0], [0]),
        (0, [-1], [1.0], [0]),
        (0, [7, -1], [2.0, 1.0], [0, 0]),
        (1, [7, -1], [2.0, 1.0], [0, 1]),
        (2, [7, -1], [2.0, 1.0], [0, 2]),
        (2, [-1], [3.0], [2]),
        (3, [7, -1], [2.0, 3.0], [1, 0]),
        (4, [7, -1], [2.0, 3.0], [2, 0]),
    ]


def test_between_epochs_nothing_is_decided_unless_something_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = Pool(blocks=10, slots=2, epoch=10)
    pool.add("a", 6)
    pool.add("b", 6)
    pool.schedule()
    computed = 0
    switch = PriorityScheduler._switch

    def counted(scheduler: PriorityScheduler, capacity: int) -> Decision:
        nonlocal computed
        computed += 1
        return switch(scheduler, capacity)

    monkeypatch.setattr(PriorityScheduler, "_switch", counted)
    pool.run(9)
    pool.resize("a", 7)
    pool.remove("b")
    assert computed == 0
    pool.run(1)
    assert computed == 1


# -- preemption between epochs ---------------------------------------------------------------------


def test_an_arrival_preempts_a_lower_one_at_once() -> None:
    pool = Pool(blocks=10)
    pool.add("low", 4, 0)
    pool.add("high", 4, 2)
    pool.schedule()
    pool.add("arrival", 5, 1)
    assert pool.schedule() == Decision(preempt=("low",), admit=("arrival",))


def test_an_arrival_preempts_no_equal_and_no_higher_one() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 4, 1)
    pool.add("b", 4, 2)
    pool.schedule()
    pool.add("arrival", 5, 1)
    pool.run(30)


def test_a_priority_set_at_run_time_holds_at_once() -> None:
    pool = Pool(slots=1)
    pool.add("a", 1, 1)
    pool.add("b", 1, 0)
    pool.schedule()
    pool.scheduler.set_priority("b", 2)
    assert pool.scheduler.priority("b") == 2
    assert pool.schedule() == Decision(preempt=("a",), admit=("b",))
    pool.scheduler.set_priority("b", 0)
    assert pool.schedule() == Decision(preempt=("b",), resume=("a",))


def test_no_more_are_preempted_than_must_be() -> None:
    pool = Pool(blocks=10)
    for name, priority in [("a", 1), ("b", 2), ("c", 3)]:
        pool.add(name, 3, priority)
    pool.schedule()
    pool.add("arrival", 4, 9)
    assert pool.schedule() == Decision(preempt=("a",), admit=("arrival",))


# -- quantum ---------------------------------------------------------------------------------------


def test_who_was_just_switched_in_runs_for_the_quantum() -> None:
    pool = Pool(slots=1, quantum=3)
    pool.add("low", 1)
    pool.schedule()
    pool.add("high", 1, 1)
    pool.run(2)
    assert pool.schedule() == Decision(preempt=("low",), admit=("high",))


def test_the_quantum_holds_across_an_epoch() -> None:
    pool = Pool(slots=1, epoch=10, quantum=3)
    pool.run(9)
    pool.add("low", 1)
    pool.schedule()
    pool.add("high", 1, 1)
    pool.run(2)
    assert pool.schedule() == Decision(preempt=("low",), admit=("high",))


def test_while_the_target_is_blocked_by_a_quantum_nobody_else_takes_its_place() -> None:
    pool = Pool(blocks=10, quantum=4)
    pool.add("early", 5)
    pool.schedule()
    pool.run(2)
    pool.add("late", 5)
    pool.schedule()
    pool.add("large", 10, 1)
    pool.add("small", 5, 0)
    pool.run(1)
    # `early` might go now, but `large` would not fit beside `late`, and `small` is not its heir.
    pool.run(2)
    assert pool.running() == {"early", "late"}
    assert pool.schedule() == Decision(preempt=("late", "early"), admit=("large",))


# -- growth ----------------------------------------------------------------------------------------


def test_the_lowest_gives_way_when_one_must_grow() -> None:
    pool = Pool(blocks=10, quantum=5)
    for name, priority in [("a", 2), ("b", 1), ("c", 3)]:
        pool.add(name, 3, priority)
    pool.schedule()
    scheduler = pool.scheduler
    assert scheduler.victim() == "b"  # the quantum notwithstanding
    assert scheduler.victim(exclude={"b", "elsewhere"}) == "a"
    assert scheduler.victim(exclude={"a", "b", "c"}) is None
    pool.preempt("b")
    pool.resize("a", 6)
    assert scheduler.state("b") == State.SWAPPED
    pool.run(30)
    pool.resize("a", 4)
    assert pool.schedule() == Decision(resume=("b",))


def test_of_equals_the_cheapest_gives_way_then_the_last_to_arrive() -> None:
    pool = Pool()
    for name, cost in [("dear", 2), ("early", 1), ("late", 1)]:
        pool.add(name, 1, cost=cost)
    pool.schedule()
    assert pool.scheduler.victim() == "late"
    assert pool.scheduler.victim(exclude=["late"]) == "early"


def test_nobody_gives_way_where_nobody_runs() -> None:
    pool = Pool()
    pool.add("a", 1)
    assert pool.scheduler.victim() is None


def test_growth_that_is_announced_preempts_the_lowest_beforehand() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 5, 1)
    pool.add("b", 5, 0)
    pool.schedule()
    pool.scheduler.update("a", need=6)
    assert pool.schedule() == Decision(preempt=("b",))
    pool.resize("a", 6)
    pool.run(15)


def test_growth_inside_the_pool_changes_nothing() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 4)
    pool.add("b", 5)
    pool.schedule()
    pool.resize("a", 5)
    pool.run(15)


def test_who_holds_less_makes_room_at_once() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 6)
    pool.add("b", 5)
    pool.schedule()
    pool.resize("a", 5)
    assert pool.schedule() == Decision(admit=("b",))


def test_who_needs_less_gets_in_at_once() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 6)
    pool.add("b", 5)
    pool.schedule()
    pool.scheduler.update("b", need=4)
    pool.need["b"] = 4
    assert pool.schedule() == Decision(admit=("b",))


def test_blocks_that_somebody_else_gives_back_are_used_at_once() -> None:
    pool = Pool(blocks=10)
    pool.add("a", 4)
    pool.add("b", 4)
    scheduler = pool.scheduler
    assert scheduler.schedule(7) == Decision(admit=("a",))
    assert scheduler.schedule(3) == Decision()
    assert scheduler.schedule(4) == Decision(admit=("b",))


# -- headroom --------------------------------------------------------------------------------------


def test_who_is_switched_in_leaves_the_headroom_free() -> None:
    pool = Pool(blocks=100, headroom=6)
    pool.add("a", 50)
    pool.add("b", 45)
    pool.add("c", 44)
    assert pool.schedule().admit == ("a", "c")


def test_the_highest_runs_without_headroom() -> None:
    pool = Pool(blocks=100, headroom=6)
    pool.add("a", 10)
    pool.schedule()
    pool.add("large", 100, 1)
    assert pool.schedule() == Decision(preempt=("a",), admit=("large",))


def test_nobody_is_preempted_for_headroom() -> None:
    pool = Pool(blocks=100, headroom=6)
    pool.add("a", 47)
    pool.add("b", 47)
    pool.schedule()
    pool.resize("a", 53)
    pool.run(15)


def test_nobody_gives_way_for_headroom_to_a_smaller_one() -> None:
    pool = Pool(blocks=100, headroom=6)
    pool.add("a", 47)
    pool.add("b", 47, priority=-1)
    pool.schedule()
    pool.add("smaller", 3, priority=-2)
    pool.resize("a", 51)
    pool.run(15)


# -- what the engine could not do ------------------------------------------------------------------


def test_a_deferred_sequence_is_what_it_was_and_tried_again() -> None:
    pool = Pool()
    pool.add("old", 5, swapped=True)
    pool.add("new", 5)
    pool.schedule()
    for name, state in [("old", State.SWAPPED), ("new", State.WAITING)]:
        pool.scheduler.deferred(name)
        assert pool.scheduler.state(name) == state
    assert pool.schedule() == Decision(resume=("old",), admit=("new",))


def test_a_deferred_sequence_has_not_run() -> None:
    pool = Pool(slots=1, epoch=2, policy=FixedPolicy(ageing=1))
    pool.add("a", 1)
    for _ in range(6):
        pool.schedule()
        pool.scheduler.deferred("a")
    assert pool.scheduler.priority("a") == 2


# -- coming and going ------------------------------------------------------------------------------


def test_a_conversation_comes_back_turn_by_turn() -> None:
    pool = Pool()
    for turn in range(3):
        pool.add("chat", 10 + turn, swapped=turn > 0)
        decision = pool.schedule()
        assert decision.resume + decision.admit == ("chat",)
        pool.remove("chat")
        assert "chat" not in pool.scheduler
        pool.schedule()


def test_any_state_can_be_removed() -> None:
    pool = Pool(slots=1)
    pool.add("swapped", 1)
    pool.schedule()
    pool.add("running", 1, 1)
    pool.schedule()
    pool.add("waiting", 1)
    for name in ("waiting", "running", "swapped"):
        pool.remove(name)
        pool.scheduler.check_integrity()
    assert len(pool.scheduler) == 0
    pool.add("next", 100)
    assert pool.schedule() == Decision(admit=("next",))


def test_thousands_come_and_go_in_the_room_of_those_that_are_there() -> None:
    pool = Pool(blocks=10_000, slots=300)
    for i in range(5_000):
        pool.add(i, 10)
        if i >= 200:
            pool.remove(i - 200)
    assert len(pool.scheduler) == 200
    assert len(pool.scheduler._queues.sequences) == 256
    assert len(pool.schedule().admit) == 200

"""With ageing every request runs within the epochs that `FixedPolicy` states."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswitch.scheduling import FixedPolicy, PriorityScheduler, State

BLOCKS = 20
TOP = 3


@dataclass
class Wait:
    """An unbroken time outside the batch."""

    began: int  # epoch
    overdue: int  # epoch
    others: int | None = None  # who waited when it was overdue


class Load:
    """An engine whose requests grow, finish and come at the worst of times."""

    def __init__(
        self, ageing: int, slots: int, epoch: int, quantum: int, headroom: int, need: int
    ) -> None:
        self.scheduler = PriorityScheduler(
            FixedPolicy(ageing),
            blocks=BLOCKS,
            slots=slots,
            epoch=epoch,
            quantum=quantum,
            headroom=headroom,
        )
        self.ageing, self.epoch, self.largest = ageing, epoch, need
        self.together = max(1, min(slots, (BLOCKS - headroom) // need))
        self.iteration = 0
        self.base: dict[Hashable, int] = {}
        self.need: dict[Hashable, int] = {}
        self.held: dict[Hashable, int] = {}
        self.waits: dict[Hashable, Wait] = {}
        self.longest = 0

    def add(self, name: Hashable, base: int, need: int) -> None:
        need = min(need, self.largest)
        self.scheduler.add(name, need=need, priority=base, swapped=False)
        self.base[name], self.need[name] = base, need
        self.wait(name)

    def wait(self, name: Hashable) -> None:
        began = self.scheduler.current_epoch
        levels = math.ceil(TOP - self.base[name])
        self.waits[name] = Wait(began, began + self.ageing * (levels + 1))

    def finish(self, name: Hashable) -> None:
        self.scheduler.remove(name)
        self.waits.pop(name, None)
        self.held.pop(name, None)

    def grow(self, name: Hashable) -> None:
        if self.held[name] == self.largest:
            return
        while sum(self.held.values()) == BLOCKS:
            victim = self.scheduler.victim()
            self.scheduler.yielded(victim)
            del self.held[victim]
            self.wait(victim)
            if victim == name:
                return
        self.held[name] += 1
        self.need[name] = self.held[name]
        self.scheduler.update(name, held=self.held[name])

    def step(self) -> None:
        epoch, phase = divmod(self.iteration, self.epoch)
        self.iteration += 1
        if phase == 0:
            for wait in self.waits.values():
                if wait.overdue == epoch:
                    wait.others = len(self.waits) - 1
        decision = self.scheduler.schedule(BLOCKS - sum(self.held.values()))
        for name in decision.preempt:
            del self.held[name]
            self.wait(name)
        for name in decision.resume + decision.admit:
            self.held[name] = self.need[name]
            self.longest = max(self.longest, epoch - self.waits.pop(name).began)
        if phase == self.epoch - 1:
            for name, wait in self.waits.items():
                if wait.others is not None:
                    bound = wait.overdue + wait.others // self.together
                    assert epoch < bound, f"{name} waits since epoch {wait.began}"


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ageing=st.integers(1, 3),
    slots=st.integers(1, 4),
    epoch=st.integers(1, 4),
    quantum=st.integers(0, 3),
    headroom=st.integers(0, 4),
    need=st.integers(1, BLOCKS),
    arrivals=st.sampled_from([0.3, 0.6, 1.0]),
    lasting=st.sampled_from([2, 5, 20]),
    urgent=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_every_request_runs_within_the_stated_number_of_epochs(
    seed: int,
    ageing: int,
    slots: int,
    epoch: int,
    quantum: int,
    headroom: int,
    need: int,
    arrivals: float,
    lasting: int,
    urgent: float,
) -> None:
    random = Random(seed)
    load = Load(ageing, slots, epoch, min(quantum, epoch - 1), headroom, need)
    names = iter(range(10_000))
    for _ in range(200):
        if len(load.scheduler) < 40 and random.random() < arrivals:
            base = TOP if random.random() < urgent else random.randint(0, TOP)
            load.add(next(names), base, random.randint(1, BLOCKS))
        load.step()
        for name in list(load.held):
            if name not in load.held:  # gave way to another's growth
                continue
            if random.random() < 1 / lasting:
                load.finish(name)
            elif random.random() < 0.3:
                load.grow(name)


@pytest.mark.parametrize("ageing", [1, 2, 5])
@pytest.mark.parametrize("urgent_ones_finish", [False, True])
def test_the_lowest_request_runs_in_spite_of_urgent_ones(
    ageing: int, urgent_ones_finish: bool
) -> None:
    load = Load(ageing, slots=1, epoch=4, quantum=1, headroom=0, need=BLOCKS)
    load.add("low", 0, BLOCKS)
    urgent = 0
    load.add(urgent, TOP, BLOCKS)
    for _ in range(load.epoch * ageing * (TOP + 2)):
        load.step()
        if "low" in load.held:
            break
        if urgent_ones_finish and urgent in load.held:
            load.finish(urgent)
            load.add(urgent := urgent + 1, TOP, BLOCKS)
    # Of equals those that run go on, and of those that wait the first to arrive comes next.
    assert load.longest == ageing * (TOP if urgent_ones_finish else TOP + 1)


def test_without_ageing_the_lowest_request_starves() -> None:
    scheduler = PriorityScheduler(FixedPolicy(), blocks=1, slots=1, epoch=4, quantum=1)
    scheduler.add("low", need=1, priority=0)
    for i in range(500):
        scheduler.add(i, need=1, priority=1)
        scheduler.schedule(1)
        scheduler.remove(i)
    assert scheduler.state("low") == State.WAITING


def test_requests_of_equal_priority_take_turns() -> None:
    scheduler = PriorityScheduler(FixedPolicy(ageing=2), blocks=2, slots=2, epoch=5, quantum=2)
    for name in "abcdef":
        scheduler.add(name, need=1)
    ran = dict.fromkeys("abcdef", 0)
    for _ in range(5 * 60):
        scheduler.schedule(2 - sum(scheduler.state(name) == State.RUNNING for name in ran))
        for name in ran:
            ran[name] += scheduler.state(name) == State.RUNNING
    assert sum(ran.values()) == 2 * 5 * 60
    assert min(ran.values()) >= 0.8 * max(ran.values())

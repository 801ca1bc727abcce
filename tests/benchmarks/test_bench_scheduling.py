"""Hot paths of the scheduler, at 256 running of 1,256 sequences."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest

from kvswitch.scheduling import (
    Decision,
    InversionMeter,
    PriorityScheduler,
    PriorityTrace,
    TracePolicy,
)

RUNNING, OTHERS = 256, 1000
BLOCKS = 64 * RUNNING
Benchmark = Callable[..., Any]


class Full:
    """A scheduler with all slots taken, and the pool it decides about."""

    def __init__(self, kind: Callable[..., PriorityTrace], epoch: int) -> None:
        self.scheduler = PriorityScheduler(
            TracePolicy(kind(0, sequences=RUNNING + OTHERS + 1, epochs=20)),
            blocks=BLOCKS,
            slots=RUNNING,
            epoch=epoch,
            quantum=0,
        )
        self.held: dict[Hashable, int] = {}
        for i in range(RUNNING + OTHERS):
            self.scheduler.add(i, need=need(i), index=i, cost=need(i), swapped=i % 3 > 0)
        self.carry_out(self.scheduler.schedule(BLOCKS))
        assert len(self.held) == RUNNING

    @property
    def free(self) -> int:
        return BLOCKS - sum(self.held.values())

    def carry_out(self, decision: Decision) -> None:
        for i in decision.preempt:
            del self.held[i]
        self.held |= {i: need(i) for i in decision.resume + decision.admit}


def need(i: Hashable) -> int:
    assert isinstance(i, int)
    return 20 + i % 60


@pytest.fixture
def full() -> Full:
    return Full(PriorityTrace.random, epoch=10**9)


def test_bench_schedule_when_nothing_changed(benchmark: Benchmark, full: Full) -> None:
    assert benchmark(full.scheduler.schedule, full.free) == Decision()


@pytest.mark.parametrize("kind", [PriorityTrace.random, PriorityTrace.markov])
def test_bench_schedule_at_an_epoch(benchmark: Any, kind: Callable[..., PriorityTrace]) -> None:
    full = Full(kind, epoch=1)
    decisions: list[Decision] = []

    def setup() -> tuple[tuple[int], dict[str, int]]:
        if decisions:
            full.carry_out(decisions[-1])
        return (full.free,), {}

    benchmark.pedantic(
        lambda free: decisions.append(full.scheduler.schedule(free)), setup=setup, rounds=200
    )
    switches = sum(len(decision.preempt) for decision in decisions) / len(decisions)
    benchmark.extra_info["preempted at an epoch"] = switches
    assert switches > 0


def test_bench_schedule_with_one_arrival(benchmark: Any, full: Full) -> None:
    scheduler, free = full.scheduler, full.free

    def setup() -> None:
        if "arrival" in scheduler:
            scheduler.remove("arrival")
        scheduler.add("arrival", need=need(0), index=0)

    benchmark.pedantic(lambda: scheduler.schedule(free), setup=setup, rounds=500)


def test_bench_schedule_with_one_departure(benchmark: Any, full: Full) -> None:
    decisions: list[Decision] = []

    def setup() -> tuple[tuple[int], dict[str, int]]:
        if decisions:
            full.carry_out(decisions[-1])
        gone = next(iter(full.held))
        full.scheduler.remove(gone)
        full.scheduler.add(gone, need=need(gone), index=0)  # keeps their number
        del full.held[gone]
        return (full.free,), {}

    benchmark.pedantic(
        lambda free: decisions.append(full.scheduler.schedule(free)), setup=setup, rounds=500
    )
    assert all(decision.resume or decision.admit for decision in decisions)


def test_bench_add_and_remove(benchmark: Benchmark, full: Full) -> None:
    def come_and_go() -> None:
        full.scheduler.add("arrival", need=need(0), index=0)
        full.scheduler.remove("arrival")

    benchmark(come_and_go)


def test_bench_update(benchmark: Benchmark, full: Full) -> None:
    i, held = next(iter(full.held.items()))
    benchmark(full.scheduler.update, i, held=held)


def test_bench_victim(benchmark: Benchmark, full: Full) -> None:
    assert benchmark(full.scheduler.victim) in full.held


def test_bench_inversion_meter_when_nothing_changed(benchmark: Benchmark, full: Full) -> None:
    benchmark(InversionMeter().observe, 0.01, full.scheduler)


def test_bench_inversion_meter_after_a_change(benchmark: Any, full: Full) -> None:
    meter = InversionMeter()

    def setup() -> None:
        full.scheduler.add("arrival", need=need(0), index=0)
        full.scheduler.remove("arrival")

    benchmark.pedantic(lambda: meter.observe(0.01, full.scheduler), setup=setup, rounds=500)

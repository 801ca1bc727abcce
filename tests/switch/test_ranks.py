"""Several workers: one planner's orders, carried out by all, and their reports made one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError, HostMemoryExhausted, InvalidTransition, OutOfBlocks
from kvswitch.messages import (
    Direction,
    Measurement,
    Observations,
    SwapOrders,
    decode_observations,
    decode_orders,
    encode,
)
from kvswitch.switch import RankReports, ReducedReports, SequenceState, SwapManager, SwapWorker
from kvswitch.transfer import CpuBackend, HostArena, TransferEngine, layout_of

RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
BLOCKS, HOST_BLOCKS, TOKENS, WIDTH = 24, 60, 4, 32


# -- merging reports -----------------------------------------------------------------------------


def test_a_transfer_has_ended_when_all_ranks_say_so() -> None:
    reports = RankReports(3)
    reports.add(0, Observations(completed=(1, 2)))
    reports.add(1, Observations(completed=(1,)))
    assert reports.merged() == Observations()
    reports.add(2, Observations(completed=(1,)))
    assert reports.merged().completed == (1,)
    reports.add(2, Observations(completed=(2,)))
    reports.add(1, Observations(completed=(2,)))
    assert reports.merged().completed == (2,)
    assert reports.merged() == Observations()


def test_a_transfer_that_failed_on_any_rank_has_failed_when_it_has_ended_on_all() -> None:
    reports = RankReports(2)
    reports.add(1, Observations(failed=(4,)))
    assert reports.merged() == Observations(), "rank 0 may still write it"
    reports.add(0, Observations(completed=(4,)))
    merged = reports.merged()
    assert (merged.completed, merged.failed) == ((), (4,))


def test_times_are_those_of_rank_0() -> None:
    reports = RankReports(2)
    fast, slow = Measurement(Direction.IN, 100, 0.1), Measurement(Direction.IN, 100, 0.9)
    reports.add(1, Observations(measurements=(slow,), step_seconds=2.0))
    assert reports.merged() == Observations()
    reports.add(0, Observations(measurements=(fast,), step_seconds=1.0))
    assert reports.merged() == Observations((), (), (fast,), 1.0)
    assert reports.merged() == Observations()


def test_a_report_that_cannot_be_is_refused() -> None:
    reports = RankReports(2)
    reports.add(0, Observations(completed=(1,)))
    for again in (
        Observations(completed=(2, 1)),
        Observations(failed=(1,)),
        Observations(completed=(3,), failed=(3,)),
    ):
        with pytest.raises(InvalidTransition, match=r"rank 0 has reported transfer \d twice"):
            reports.add(0, again)
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        reports.add(2, Observations())
    with pytest.raises(ConfigError, match="at least 1"):
        RankReports(0)
    reports.add(1, Observations(completed=(1, 2, 3)))
    assert reports.merged().completed == (1,)


# -- two workers ---------------------------------------------------------------------------------


class Rank:
    """A worker process, but for the process: it knows its own memory, and what it is sent."""

    def __init__(self, backend: Any) -> None:
        self.cache = np.full((BLOCKS, TOKENS, WIDTH), np.nan)
        layout = layout_of(self.cache)
        self.arena = HostArena(HOST_BLOCKS * layout.block_bytes)
        self.engine = TransferEngine(backend, layout, self.arena.layout(layout), window_bytes=4096)
        self.worker = SwapWorker(self.engine, backend)

    def obey(self, message: bytes) -> None:
        self.worker.submit(decode_orders(message))
        self.worker.wait()

    def report(self) -> Observations:
        return decode_observations(encode(self.worker.report(step_seconds=0.001)))

    def close(self) -> None:
        self.engine.close()
        self.arena.close()


class Engine:
    """A scheduler with a replica of the planner for each rank, as in SGLang."""

    def __init__(self, seed: int, ranks: list[Rank]) -> None:
        self.rng = random.Random(seed)
        self.ranks = ranks
        self.reports = RankReports(len(ranks))
        self.planners = [
            SwapManager(BLOCKS, HOST_BLOCKS, TOKENS, block_bytes=TOKENS * WIDTH * 8, first_group=3)
            for _ in ranks
        ]
        self.computed: dict[int, int] = {}

    @property
    def planner(self) -> SwapManager:
        return self.planners[0]

    def all(self, verb: str, *arguments: Any) -> Any:
        """Ask all planners; they say the same."""
        answers = []
        for planner in self.planners:
            try:
                answers.append(getattr(planner, verb)(*arguments))
            except (OutOfBlocks, HostMemoryExhausted) as error:
                answers.append(type(error))
        assert len({str(answer) for answer in answers}) == 1
        return answers[0]

    def decide(self) -> None:
        s = self.rng.randrange(6)
        if s not in self.planner:
            if self.all("allocate", s, self.rng.randrange(1, 40)) is not OutOfBlocks:
                self.computed[s] = 0
        elif self.planner.state(s) in (RUNNING, ARRIVING):
            self.all(self.rng.choice(["preempt", "preempt", "end_turn"]), s, self.computed[s])
        elif (back := self.all("resume", s, self.computed[s])) is not OutOfBlocks:
            self.computed[s] = back.tokens
        if self.rng.random() < 0.05 and s in self.planner:
            self.all("free", s)
            del self.computed[s]

    def gather(self) -> Observations:
        for number, rank in enumerate(self.ranks):
            self.reports.add(number, rank.report())
        return decode_observations(encode(self.reports.merged()))

    def step(self) -> None:
        seen = self.gather()
        orders: list[SwapOrders] = [planner.step(seen) for planner in self.planners]
        messages = {encode(order) for order in orders}
        assert len(messages) == 1
        message = messages.pop()
        for rank in self.ranks:
            rank.obey(message)
        if orders[0].wait:
            seen = self.gather()
            for planner in self.planners:
                planner.observe(seen)
        landed = {str(planner.landed()): planner for planner in self.planners}
        assert len(landed) == 1
        for s in self.computed:
            if self.planner.state(s) is RUNNING:
                self.computed[s] = min(self.computed[s], self.planner.tokens(s))
        self.forward()
        for planner in self.planners:
            planner.check_integrity()

    def forward(self) -> None:
        for s in self.planner.queue(RUNNING):
            assert isinstance(s, int)
            self.compare(s)
            places = np.arange(self.computed[s], self.planner.tokens(s))
            blocks = self.planner.table(s)[places // TOKENS]
            for number, rank in enumerate(self.ranks):
                rank.cache[blocks, places % TOKENS] = self.value(s, places, number)
            self.computed[s] = self.planner.tokens(s)
        free = self.planner.device.references(np.arange(BLOCKS, dtype=np.int32)) == 0
        for rank in self.ranks:
            rank.cache[free] = np.nan

    def compare(self, s: int) -> None:
        places = np.arange(self.computed[s])
        blocks = self.planner.table(s)[places // TOKENS]
        for number, rank in enumerate(self.ranks):
            found = rank.cache[blocks, places % TOKENS]
            assert (found == self.value(s, places, number)).all(), f"rank {number}, sequence {s}"

    @staticmethod
    def value(s: int, places: Any, rank: int) -> Any:
        return (1 + s + 100 * places + 0.5 * rank)[:, None]

    def finish(self) -> None:
        for s in list(self.computed):
            self.all("free", s)
        self.computed.clear()
        while self.planner.under_way:
            self.step()
        for planner in self.planners:
            assert planner.copies.num_leases() == len(planner.copies) == 0
            assert planner.device.free_blocks == BLOCKS
            assert planner.copies.pool.free_blocks == HOST_BLOCKS


@pytest.fixture
def make_ranks() -> Iterator[Callable[..., list[Rank]]]:
    made: list[Rank] = []

    def make(*backends: Any) -> list[Rank]:
        made.extend(Rank(backend) for backend in backends)
        return made

    yield make
    for rank in made:
        rank.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_slow_rank_is_waited_for(make_ranks: Any, seed: int) -> None:
    engine = Engine(seed, make_ranks(CpuBackend(), CpuBackend(bandwidth=10e6)))
    run(engine)
    stats = engine.planner.stats()
    assert stats.transfers_failed == stats.tokens_lost == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_failure_on_one_rank_is_a_failure_on_all(make_ranks: Any, tools: Any, seed: int) -> None:
    slow_and_failing = tools.UnrulyBackend(seed, 0.1, bandwidth=20e6)
    engine = Engine(seed, make_ranks(CpuBackend(), slow_and_failing))
    run(engine)
    assert engine.planner.stats().transfers_failed > 0


def run(engine: Engine) -> None:
    for _ in range(120):
        for _ in range(engine.rng.randrange(4)):
            engine.decide()
        engine.step()
    assert engine.planner.stats().resumptions > 20
    assert engine.planner.stats().blocks_in > 20
    engine.finish()


def test_without_merging_a_slow_rank_reads_garbage(
    make_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: going by rank 0 alone."""

    def gather_from_rank_0(self: Engine) -> Observations:
        seen = [rank.report() for rank in self.ranks]
        return seen[0]

    monkeypatch.setattr(Engine, "gather", gather_from_rank_0)
    monkeypatch.setattr(SwapWorker, "wait", lambda self: 0.0)
    engine = Engine(0, make_ranks(CpuBackend(), CpuBackend(bandwidth=5e5)))
    with pytest.raises(AssertionError, match="rank 1"):
        run(engine)


# -- a planner on every rank -----------------------------------------------------------------------


def reduced(*steps: list[tuple[Observations, list[int]]]) -> list[list[Observations]]:
    """What every rank is told in each step, where `steps` say what each has seen."""
    ranks = len(steps[0])
    numbers: list[Any] = [None] * ranks
    barrier = threading.Barrier(ranks, timeout=20)

    def minimum(rank: int) -> Callable[[Any], Any]:
        def reduce(values: Any) -> Any:
            numbers[rank] = values
            barrier.wait()
            least = np.min(np.stack(numbers), axis=0)
            barrier.wait()
            return least

        return reduce

    def work(rank: int) -> list[Observations]:
        reports = ReducedReports(rank, ranks, minimum(rank))
        return [reports.reduce(*step[rank]) for step in steps]

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(work, range(ranks)))


def test_all_planners_are_told_the_same() -> None:
    fast, slow = Measurement(Direction.IN, 100, 0.1), Measurement(Direction.IN, 100, 0.9)
    told = reduced(
        [
            (Observations((1,), (), (fast,), 0.5), [1, 2]),
            (Observations((), (2,), (slow,), 0.7), [1, 2]),
        ],
        [(Observations(), [1, 2]), (Observations((1,)), [1, 2])],
        [(Observations((2,)), [2]), (Observations(), [2])],
    )
    assert told[0] == told[1]
    first, second, third = told[0]
    assert first == Observations((), (), (fast,), 0.5), "no transfer has ended on both"
    assert (second.completed, second.failed) == ((1,), ())
    assert (third.completed, third.failed) == ((), (2,)), "it failed on one of them"


def test_a_lone_rank_reduces_nothing() -> None:
    def never(values: Any) -> Any:
        raise AssertionError("nobody to reduce with")

    report = Observations((1,), (2,), (), 0.1)
    assert ReducedReports(0, 1, never).reduce(report, [1, 2]) is report


def test_there_must_be_such_a_rank() -> None:
    with pytest.raises(ConfigError, match="rank 2 of 2"):
        ReducedReports(2, 2, lambda values: values)

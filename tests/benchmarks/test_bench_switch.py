"""Switching: what the planner and the facade cost an iteration with 256 running sequences.

No bytes worth mentioning are moved: this is the price of deciding, not that of copying.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import pytest

from kvswitch import KVSwitch
from kvswitch.messages import Observations
from kvswitch.switch import SequenceState, SwapManager

Benchmark: TypeAlias = Any  # pytest-benchmark's fixture has no types
RUNNING = 256
BLOCK_TOKENS = 16
BLOCKS = 60  # of each sequence, about
TOKENS = BLOCKS * BLOCK_TOKENS
ROUNDS = 300
NOTHING = Observations(step_seconds=0.01)


def start(allocate: Callable[..., Any]) -> list[int]:
    """256 sequences, of which 16 cross a block in each iteration; their tokens."""
    tokens = [TOKENS + i % BLOCK_TOKENS for i in range(RUNNING)]
    for sequence, n in enumerate(tokens):
        allocate(sequence, n, expected=n + 2 * ROUNDS)
    return tokens


def new_planner(**settings: Any) -> SwapManager:
    blocks = RUNNING * (BLOCKS + 2 * ROUNDS // BLOCK_TOKENS + 2)
    return SwapManager(blocks, 4 * blocks, BLOCK_TOKENS, **settings)


@pytest.fixture
def switch() -> Iterator[KVSwitch]:
    blocks = RUNNING * (BLOCKS + 2 * ROUNDS // BLOCK_TOKENS + 2)
    cache = np.zeros((blocks, BLOCK_TOKENS, 1), np.int8)
    with KVSwitch(cache, {"host_memory": 4 * cache.nbytes}, block_tokens=BLOCK_TOKENS) as made:
        yield made


# -- an iteration in which nobody is switched ----------------------------------------------------


@pytest.mark.benchmark(group="iteration, 256 running, 16 cross a block")
def test_bench_iteration_of_the_planner(benchmark: Benchmark) -> None:
    planner = new_planner()
    tokens = start(planner.allocate)

    def iterate() -> None:
        allocate = planner.allocate
        for sequence in range(RUNNING):
            tokens[sequence] += 1
            allocate(sequence, tokens[sequence])
        planner.step(NOTHING)
        planner.landed()

    benchmark.pedantic(iterate, rounds=ROUNDS, warmup_rounds=20)
    planner.check_integrity()


@pytest.mark.benchmark(group="iteration, 256 running, 16 cross a block")
def test_bench_iteration_of_the_facade(benchmark: Benchmark, switch: KVSwitch) -> None:
    tokens = start(switch.allocate)

    def iterate() -> None:
        allocate = switch.allocate
        for sequence in range(RUNNING):
            tokens[sequence] += 1
            allocate(sequence, tokens[sequence])
        switch.step()

    benchmark.pedantic(iterate, rounds=ROUNDS, warmup_rounds=20)
    switch.check_integrity()


@pytest.mark.benchmark(group="one call")
def test_bench_step_of_the_facade_with_nothing_to_do(
    benchmark: Benchmark, switch: KVSwitch
) -> None:
    start(switch.allocate)
    benchmark(switch.step)


@pytest.mark.benchmark(group="one call")
def test_bench_allocate_with_blocks_to_spare(benchmark: Benchmark, switch: KVSwitch) -> None:
    start(switch.allocate)
    benchmark(switch.allocate, 7, TOKENS)


@pytest.mark.benchmark(group="one call")
def test_bench_allocate_across_a_block(benchmark: Benchmark, switch: KVSwitch) -> None:
    tokens = start(switch.allocate)

    def grow() -> tuple[tuple[int, int], dict[str, Any]]:
        tokens[7] += BLOCK_TOKENS
        return (7, tokens[7]), {}

    benchmark.pedantic(switch.allocate, setup=grow, rounds=ROUNDS)


# -- switches ------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="switches of 60 blocks")
def test_bench_preempt_and_resume(benchmark: Benchmark) -> None:
    """There and back, with the reports that end both transfers."""
    planner = new_planner(strategy="async")
    start(planner.allocate)

    def switch_once() -> None:
        planner.preempt(5, TOKENS)
        planner.step(NOTHING)
        planner.step(Observations(completed=planner.under_way))
        planner.resume(5, TOKENS)
        planner.step(NOTHING)
        planner.step(Observations(completed=planner.under_way))
        planner.landed()
        planner.truncate(5, TOKENS - BLOCK_TOKENS)
        planner.allocate(5, TOKENS)  # so that there is something to send again

    benchmark(switch_once)
    assert planner.state(5) is SequenceState.RUNNING
    planner.check_integrity()


@pytest.mark.benchmark(group="switches of 60 blocks")
def test_bench_epoch_with_32_switches(benchmark: Benchmark) -> None:
    """A priority epoch: 16 leave and 16 others come back, beside all else in an iteration."""
    planner = new_planner(strategy="async", reuse=False)
    start(planner.allocate)
    inside, outside = list(range(RUNNING)), [RUNNING + i for i in range(16)]
    for sequence in outside:
        planner.allocate(sequence, TOKENS)
        planner.preempt(sequence)
    planner.step(NOTHING)
    planner.observe(Observations(completed=planner.under_way))

    def epoch() -> None:
        for _ in range(16):
            out, back = inside.pop(0), outside.pop(0)
            planner.preempt(out, TOKENS)
            planner.resume(back, TOKENS)
            inside.append(back)
            outside.append(out)
        for sequence in inside:
            planner.allocate(sequence, TOKENS)
        planner.step(NOTHING)

    def end() -> None:
        planner.observe(Observations(completed=planner.under_way))
        planner.landed()

    benchmark.pedantic(epoch, setup=end, rounds=100)
    planner.check_integrity()

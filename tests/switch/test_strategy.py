"""Whether to wait for swap-ins: the estimate, and modes that do not estimate."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswitch.messages import Direction, Measurement, Observations
from kvswitch.switch import Arrival, Strategy


def arrivals(*nbytes: float) -> list[Arrival]:
    return [Arrival(transfer, n) for transfer, n in enumerate(nbytes)]


def adaptive(bandwidth: int = 1000, step_seconds: float = 1.0) -> Strategy:
    """A link that moves `bandwidth` bytes a second beside iterations of `step_seconds`."""
    strategy = Strategy()
    strategy.observe([Measurement(Direction.IN, bandwidth, 1.0)], step_seconds)
    return strategy


@pytest.mark.parametrize(("mode", "waits"), [("async", 0), ("sync", 3), ("serial", 3)])
def test_forced_modes_do_what_they_say(mode: str, waits: int) -> None:
    strategy = Strategy(mode)  # type: ignore[arg-type]
    assert strategy.wait_for(arrivals(1, 10, 100), running=5) == waits
    strategy.observe([Measurement(Direction.IN, 1000, 1.0)], 1.0)
    assert strategy.wait_for(arrivals(1, 10, 100), running=5) == waits
    assert strategy.wait_for([], running=5) == 0


@pytest.mark.parametrize("mode", ["adaptive", "async"])
def test_where_nothing_else_can_run_the_first_is_waited_for(mode: str) -> None:
    strategy = Strategy(mode)  # type: ignore[arg-type]
    assert strategy.wait_for(arrivals(10**9, 10**9), running=0) == 1
    assert strategy.wait_for([], running=0) == 0


def test_many_short_requests_are_waited_for() -> None:
    """20 of them take a tenth of an iteration together; each would sit one out."""
    assert adaptive().wait_for(arrivals(*[5] * 20), running=10) == 20


def test_few_long_requests_are_not_waited_for() -> None:
    """One takes 5 iterations: waiting would cost 40 others 5 tokens each, to gain it 5."""
    assert adaptive().wait_for(arrivals(5000), running=40) == 0


def test_the_short_ones_before_a_long_one_are_waited_for() -> None:
    assert adaptive().wait_for(arrivals(5, 5, 5, 9000, 5), running=10) == 3


def test_without_measurements_nothing_is_waited_for() -> None:
    strategy = Strategy()
    assert strategy.wait_for(arrivals(1), running=5) == 0
    strategy.observe([], 1.0)
    assert strategy.wait_for(arrivals(1), running=5) == 0, "no bandwidth is known"
    assert strategy.bandwidth == 0
    other = Strategy()
    other.observe([Measurement(Direction.IN, 1000, 1.0)], None)
    assert other.wait_for(arrivals(1), running=5) == 0, "no iteration is known"
    assert other.step_seconds == 0


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=8),
    running=st.integers(1, 60),
    bandwidth=st.integers(1, 10_000),
)
def test_the_estimate_is_the_one_that_is_written_down(
    sizes: list[int], running: int, bandwidth: int
) -> None:
    step = 0.5

    def net(k: int) -> float:
        """Tokens gained less tokens lost by waiting for the first k."""
        lands = [sum(sizes[: i + 1]) / bandwidth for i in range(k)]
        cost = running * (lands[-1] if k else 0) / step
        return sum(max(1, ceil(t / step)) - lands[-1] / step for t in lands) - cost

    chosen = adaptive(bandwidth, step).wait_for(arrivals(*sizes), running)
    assert net(chosen) == pytest.approx(max(map(net, range(len(sizes) + 1))), abs=1e-6)


def test_only_recent_swap_ins_count() -> None:
    strategy = Strategy(window=4)
    for seconds in (100.0, 100.0, 1.0, 1.0, 1.0, 1.0):
        strategy.observe([Measurement(Direction.IN, 1000, seconds)], None)
    assert strategy.bandwidth == pytest.approx(1000)
    strategy.observe([Measurement(Direction.OUT, 10**9, 1.0)], None)
    strategy.observe([Measurement(Direction.IN, 10**9, 0.0)], None)
    assert strategy.bandwidth == pytest.approx(1000), "swap-outs and empty ones say nothing"


def test_a_single_long_pause_does_not_look_like_a_long_iteration() -> None:
    strategy = Strategy()
    for seconds in (0.1, 0.1, 0.1, 60.0, 0.1):
        strategy.observe([], seconds)
    assert strategy.step_seconds == 0.1


def test_link_time_that_went_into_one_swap_in_is_no_progress_of_the_next(
    make: Callable[..., Any],
) -> None:
    """A block takes a step. `b` waits in the link's queue until `a` has landed."""
    planner = make(block_bytes=1)
    planner.on_host("a", 12)
    planner.on_host("b", 12)
    planner.allocate("running", 4)
    a_block = Measurement(Direction.IN, nbytes=1, seconds=1.0)
    planner.observe(Observations(measurements=(a_block,), step_seconds=1.0))
    a, b = (planner.resume(name).transfer for name in "ab")
    assert [planner.orders().wait for _ in range(3)] == [(), (), ()]
    planner.end(a)
    assert planner.orders().wait == (), "all three blocks of b are still to come"
    assert planner.orders().wait == ()
    assert planner.orders().wait == ()
    assert planner.orders().wait == (b,), "none is, as it seems"
    planner.end(b)

"""The link: order, cancellation, and what copies cost."""

from __future__ import annotations

import numpy as np
import pytest

from kvswitch.messages import Direction, Transfer
from kvswitch.sim.cost import RooflineSteps
from kvswitch.sim.link import NEVER, Pricing, VirtualLink
from kvswitch.sim.profiles import load_profiles
from kvswitch.sim.run import Machine
from kvswitch.sim.systems import SYSTEMS


def moving(number: int, direction: Direction, *runs: int, after: tuple[int, ...] = ()) -> Transfer:
    rows = [[0, 0, blocks] for blocks in runs]
    return Transfer(number, direction, np.array(rows, np.int32), after)


def link(**settings: float | bool) -> VirtualLink:
    duplex = bool(settings.pop("duplex", True))
    pricing = Pricing(bandwidth=100.0, block_bytes=10, **settings)  # type: ignore[arg-type]
    return VirtualLink(pricing, duplex=duplex)  # 0.1 s a block


def test_each_direction_moves_in_order() -> None:
    it = link()
    for number, direction in enumerate((Direction.IN, Direction.IN, Direction.OUT)):
        it.submit(moving(number, direction, 10), now=1.0)
    assert it.next_end() == 2.0
    observed = it.advance(2.0, step_seconds=0.5)
    assert set(observed.completed) == {0, 2}
    assert [(m.nbytes, m.seconds) for m in observed.measurements] == [(100, 1.0), (100, 1.0)]
    assert observed.step_seconds == 0.5
    assert it.end_of([1]) == NEVER
    assert it.advance(3.0).completed == (1,)
    assert it.end_of([0, 1]) == 3.0
    assert it.seconds == {Direction.OUT: 1.0, Direction.IN: 2.0}


def test_without_duplex_both_directions_share_a_queue() -> None:
    it = link(duplex=False)
    it.submit(moving(0, Direction.IN, 10), now=0.0)
    it.submit(moving(1, Direction.OUT, 10), now=0.0)
    assert it.advance(1.0).completed == (0,)
    assert it.advance(2.0).completed == (1,)


def test_a_transfer_waits_for_what_comes_before_it() -> None:
    it = link()
    it.submit(moving(0, Direction.OUT, 10), now=0.0)
    it.submit(moving(1, Direction.IN, 10, after=(0,)), now=0.0)
    assert it.advance(1.9).completed == (0,)
    assert it.advance(2.0).completed == (1,)


def test_a_cancelled_transfer_stops_where_it_is_and_fails() -> None:
    it = link()
    for number in range(3):
        it.submit(moving(number, Direction.OUT, 10), now=0.0)
    it.cancel([0, 1], now=0.5)
    observed = it.advance(2.0)
    assert observed.failed == (0, 1)
    assert observed.completed == (2,)
    assert it.end_of([2]) == 1.5


def test_a_direction_is_busy_until_its_queue_is_empty() -> None:
    it = link()
    it.submit(moving(0, Direction.OUT, 10), now=0.0)
    it.submit(moving(1, Direction.OUT, 10), now=0.0)
    assert it.busy_seconds(Direction.OUT, now=0.5, seconds=1.0) == 1.0
    assert it.busy_seconds(Direction.OUT, now=1.8, seconds=1.0) == pytest.approx(0.2)
    assert it.busy_seconds(Direction.IN, now=0.5, seconds=1.0) == 0.0


def test_the_slower_of_dispatching_and_moving_sets_the_pace() -> None:
    transfer = moving(0, Direction.IN, 1, 4)
    # Two pieces of 0.05 s and two of 0.2 s, each 0.02 s more; dispatching one takes 0.1 s.
    priced = link(pieces=2, copy=0.02, dispatch=0.1).pricing
    assert priced.seconds(transfer) == pytest.approx(2 * 0.1 + 2 * 0.22)
    assert priced.copies(transfer) == 4
    assert priced.dispatch_seconds(transfer) == pytest.approx(0.4)


def test_without_groups_every_block_is_a_copy() -> None:
    transfer = moving(0, Direction.IN, 1, 4)
    priced = link(pieces=2, copy=0.02, dispatch=0.1, merge=False).pricing
    assert priced.copies(transfer) == 10
    assert priced.seconds(transfer) == pytest.approx(10 * 0.1)


def test_windows_leave_gaps() -> None:
    transfer = moving(0, Direction.IN, 10)
    assert link(window=40.0, gap=0.5).pricing.seconds(transfer) == pytest.approx(1.0 + 2 * 0.5)


@pytest.mark.parametrize(
    ("blocks", "operations", "seconds"), [(122_030, 13_076, 15.5), (58_187, 10_713, 6.7)]
)
def test_the_papers_swap_outs_take_about_as_long_as_it_says(
    blocks: int, operations: int, seconds: float
) -> None:
    """Table 1 was not used to choose the link's constants."""
    pricing = Machine.of("a10", "llama-8b").pricing(SYSTEMS["groups"])
    whole, rest = divmod(blocks, operations)
    runs = np.full((operations, 3), whole, np.int32)
    runs[:rest, 2] += 1
    assert pricing.seconds(Transfer(0, Direction.OUT, runs)) == pytest.approx(seconds, rel=0.25)


def test_iterations_take_what_weights_cache_and_prompts_take() -> None:
    profiles = load_profiles()
    engine = profiles.engine
    llama = profiles.model["llama-8b"]
    steps = RooflineSteps(profiles.gpu["a10"], llama, engine)
    one = steps.seconds(1, 100, [])
    weights = 2 * (llama.layer_parameters + llama.output_parameters) / (600e9 * 0.75)
    assert one == pytest.approx(weights + engine.step_overhead * 1e-3, rel=0.001)
    # Decoding costs memory bandwidth, prefilling costs compute, over all that comes before.
    assert steps.seconds(30, 30_000, []) - one == pytest.approx(30_000 * 131072 / 450e9, rel=0.01)
    chunk = steps.seconds(0, 0, [(512, 0)])
    assert chunk == pytest.approx(0.002 + 512 * 2 * 6.98e9 / 75e12, rel=0.01)
    assert steps.seconds(0, 0, [(512, 7000)]) > chunk + 0.005

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswitch.scheduling.target import NEVER, enough_for_another, exchange, take_greedily

needs = st.lists(st.integers(1, 6), max_size=7)
in_order = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0, 3])), max_size=7)


def naive_target(order: list[tuple[int, int]], capacity: int, slots: int) -> list[bool]:
    taken: list[bool] = []
    used = 0
    for need, margin in order:
        spare = margin if used else 0
        taken.append(sum(taken) < slots and used + need + spare <= capacity)
        used += need * taken[-1]
    return taken


def columns(order: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(order, np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@settings(deadline=None)
@given(in_order, st.integers(0, 30), st.integers(1, 5))
def test_whoever_fits_beside_the_higher_ones_is_taken(
    order: list[tuple[int, int]], capacity: int, slots: int
) -> None:
    taken = take_greedily(*columns(order), capacity, slots)
    assert taken.tolist() == naive_target(order, capacity, slots)


@settings(deadline=None)
@given(in_order, st.integers(0, 30), st.integers(1, 5))
def test_the_capacity_that_is_enough_for_another_target_is_the_least_one(
    order: list[tuple[int, int]], capacity: int, slots: int
) -> None:
    need, margin = columns(order)
    target = take_greedily(need, margin, capacity, slots)
    others = (
        more for more in range(capacity, 100) if naive_target(order, more, slots) != target.tolist()
    )
    assert enough_for_another(target, need, margin, slots) == next(others, NEVER)


@settings(deadline=None)
@given(needs, needs, st.integers(-8, 20), st.integers(0, 4))
def test_all_that_can_come_in_do_and_no_more_leave_than_must(
    incoming: list[int], leaving: list[int], room: int, places: int
) -> None:
    def fits(ins: int, outs: int) -> bool:
        given_back = room + sum(leaving[:outs])
        return sum(incoming[:ins]) <= given_back and ins <= places + outs

    ways = [
        (-ins, outs)
        for ins in range(len(incoming) + 1)
        for outs in range(len(leaving) + 1)
        if fits(ins, outs)
    ]
    # Where even all of them leave too little for those that stay, all leave.
    best = min(ways, default=(0, len(leaving)))
    ins, outs = exchange(
        np.array(incoming, np.int64), np.array(leaving, np.int64), room=room, places=places
    )
    assert (-ins, outs) == best

"""Whom the batch waits for, bad input, and purity. Blocks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from kvswitch.errors import (
    ConfigError,
    InvalidTransition,
    UnknownSequence,
)
from kvswitch.messages import Direction, Measurement, Observations, SwapOrders, Transfer
from kvswitch.switch import SequenceState, SwapManager

MakePlanner: TypeAlias = Callable[..., Any]
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
OUT, IN = Direction


def blocks_of(*transfers: Transfer) -> list[int]:
    return [transfer.num_blocks for transfer in transfers]


# -- Algorithm 1, step 4 ---------------------------------------------------------------------------


def arrive(planner: Any, *sequences: str) -> SwapOrders:
    for sequence in sequences:
        planner.on_host(sequence, 8)
    planner.allocate("running", 4)
    for sequence in sequences:
        planner.resume(sequence)
    return planner.orders()


def test_async_waits_for_no_swap_in(make: MakePlanner) -> None:
    orders = arrive(make(strategy="async"), "a", "b")
    assert len(orders.transfers) == 2
    assert orders.wait == ()


@pytest.mark.parametrize("strategy", ["sync", "serial"])
def test_sync_waits_for_all_swap_ins(make: MakePlanner, strategy: str) -> None:
    orders = arrive(make(strategy=strategy), "a", "b")
    assert orders.wait == tuple(transfer.id for transfer in orders.transfers)


def test_serial_waits_for_swap_outs_too(make: MakePlanner) -> None:
    planner = make(strategy="serial")
    planner.allocate("a", 8)
    planner.preempt("a")
    orders = planner.orders()
    assert orders.wait == (orders.transfers[0].id,)


@pytest.mark.parametrize("strategy", ["adaptive", "async"])
def test_where_nobody_else_can_run_the_first_to_arrive_is_waited_for(
    make: MakePlanner, strategy: str
) -> None:
    planner = make(strategy=strategy)
    for sequence in "ab":
        planner.on_host(sequence, 8)
    planner.resume("a")
    planner.resume("b")
    orders = planner.orders()
    assert orders.wait == (orders.transfers[0].id,)


def test_what_has_been_moved_meanwhile_need_not_be_waited_for(make: MakePlanner) -> None:
    """Two swap-ins of 11 blocks; the link moves 5 beside each iteration.

    It pays to wait for the last block of the first one, but not for the 11 behind it.
    """
    planner = make(device=60)
    for sequence in "ab":
        planner.on_host(sequence, 44)
    planner.allocate("runs", 4)
    measured = Measurement(Direction.IN, 5, 1.0)
    planner.observe(Observations(measurements=(measured,), step_seconds=1.0))
    first, _ = planner.resume("a").transfer, planner.resume("b").transfer
    assert [planner.orders().wait for _ in range(3)] == [(), (), (first,)]


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("preempt", ()),
        ("resume", ()),
        ("end_turn", ()),
        ("free", ()),
        ("truncate", (3,)),
        ("fork", ("child", 3)),
        ("tag", ([],)),
        ("set_priority", (1.0,)),
        ("state", ()),
        ("tokens", ()),
        ("table", ()),
    ],
)
def test_unknown_sequences_are_refused(
    make: MakePlanner, verb: str, arguments: tuple[Any, ...]
) -> None:
    planner = make()
    planner.allocate("a", 8)
    planner.free("a")
    with pytest.raises(UnknownSequence, match="'a': it was never allocated, or has been freed"):
        getattr(planner, verb)("a", *arguments)


@pytest.mark.parametrize(
    ("state", "verb", "arguments", "message"),
    [
        (RUNNING, "resume", (), "RUNNING: there is nothing to resume"),
        (ARRIVING, "resume", (), "ARRIVING: there is nothing to resume"),
        (LEAVING, "preempt", (), "LEAVING: it has been preempted already"),
        (HOST, "preempt", (), "HOST: it has been preempted already"),
        (LEAVING, "allocate", (0,), "LEAVING: resume it before it can grow"),
        (HOST, "allocate", (4,), "HOST: resume it before it can grow"),
        (IDLE, "allocate", (4,), "IDLE: resume it before it can grow"),
        (IDLE, "end_turn", (), "IDLE: it has no turn to end"),
        (HOST, "end_turn", (), "HOST: it has no turn to end"),
        (LEAVING, "end_turn", (), "LEAVING: it has no turn to end"),
        (HOST, "fork", ("b", 4), "HOST: resume it before forking"),
        (LEAVING, "fork", ("b", 4), "LEAVING: resume it before forking"),
        (ARRIVING, "fork", ("b", 4), "ARRIVING: resume it before forking"),
        (RUNNING, "fork", ("a", 4), "'a' exists already"),
        (RUNNING, "preempt", (9,), "cannot have computed 9 tokens: its blocks hold 8"),
        (RUNNING, "end_turn", (9,), "cannot have computed 9 tokens: its blocks hold 8"),
        (RUNNING, "allocate", (-1,), "cannot allocate -1"),
        (RUNNING, "preempt", (-1,), "cannot have computed -1"),
        (ARRIVING, "preempt", (-1,), "cannot have computed -1"),
        (HOST, "resume", (-1,), "with -1 tokens"),
        (RUNNING, "truncate", (-1,), "cannot truncate 'a' to -1"),
        (RUNNING, "fork", ("b", -1), "cannot fork -1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make: MakePlanner, state: SequenceState, verb: str, arguments: tuple[Any, ...], message: str
) -> None:
    planner = make()
    if state in (HOST, ARRIVING):
        planner.on_host("a", 8)
    else:
        planner.allocate("a", 8)
    if state is ARRIVING:
        planner.resume("a")
    elif state is LEAVING:
        planner.preempt("a")
    elif state is IDLE:
        planner.end_turn("a")
    assert planner.state("a") is state
    with pytest.raises(InvalidTransition, match=message):
        getattr(planner, verb)("a", *arguments)
    assert planner.state("a") is state
    assert planner.tokens("a") == 8
    planner.check_integrity()


def test_transfers_are_reported_once(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 8)
    planner.allocate("b", 8)
    planner.preempt("a")
    planner.preempt("b")
    planner.orders()
    a, b = planner.under_way
    planner.end(a)
    with pytest.raises(InvalidTransition, match=f"transfer {a} cannot have ended"):
        planner.observe(Observations(completed=(b, a)))
    assert planner.state("b") is LEAVING, "nothing of that report counts"
    with pytest.raises(InvalidTransition, match="transfer 77 cannot have ended"):
        planner.observe(Observations(failed=(77,)))


def test_what_failed_on_any_rank_has_failed(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 8)
    planner.preempt("a")
    planner.orders()
    planner.observe(Observations(completed=(0,), failed=(0,)))
    assert planner.copies.valid("a") == 0


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ((0, 4, 4), {}),
        ((4, 0, 4), {}),
        ((4, 4, 0), {}),
        ((4, 4, 4), {"block_bytes": 0}),
        ((4, 4, 4), {"first_group": 0}),
        ((4, 4, 4), {"headroom": 1.5}),
    ],
)
def test_sizes_that_cannot_work_are_refused(
    make: MakePlanner, sizes: tuple[int, int, int], settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError):
        SwapManager(*sizes, **settings)


# -- purity ----------------------------------------------------------------------------------------


def test_the_same_inputs_give_the_same_orders(make: MakePlanner) -> None:
    def drive() -> list[Any]:
        planner = make(host=8)
        log: list[Any] = []
        for i in range(40):
            name = f"s{i % 5}"
            if name not in planner:
                planner.allocate(name, 4 + 4 * (i % 3))
            elif planner.state(name) in (RUNNING, ARRIVING):
                planner.preempt(name) if i % 2 else planner.end_turn(name)
            elif planner.available_blocks() >= 3:
                planner.resume(name)
            orders = planner.orders()
            log.append(
                [(t.id, t.direction, t.runs.tolist(), t.after) for t in orders.transfers]
                + [orders.cancel, orders.wait]
            )
            if i % 3 == 0:
                planner.end(*planner.under_way)
        return log

    assert drive() == drive()

"""Shared blocks, and what the host can hold. Blocks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from kvswitch.errors import (
    HostMemoryExhausted,
)
from kvswitch.messages import Direction, Transfer
from kvswitch.switch import Resumption, SequenceState

MakePlanner: TypeAlias = Callable[..., Any]
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
OUT, IN = Direction


def blocks_of(*transfers: Transfer) -> list[int]:
    return [transfer.num_blocks for transfer in transfers]


# -- sharing ---------------------------------------------------------------------------------------


def test_shared_blocks_go_out_once(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 18)
    assert planner.fork("a", "b", 18) == 16
    assert planner.table("b").tolist() == planner.table("a")[:4].tolist()
    planner.allocate("b", 20)
    planner.preempt("a")
    planner.end_all()
    planner.preempt("b")
    (out,) = planner.orders().transfers
    assert blocks_of(out) == [1]
    planner.end_all()
    assert planner.copies.pool.free_blocks == 60 - 6
    assert planner.resume("b").tokens == 20


def leave_together(planner: Any) -> Transfer:
    """`a` and `b` share 16 tokens and leave in one step; the transfer that both wait for."""
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.allocate("b", 20)
    planner.preempt("a")
    planner.preempt("b")
    both, rest = planner.orders().transfers
    assert blocks_of(both, rest) == [4, 1]
    return both


def test_shared_blocks_go_out_once_even_if_all_leave_at_once(make: MakePlanner) -> None:
    planner = make()
    leave_together(planner)
    assert planner.state("b") is LEAVING
    planner.end_all()
    assert planner.copies.pool.free_blocks == 60 - 5
    assert planner.device.free_blocks == 12
    assert planner.resume("a").tokens == 16
    assert planner.resume("b").tokens == 20
    assert planner.stats().blocks_spared == 4


def test_who_follows_a_transfer_comes_back_with_its_blocks(make: MakePlanner) -> None:
    planner = make()
    leave_together(planner)
    assert planner.resume("b") == Resumption(20, None), "all of it is still there"
    assert planner.resume("a") == Resumption(16, None)
    assert planner.table("a").tolist() == planner.table("b").tolist()[:4]
    planner.end_all()


def test_a_transfer_that_somebody_follows_is_not_cancelled(make: MakePlanner) -> None:
    planner = make()
    both = leave_together(planner)
    planner.free("a")
    assert planner.orders().cancel == ()
    planner.end(both.id)
    planner.end_all()
    assert planner.resume("b").tokens == 20


def test_who_follows_a_transfer_may_go(make: MakePlanner) -> None:
    planner = make()
    both = leave_together(planner)
    planner.free("b")
    planner.end(both.id)
    planner.end_all()
    assert planner.resume("a").tokens == 16


def test_a_failure_costs_all_who_follow_their_share(make: MakePlanner) -> None:
    planner = make()
    both = leave_together(planner)
    planner.fail(both.id)
    planner.end_all()
    assert planner.stats().transfers_failed == 1
    assert planner.resume("a").tokens == 0
    assert planner.resume("b").tokens == 0, "its own block is of no use without those before"


def test_what_may_change_is_not_followed(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.tag("a", ["w", "x", "y", "z"])
    planner.preempt("a")
    planner.resume("a", 10)
    planner.allocate("a", 16)
    planner.allocate("b", 16)
    planner.tag("b", ["w", "x", "y", "z"])
    planner.preempt("b")
    first, second = planner.orders().transfers
    assert blocks_of(first, second) == [4, 2], "a writes its third and fourth block again"
    planner.end_all()


def test_what_others_follow_is_not_written(make: MakePlanner) -> None:
    planner = make()
    leave_together(planner)
    assert planner.resume("a", 14).tokens == 14
    a = planner.table("a").tolist()
    planner.resume("b")
    b = planner.table("b").tolist()
    assert a[:3] == b[:3]
    assert a[3] != b[3]
    planner.end_all()


def test_a_shared_block_is_never_cut_into(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    assert planner.truncate("a", 10) == 8
    assert planner.tokens("a") == 8
    planner.free("b")
    assert planner.truncate("a", 7) == 7, "not shared any more"


def test_naming_fewer_blocks_does_not_make_shared_ones_writable(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.tag("b", ["first"])
    assert planner.truncate("b", 10) == 8


def test_a_block_that_will_be_written_is_not_taken_back_while_others_use_it(
    make: MakePlanner,
) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.preempt("a", 14)
    planner.orders()
    assert planner.resume("a").tokens == 14
    a, b = planner.table("a").tolist(), planner.table("b").tolist()
    assert a[:3] == b[:3]
    assert a[3] != b[3]
    planner.end_all()
    assert planner.landed() == {"a": 14}


def test_fork_of_nothing(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    assert planner.fork("a", "b", 3) == 0
    assert planner.table("b").tolist() == []
    assert len(planner.allocate("b", 5)) == 2


def test_a_fork_has_its_parents_priority(make: MakePlanner) -> None:
    planner = make(host=4)
    planner.on_host("other", 16, priority=1)
    planner.allocate("a", 16)
    planner.set_priority("a", 2)
    planner.fork("a", "b", 16)
    planner.free("a")
    planner.preempt("b")
    planner.end_all()
    assert planner.copies.valid("b") == 16
    assert planner.copies.valid("other") == 0


def test_tagged_copies_are_adopted(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 14)
    planner.tag("a", ["x", "xy", "xyz"])
    planner.preempt("a")
    planner.end_all()
    planner.free("a")
    planner.allocate("b", 14)
    planner.tag("b", ["x", "xy", "other"])
    planner.preempt("b")
    assert blocks_of(*planner.orders().transfers) == [2]
    planner.end_all()
    assert planner.resume("b").tokens == 14


@pytest.mark.parametrize("how", ["truncate", "resume", "preempt", "end_turn"])
def test_what_is_rolled_back_loses_its_name(make: MakePlanner, how: str) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.tag("a", ["x", "xy", "xyz"])
    if how == "resume":
        planner.preempt("a")
        planner.resume("a", 6)
    elif how == "truncate":
        planner.truncate("a", 6)
    else:
        getattr(planner, how)("a", 6)
        planner.resume("a")
    planner.allocate("a", 12)  # recomputed, with other tokens
    planner.preempt("a")
    planner.end_all()
    planner.allocate("b", 12)
    planner.tag("b", ["x", "xy", "xyz"])
    planner.preempt("b")
    assert blocks_of(*planner.orders().transfers) == [2]


# -- host memory -----------------------------------------------------------------------------------


def test_preempt_without_any_host_memory_is_refused(make: MakePlanner) -> None:
    planner = make(host=4)
    planner.on_host("important", 16, priority=1)
    planner.allocate("a", 8)
    planner.tag("a", ["x", "xy"])
    owners = len(planner.copies)
    with pytest.raises(HostMemoryExhausted, match="more host memory"):
        planner.preempt("a", 6)
    assert planner.state("a") is RUNNING
    assert planner.queue(RUNNING)["a"].keys == ["x", "xy"]
    assert len(planner.copies) == owners
    assert planner.orders().transfers == ()
    planner.preempt("a", 6, copy=False)
    assert planner.state("a") is HOST
    assert planner.resume("a") == Resumption(0, None)
    assert planner.stats().tokens_lost == 6


def test_what_the_host_cannot_hold_is_recomputed(make: MakePlanner) -> None:
    planner = make(host=4)
    planner.on_host("important", 8, priority=1)
    planner.allocate("a", 16)
    planner.preempt("a")
    assert blocks_of(*planner.orders().transfers) == [2]
    planner.end_all()
    assert planner.resume("a").tokens == 8


def test_more_important_copies_contaminate_less_important_ones(make: MakePlanner) -> None:
    lost: list[tuple[Any, int]] = []
    planner = make(host=4, on_lost=lambda sequence, tokens: lost.append((sequence, tokens)))
    planner.on_host("a", 16, priority=0)
    planner.on_host("b", 8, priority=1)
    assert lost == [("a", 8)]
    assert planner.stats().contaminated_blocks == 2
    assert planner.resume("a").tokens == 8
    assert planner.stats().tokens_lost == 8


def test_a_copy_that_is_being_read_is_not_contaminated(make: MakePlanner) -> None:
    planner = make(host=4)
    planner.on_host("a", 16, priority=0)
    planner.resume("a")
    planner.orders()
    planner.allocate("b", 8)
    planner.set_priority("b", 1)
    with pytest.raises(HostMemoryExhausted):
        planner.preempt("b")
    planner.end_all()
    planner.preempt("b")
    assert planner.copies.valid("a") == 8


def test_equals_take_only_what_is_redundant_from_each_other(make: MakePlanner) -> None:
    planner = make(host=4)
    planner.on_host("a", 16)
    planner.allocate("b", 8)
    with pytest.raises(HostMemoryExhausted):
        planner.preempt("b")
    planner.resume("a")
    planner.end_all()
    planner.preempt("a")
    with pytest.raises(HostMemoryExhausted):
        planner.preempt("b")  # a's copies are the only ones, again
    planner.resume("a")
    planner.end_all()
    planner.preempt("b")
    assert planner.copies.valid("a") == 8, "a runs: its copies are redundant"


def test_without_reuse_the_host_forgets_what_has_come_back(make: MakePlanner) -> None:
    planner = make(reuse=False)
    planner.on_host("a", 16)
    planner.resume("a")
    planner.end_all()
    assert planner.copies.pool.free_blocks == 60
    planner.preempt("a")
    assert blocks_of(*planner.orders().transfers) == [4]
    planner.resume("a")  # takes all back
    planner.end_all()
    assert planner.copies.pool.free_blocks == 60
    planner.end_turn("a")
    planner.end_all()
    planner.resume("a")
    assert planner.copies.pool.free_blocks == 60


def test_without_swapping_nothing_is_ever_sent(make: MakePlanner) -> None:
    planner = make(swap=False)
    planner.allocate("a", 16)
    planner.preempt("a")
    assert planner.state("a") is HOST
    assert planner.orders().transfers == ()
    assert planner.resume("a") == Resumption(0, None)


def test_host_memory_need_not_hold_a_whole_sequence(make: MakePlanner) -> None:
    planner = make(host=1)
    planner.allocate("a", 16)
    planner.preempt("a")
    assert blocks_of(*planner.orders().transfers) == [1]
    planner.end_all()
    assert planner.resume("a").tokens == 4

"""Ended turns, who makes room for whom, and what is waited for. Blocks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from kvswitch.errors import (
    OutOfBlocks,
)
from kvswitch.messages import Direction, Runs, Transfer
from kvswitch.switch import Resumption, SequenceState, SwapManager

MakePlanner: TypeAlias = Callable[..., Any]
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
OUT, IN = Direction


def blocks_of(*transfers: Transfer) -> list[int]:
    return [transfer.num_blocks for transfer in transfers]


# -- end of turn -----------------------------------------------------------------------------------


def test_an_idle_sequence_keeps_its_blocks_until_somebody_needs_them(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 20, copied=True)
    assert planner.state("a") is IDLE
    assert planner.device.free_blocks == 7
    assert planner.available_blocks() == 12
    assert planner.resume("a") == Resumption(20, None)
    assert planner.available_blocks() == 7
    planner.end_turn("a")
    planner.allocate("b", 40)
    assert planner.state("a") is HOST, "nothing had to be sent"
    assert planner.stats().evictions == 1


def test_idle_sequences_go_out_ahead_of_need_one_at_a_time(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 8, copied=False)
    planner.idle("b", 8, copied=False)
    assert blocks_of(*planner.orders().transfers) == [2]
    assert planner.orders().transfers == ()
    planner.end(*planner.under_way)
    assert blocks_of(*planner.orders().transfers) == [2]
    planner.end(*planner.under_way)
    assert planner.orders().transfers == ()
    assert planner.state("a") is planner.state("b") is IDLE
    assert planner.stats().idle_copies == 2


def test_nothing_goes_out_ahead_of_need_beside_a_swap_out(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 8, copied=False)
    planner.allocate("b", 8)
    planner.preempt("b")
    (out,) = planner.orders().transfers
    planner.end(out.id)
    assert planner.state("b") is HOST
    assert len(planner.orders().transfers) == 1


@pytest.mark.parametrize("settings", [{"strategy": "serial"}, {"swap": False}])
def test_nothing_goes_out_ahead_of_need_where_that_is_pointless(
    make: MakePlanner, settings: dict[str, Any]
) -> None:
    planner = make(**settings)
    planner.idle("a", 8, copied=False)
    assert planner.orders().transfers == ()


def test_a_turn_that_goes_on_is_not_sent_ahead(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 8, copied=False)
    planner.resume("a")
    assert planner.orders().transfers == ()


def test_the_end_of_a_turn_drops_what_was_not_computed(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 20)
    planner.end_turn("a", 6)
    assert planner.available_blocks() == 12
    assert planner.device.free_blocks == 10
    assert planner.resume("a") == Resumption(6, None)


def test_resuming_an_idle_sequence_drops_what_was_not_accepted(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 20, copied=True)
    assert planner.resume("a", 9) == Resumption(9, None)
    assert len(planner.table("a")) == 3
    assert planner.copies.valid("a") == 9
    assert planner.available_blocks() == 9


def test_a_full_host_does_not_keep_idle_sequences_from_making_room(make: MakePlanner) -> None:
    planner = make(host=2)
    planner.on_host("important", 8, priority=1)
    planner.idle("a", 20, copied=False)
    planner.allocate("b", 48)
    assert planner.state("a") is HOST
    planner.free("b")
    assert planner.resume("a") == Resumption(0, None)
    assert planner.resume("important").tokens == 8


def test_idle_sequences_with_copies_leave_the_headroom_free(make: MakePlanner) -> None:
    planner = make(headroom=0.25)  # 3 of 12 blocks
    for name in "abc":
        planner.idle(name, 12, copied=True)
    assert planner.device.free_blocks == 3
    planner.allocate("new", 4)
    assert [planner.state(name) for name in "abc"] == [IDLE] * 3, "not before the step"
    planner.orders()
    assert [planner.state(name) for name in "abc"] == [HOST, IDLE, IDLE]
    assert planner.stats().evictions == 1


def test_nobody_is_sent_for_the_sake_of_the_headroom(make: MakePlanner) -> None:
    planner = make(headroom=0.25, strategy="serial")
    planner.idle("a", 40, copied=False)
    planner.orders()
    assert planner.state("a") is IDLE


# -- who makes room --------------------------------------------------------------------------------


def test_free_blocks_go_first(make: MakePlanner) -> None:
    planner = make()
    planner.idle("copied", 16, copied=True)
    planner.allocate("new", 32)
    assert planner.state("copied") is IDLE


def test_idle_sequences_with_copies_go_before_leaving_blocks_and_those_without(
    make: MakePlanner,
) -> None:
    planner = make()
    planner.idle("copied", 12, copied=True)
    planner.idle("uncopied", 12, copied=False)
    planner.allocate("leaving", 12)
    planner.preempt("leaving")
    planner.allocate("new", 24)  # 3 free, 3 more
    assert planner.state("copied") is HOST
    assert planner.state("uncopied") is IDLE
    assert planner.orders().wait == ()


def test_leaving_blocks_go_before_idle_sequences_that_must_be_sent(make: MakePlanner) -> None:
    planner = make()
    planner.idle("uncopied", 12, copied=False)
    planner.allocate("leaving", 12)
    planner.preempt("leaving")
    planner.allocate("new", 32)  # 6 free, 2 more
    assert planner.state("uncopied") is IDLE
    orders = planner.orders()
    assert orders.wait == (orders.transfers[0].id,)
    assert planner.stats().conflicts == 1


def test_of_equals_who_has_been_idle_longest_goes_first(make: MakePlanner) -> None:
    planner = make()
    for name in "abc":
        planner.idle(name, 12, copied=True)
    planner.resume("a")
    planner.end_turn("a")
    planner.allocate("new", 16)
    assert planner.state("b") is HOST
    assert planner.state("a") is planner.state("c") is IDLE


def test_no_more_leave_than_needed(make: MakePlanner) -> None:
    planner = make()
    for name in "abcd":
        planner.idle(name, 12, copied=True)
    planner.allocate("new", 20)
    assert [planner.state(name) for name in "abcd"] == [HOST, HOST, IDLE, IDLE]


def test_an_idle_sequence_that_would_free_nothing_stays(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.end_turn("b")
    planner.end_all()
    planner.idle("c", 12, copied=True)
    planner.allocate("new", 28)
    assert planner.state("b") is IDLE
    assert planner.state("c") is HOST


def test_blocks_shared_by_idle_sequences_are_promised_and_given(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.end_turn("a")
    planner.end_turn("b")
    assert planner.available_blocks() == 12
    assert len(planner.allocate("new", 48)) == 12
    assert planner.state("a") is not IDLE
    assert planner.state("b") is not IDLE


def test_blocks_shared_with_a_running_sequence_are_not_promised(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.fork("a", "b", 16)
    planner.end_turn("a")
    assert planner.available_blocks() == 8
    planner.free("b")
    assert planner.available_blocks() == 12


def test_a_block_that_two_swap_outs_read_is_promised_once(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 6, copied=False)
    planner.orders()
    planner.resume("a")
    planner.allocate("a", 8)
    planner.preempt("a")  # its second block is sent again
    planner.orders()
    assert len(planner.under_way) == 2
    assert planner.available_blocks() == 12
    planner.allocate("new", 48)
    assert planner.orders().wait == planner.under_way, "both read what is going to be written"


def test_headroom_is_left_out_unless_waived(make: MakePlanner) -> None:
    planner = SwapManager(100, 10, 4, headroom=0.06)
    assert planner.available_blocks() == 94
    assert planner.available_blocks(headroom=False) == 100
    planner.allocate("a", 97 * 4)
    assert planner.available_blocks() == 0
    assert planner.available_blocks(headroom=False) == 3


def test_growth_beyond_what_can_be_had_is_refused(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 40)
    with pytest.raises(OutOfBlocks, match=r"'b' needs 3 more device blocks, 2 of 12.*preempt a"):
        planner.allocate("b", 12)
    assert "b" not in planner
    with pytest.raises(OutOfBlocks, match="preempt a sequence"):
        planner.allocate("a", 52)
    assert len(planner.table("a")) == 10
    with pytest.raises(OutOfBlocks, match="can never fit"):
        planner.allocate("c", 52)


def test_resume_without_room_is_refused(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 16)
    planner.allocate("b", 40)
    with pytest.raises(OutOfBlocks, match="'a' needs 4 more device blocks, 2 of 12"):
        planner.resume("a", 13)
    assert planner.state("a") is HOST
    assert planner.copies.valid("a") == 16
    planner.free("b")
    assert planner.resume("a").tokens == 16


def test_making_room_for_a_resume_does_not_cost_it_its_own_copies(make: MakePlanner) -> None:
    """The idle one, of higher priority, needs host memory to leave, and the host is full."""
    planner = make(host=6)
    planner.on_host("a", 24, priority=0)
    planner.idle("b", 40, copied=False, priority=5)
    assert planner.resume("a").tokens == 24
    planner.end_all()
    assert planner.landed() == {"a": 24}
    assert planner.copies.valid("b") == 0


# -- conflicts -------------------------------------------------------------------------------------


def test_a_forward_waits_for_the_swap_outs_whose_blocks_it_writes(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 16)
    planner.allocate("b", 16)
    planner.preempt("a")
    planner.preempt("b")
    planner.allocate("c", 28)  # 4 free, 3 of a's: b's need not be waited for
    orders = planner.orders()
    assert orders.wait == (orders.transfers[0].id,)
    assert planner.orders().wait == (), "it has been waited for"


def test_a_forward_does_not_wait_for_what_has_ended_meanwhile(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 40)
    planner.preempt("a")
    planner.orders()
    planner.allocate("b", 40)
    planner.end(*planner.under_way)
    assert planner.orders().wait == ()


def ids_in(runs: Runs) -> set[int]:
    """Blocks of runs given as (start, count)."""
    return {block for start, count in runs.tolist() for block in range(start, start + count)}


def test_a_swap_in_comes_after_the_swap_outs_whose_blocks_it_writes(make: MakePlanner) -> None:
    planner = make(strategy="async")
    planner.on_host("a", 24)
    planner.allocate("b", 20)
    planner.allocate("c", 20)
    planner.preempt("b")
    planner.preempt("c")
    planner.allocate("keeps running", 4)
    planner.resume("a")  # more blocks than are free
    *outs, into = planner.orders().transfers
    written = ids_in(into.runs[:, 1:])
    assert into.after == tuple(out.id for out in outs if written & ids_in(out.runs[:, ::2]))
    assert into.after


def test_waits_point_to_lower_ids(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 24)
    for name in "bcd":
        planner.allocate(name, 16)
    for name in "bcd":
        planner.preempt(name)
    planner.resume("a")
    for transfer in planner.orders().transfers:
        assert all(earlier < transfer.id for earlier in transfer.after)

"""The planner, transition by transition. Blocks have 4 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from kvswitch.messages import Direction, Transfer
from kvswitch.switch import Resumption, SequenceState

MakePlanner: TypeAlias = Callable[..., Any]
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
OUT, IN = Direction


def blocks_of(*transfers: Transfer) -> list[int]:
    return [transfer.num_blocks for transfer in transfers]


# -- there and back --------------------------------------------------------------------------------


def test_a_sequence_goes_out_and_comes_back(make: MakePlanner) -> None:
    planner = make()
    table = planner.allocate("a", 10)
    assert planner.state("a") is RUNNING
    assert len(table) == 3

    planner.preempt("a")
    assert planner.state("a") is LEAVING
    assert planner.table("a").tolist() == []
    (out,) = planner.orders().transfers
    assert (out.direction, out.num_blocks, out.after) == (OUT, 3, ())
    assert out.runs[:, 0].tolist() == [table[0]]

    planner.end(out.id)
    assert planner.state("a") is HOST
    assert planner.device.free_blocks == 12

    assert planner.resume("a") == Resumption(10, out.id + 1)
    assert planner.state("a") is ARRIVING
    (into,) = planner.orders().transfers
    assert (into.direction, into.num_blocks, into.after) == (IN, 3, ())
    assert into.runs[:, 0].tolist() == out.runs[:, 1].tolist()
    assert planner.landed() == {}

    planner.end(into.id)
    assert planner.state("a") is RUNNING
    assert planner.landed() == {"a": 10}
    assert planner.landed() == {}


def test_a_block_is_free_only_when_its_swap_out_has_ended(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    assert planner.device.free_blocks == 9
    assert planner.available_blocks() == 12, "it is to be had by waiting"
    planner.end_all()
    assert planner.device.free_blocks == 12


def test_only_what_the_host_lacks_goes_out(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 10)
    planner.resume("a")
    planner.end_all()
    planner.allocate("a", 17)
    planner.preempt("a", 14)
    # Blocks 0 and 1 are free at once; block 2 was half full, so it is sent again.
    assert planner.device.free_blocks == 12 - 2
    (out,) = planner.orders().transfers
    assert blocks_of(out) == [2]
    stats = planner.stats()
    assert (stats.blocks_out_full, stats.blocks_out_incremental) == (3, 2)
    assert stats.blocks_spared == 2
    assert stats.share_spared == 2 / 7


def test_nothing_goes_out_when_the_host_has_it_all(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 10)
    planner.resume("a")
    planner.end_all()
    planner.preempt("a")
    assert planner.state("a") is HOST
    assert planner.orders().transfers == ()


def test_only_computed_tokens_leave(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 20)
    planner.preempt("a", 5)
    (out,) = planner.orders().transfers
    assert blocks_of(out) == [2]
    assert planner.tokens("a") == 5
    planner.end_all()
    assert planner.resume("a").tokens == 5


def test_a_sequence_that_never_computed_anything_leaves_without_a_trace(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 20)
    planner.preempt("a", 0)
    assert planner.state("a") is HOST
    assert planner.orders().transfers == ()
    assert planner.resume("a") == Resumption(0, None)
    assert planner.state("a") is RUNNING


def test_resume_drops_what_has_not_been_accepted(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    assert planner.resume("a", 6).tokens == 6
    planner.end_all()
    assert planner.copies.valid("a") == 6
    assert len(planner.table("a")) == 2


def test_what_was_rolled_back_unnoticed_is_not_on_the_host_either(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.end_all()
    planner.preempt("a", 6)
    assert planner.copies.valid("a") == 6
    assert planner.resume("a").tokens == 6


# -- LEAVING: blocks taken back --------------------------------------------------------------------


def test_resume_while_leaving_takes_the_blocks_back_without_a_copy(make: MakePlanner) -> None:
    planner = make()
    table = planner.allocate("a", 12).tolist()
    planner.preempt("a")
    planner.orders()
    assert planner.resume("a") == Resumption(12, None)
    assert planner.state("a") is RUNNING
    assert planner.table("a").tolist() == table
    assert planner.available_blocks() == 9
    assert planner.stats().take_backs == 1
    # The copy that goes on is worth having: next time nothing is sent.
    planner.end_all()
    planner.preempt("a")
    assert planner.orders().transfers == ()


def test_what_was_taken_back_can_be_taken_back_again(make: MakePlanner) -> None:
    planner = make()
    table = planner.allocate("a", 12).tolist()
    for _ in range(3):
        planner.preempt("a")
        planner.orders()
        assert planner.available_blocks() == 12
        assert planner.resume("a").transfer is None
        assert planner.table("a").tolist() == table


def test_blocks_that_others_have_taken_are_loaded_after_the_swap_out(make: MakePlanner) -> None:
    planner = make(device=6)
    planner.allocate("a", 16)
    planner.preempt("a")  # 4 of 6 blocks
    planner.allocate("b", 16)  # 2 free ones, 2 of a's
    taken = set(planner.table("b").tolist())
    planner.preempt("b", 0)  # nothing was computed: 2 blocks are free, 2 are still a's swap-out's
    back = planner.resume("a")
    out, into = planner.orders().transfers
    assert back == Resumption(16, into.id)
    assert into.num_blocks == 2
    assert into.after == (out.id,)
    assert len(set(planner.table("a").tolist()) - taken) == 2


@pytest.mark.parametrize("blocks_taken", [1, 2, 3])
def test_what_is_loaded_from_a_failed_swap_out_is_not_valid(
    make: MakePlanner, blocks_taken: int
) -> None:
    planner = make(device=6)
    table = planner.allocate("a", 16).tolist()
    planner.preempt("a")
    planner.allocate("b", (2 + blocks_taken) * 4)
    gone = [table.index(b) for b in planner.table("b").tolist() if b in table]
    planner.free("b")
    assert planner.resume("a").tokens == 16
    out, into = planner.orders().transfers
    planner.fail(out.id)
    planner.end(into.id)  # it copied garbage
    assert planner.landed() == {"a": min(gone) * 4}
    assert planner.tokens("a") == min(gone) * 4
    assert planner.stats().tokens_lost == 16 - min(gone) * 4


def test_idle_copy_and_departure_are_both_taken_back(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 8, copied=False)
    planner.orders()  # sends it ahead
    planner.resume("a")
    table = planner.allocate("a", 15).tolist()
    planner.preempt("a")
    planner.orders()
    assert len(planner.under_way) == 2
    assert planner.resume("a") == Resumption(15, None)
    assert planner.table("a").tolist() == table


def test_a_swap_out_that_builds_on_a_failed_one_counts_for_nothing(make: MakePlanner) -> None:
    planner = make()
    planner.idle("a", 8, copied=False)
    planner.orders()
    planner.resume("a")
    planner.allocate("a", 16)
    planner.preempt("a")
    planner.orders()
    first, second = planner.under_way
    planner.fail(first)
    assert planner.resume("a") == Resumption(0, None)
    planner.end(second)
    assert planner.copies.valid("a") == 0


def test_a_failed_swap_out_costs_what_it_carried(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 8)
    planner.resume("a")
    planner.end_all()
    planner.allocate("a", 16)
    planner.preempt("a")
    planner.orders()
    planner.fail(*planner.under_way)
    assert planner.state("a") is HOST
    assert planner.resume("a").tokens == 8
    assert planner.stats().tokens_lost == 8
    assert planner.stats().transfers_failed == 1


def test_a_failed_swap_out_does_not_harm_who_took_the_blocks_back(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    planner.orders()
    planner.resume("a")
    planner.fail(*planner.under_way)
    assert planner.state("a") is RUNNING
    planner.preempt("a")
    assert blocks_of(*planner.orders().transfers) == [3]


# -- ARRIVING --------------------------------------------------------------------------------------


def test_preempting_an_arriving_sequence_copies_nothing(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    into = planner.resume("a").transfer
    assert into is not None
    planner.orders()
    planner.preempt("a")
    orders = planner.orders()
    assert orders.transfers == ()
    assert orders.cancel == (into,)
    assert planner.state("a") is HOST
    assert planner.available_blocks() == 9, "the swap-in may still write them"
    assert planner.available_blocks(returning=True) == 12
    planner.fail(into)  # as cancelled ones are reported
    assert planner.available_blocks() == 12
    assert planner.stats().transfers_failed == 0
    assert planner.landed() == {}
    assert planner.resume("a").tokens == 12


def test_a_swap_in_that_was_turned_back_does_not_land_in_the_next_one(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.orders()
    planner.preempt("a")
    second = planner.resume("a").transfer
    assert second is not None
    planner.orders()
    planner.end(second - 1)
    assert planner.state("a") is ARRIVING
    planner.end(second)
    assert planner.landed() == {"a": 12}


def test_turning_back_with_fewer_tokens_lowers_the_copy(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.preempt("a", 5)
    planner.end_all()
    assert planner.copies.valid("a") == 5
    assert planner.resume("a").tokens == 5


def test_an_arriving_sequence_may_grow(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    assert len(planner.allocate("a", 18)) == 5
    planner.end_all()
    assert planner.landed() == {"a": 12}
    assert planner.tokens("a") == 18


def test_a_failed_swap_in_is_not_tried_again(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.orders()
    planner.fail(*planner.under_way)
    assert planner.state("a") is RUNNING
    assert planner.landed() == {"a": 0}
    planner.preempt("a", 0)
    assert planner.resume("a") == Resumption(0, None)


def test_truncating_what_arrives_lowers_what_lands(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.orders()
    assert planner.truncate("a", 6) == 6
    planner.end(*planner.under_way)
    assert planner.landed() == {"a": 6}
    assert planner.copies.valid("a") == 6


def test_truncating_what_has_landed_lowers_what_is_reported(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.end_all()
    planner.truncate("a", 6)
    assert planner.landed() == {"a": 6}


@pytest.mark.parametrize("verb", ["preempt", "end_turn", "free"])
def test_who_has_gone_again_is_not_reported_as_landed(make: MakePlanner, verb: str) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.end_all()
    getattr(planner, verb)("a")
    assert planner.landed() == {}


@pytest.mark.parametrize("verb", ["preempt", "end_turn", "truncate", "fork"])
def test_what_the_engine_says_counts_only_as_far_as_it_can_know(
    make: MakePlanner, verb: str
) -> None:
    """The swap-in has failed, but the engine still goes by what `resume` had promised."""
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.orders()
    planner.fail(*planner.under_way)
    if verb == "fork":
        assert planner.fork("a", "b", 12) == 0
    else:
        getattr(planner, verb)("a", 12)
        assert planner.tokens("a") == 0


def test_ending_the_turn_of_an_arriving_sequence_turns_it_back(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.end_turn("a")
    assert planner.state("a") is HOST
    planner.end_all()
    assert planner.resume("a").tokens == 12


# -- free ------------------------------------------------------------------------------------------


def test_free_cancels_a_swap_out_and_holds_its_blocks_until_it_has_ended(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    planner.orders()
    planner.free("a")
    assert "a" not in planner
    assert planner.orders().cancel == planner.under_way
    assert planner.device.free_blocks == 9
    planner.fail(*planner.under_way)
    assert planner.device.free_blocks == 12
    assert planner.copies.pool.free_blocks == 60


def test_free_cancels_a_swap_in_and_holds_its_blocks_until_it_has_ended(make: MakePlanner) -> None:
    planner = make()
    planner.on_host("a", 12)
    planner.resume("a")
    planner.orders()
    planner.free("a")
    assert planner.orders().cancel == planner.under_way
    assert planner.available_blocks() == 9
    assert planner.copies.pool.free_blocks == 57
    planner.end(*planner.under_way)
    assert planner.available_blocks() == 12
    assert planner.copies.pool.free_blocks == 60
    assert planner.landed() == {}


def test_what_is_planned_and_freed_in_one_step_is_ordered_and_cancelled(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    planner.free("a")
    orders = planner.orders()
    assert [transfer.id for transfer in orders.transfers] == list(orders.cancel)


def test_an_ended_transfer_is_not_cancelled(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    planner.orders()
    planner.free("a")
    planner.end(*planner.under_way)
    assert planner.orders().cancel == ()


def test_an_id_may_be_used_again_while_its_old_transfers_are_under_way(make: MakePlanner) -> None:
    planner = make()
    planner.allocate("a", 12)
    planner.preempt("a")
    planner.orders()
    planner.free("a")
    planner.allocate("a", 8)
    planner.preempt("a")
    planner.orders()
    old, new = planner.under_way
    planner.end(old)
    assert planner.state("a") is LEAVING
    assert planner.copies.valid("a") == 0
    planner.end(new)
    assert planner.copies.valid("a") == 8

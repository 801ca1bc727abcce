"""Who loses host memory first when it is short (section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import pytest

from kvswitch.copies import HostCopies
from kvswitch.errors import HostMemoryExhausted

MakeCopies: TypeAlias = Callable[..., Any]


def test_free_memory_is_used_first(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("low", 64)
    copies.hold_copy("high", 96, priority=1)
    assert (copies.valid("low"), copies.lost, copies.contaminated_blocks) == (64, [], 0)


def test_tail_goes_before_head_and_what_is_left_stays_valid(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("low", 8 * 16 - 3)
    head = copies.table("low").tolist()[:5]
    copies.hold_copy("high", 5 * 16, priority=1)
    assert copies.lost == [("low", 5 * 16)]
    assert copies.table("low").tolist() == head
    assert (copies.valid("low"), copies.contaminated_blocks) == (5 * 16, 3)
    lease = copies.pin("low", 5 * 16)
    copies.release(lease)


def test_lowest_priority_loses_first(make_copies: MakeCopies) -> None:
    copies = make_copies(9)
    for owner, priority in (("two", 2), ("one", 1), ("three", 3)):
        copies.hold_copy(owner, 48, priority=priority)
    copies.hold_copy("high", 64, priority=4)
    assert copies.lost == [("one", 0), ("two", 32)]


def test_lower_priority_loses_even_if_another_copy_is_redundant(make_copies: MakeCopies) -> None:
    copies = make_copies(6)
    copies.hold_copy("redundant", 48, priority=2, resident=True)
    copies.hold_copy("only", 48, priority=1)
    copies.hold_copy("high", 16, priority=3)
    assert copies.lost == [("only", 32)]


def test_redundant_copies_go_before_only_ones(make_copies: MakeCopies) -> None:
    copies = make_copies(6)
    copies.hold_copy("only", 48)
    copies.hold_copy("redundant", 48, resident=True)
    copies.hold_copy("high", 64, priority=1)
    assert copies.lost == [("redundant", 0), ("only", 32)]


@pytest.mark.parametrize("use", ["begin", "pin", "adopt", "set_resident", "nothing"])
def test_least_recently_used_goes_first(make_copies: MakeCopies, use: str) -> None:
    copies = make_copies(7)
    copies.hold_copy("publisher", 16, priority=9)
    copies.publish("publisher", 0, "x")
    copies.hold_copy("first", 33)
    copies.hold_copy("second", 48)
    if use == "begin":
        copies.commit(copies.begin("first", 48))
    elif use == "pin":
        copies.release(copies.pin("first", 10))
    elif use == "adopt":
        copies.truncate("first", 0)
        copies.adopt("first", "x")
        copies.hold_copy("other", 48, priority=1)
    elif use == "set_resident":
        copies.set_resident("first", False)
    copies.hold_copy("high", 16, priority=2)
    assert copies.lost[0][0] == ("first" if use == "nothing" else "second")


def test_higher_priority_never_gives(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("high", 64, priority=1, resident=True)
    with pytest.raises(HostMemoryExhausted, match="give kvswitch more host memory"):
        copies.begin("low", 1)
    assert (copies.valid("high"), "low" in copies) == (64, False)


def test_equals_give_redundant_copies_only(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("only", 32)
    copies.hold_copy("redundant", 32, resident=True)
    fill = copies.begin("equal", 64)
    assert (len(fill.blocks), fill.tokens) == (2, 32), "as much as can be had"
    assert copies.lost == [("redundant", 0)]
    copies.commit(fill)
    assert (copies.valid("only"), copies.valid("equal")) == (32, 32)


def test_nobody_loses_to_itself(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 64, resident=True)
    with pytest.raises(HostMemoryExhausted):
        copies.begin("a", 80)
    assert (copies.valid("a"), copies.covered("a"), len(copies.table("a"))) == (64, 64, 4)


def test_a_partial_grant_still_completes_the_last_block(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 60)
    fill = copies.begin("a", 100)
    assert (fill.first, len(fill.blocks), fill.tokens) == (3, 1, 64)
    copies.commit(fill)
    assert copies.valid("a") == 64


def test_exhaustion_leaves_everything_as_it_was(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("older", 32, priority=1)
    copies.hold_copy("newer", 32, priority=1)
    copies.set_priority("poor", 0)
    for owner in ("poor", "stranger"):
        with pytest.raises(HostMemoryExhausted, match=f"'{owner}'"):
            copies.begin(owner, 64)
    with pytest.raises(HostMemoryExhausted):
        copies.begin("older", 48)
    assert ("stranger" in copies, len(copies.table("poor"))) == (False, 0)
    assert (copies.valid("older"), copies.valid("newer"), copies.lost) == (32, 32, [])
    copies.hold_copy("high", 16, priority=2)
    assert copies.lost == [("older", 16)], "failing was not using"


@pytest.mark.parametrize("lease", ["pin", "pending fill"])
def test_leased_blocks_are_not_taken(make_copies: MakeCopies, lease: str) -> None:
    copies = make_copies(6)
    copies.hold_copy("low", 48)
    copies.hold_copy("middle", 48, priority=1)
    if lease == "pin":
        pin = copies.pin("low", 20)
        copies.hold_copy("high", 32, priority=2)
        assert copies.lost == [("low", 32), ("middle", 32)], "the first two are being read"
        copies.release(pin)
    else:
        copies.truncate("low", 32)
        fill = copies.begin("low", 40)
        copies.hold_copy("high", 16, priority=2)
        assert copies.lost == [("middle", 32)], "nothing of it while its tail is being written"
        copies.commit(fill)
        assert copies.valid("low") == 40


def test_more_owners_than_are_looked_at_at_once(make_copies: MakeCopies) -> None:
    copies = make_copies(500)
    for owner in range(500):
        copies.hold_copy(owner, 16, priority=(owner * 37) % 500)
    copies.hold_copy("high", 300 * 16, priority=1000)
    assert [copies.valid(owner) for owner in range(500)] == [
        0 if (owner * 37) % 500 < 300 else 16 for owner in range(500)
    ]


# -- shared copies -------------------------------------------------------------------------------


def share(copies: HostCopies, first: Hashable, second: Hashable, blocks: int) -> None:
    for index in range(blocks):
        copies.publish(first, index, (first, index))
    copies.adopt(second, [(first, index) for index in range(blocks)])


def test_a_shared_copy_goes_in_the_order_of_its_highest_owner(make_copies: MakeCopies) -> None:
    copies = make_copies(6)
    copies.hold_copy("one", 48, priority=1)
    copies.set_priority("three", 3)
    share(copies, "one", "three", 2)
    copies.hold_copy("two", 48, priority=2)
    copies.hold_copy("high", 64, priority=4)
    assert copies.lost == [("one", 32), ("two", 0)]
    copies.hold_copy("high", 80, priority=4)
    assert sorted(copies.lost[2:]) == [("one", 16), ("three", 16)], "both lose it"
    assert copies.contaminated_blocks == 5, "a block, however many owners it has"


def test_a_shared_copy_stays_unless_all_its_owners_may_lose(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("low", 64)
    copies.set_priority("high", 2)
    share(copies, "low", "high", 2)
    copies.set_priority("middle", 1)
    fill = copies.begin("middle", 64)
    assert (len(fill.blocks), copies.lost) == (2, [("low", 32)])
    copies.commit(fill)
    assert copies.valid("high") == 32


def test_a_shared_copy_stays_while_an_owner_has_more_behind_it(make_copies: MakeCopies) -> None:
    copies = make_copies(5)
    copies.hold_copy("low", 32)
    copies.set_priority("lower", -1)
    share(copies, "low", "lower", 2)
    copies.hold_copy("lower", 64, priority=-1)
    pin = copies.pin("lower", 64)
    fill = copies.begin("equal", 64)
    assert (len(fill.blocks), copies.lost) == (1, []), "a swap-in reads it and what is behind it"
    copies.abort(fill)
    copies.release(pin)


def test_own_copies_before_a_shared_one_go_in_their_own_order(make_copies: MakeCopies) -> None:
    """`low` ends in a block of `high`'s; once that has gone, `low` is the lowest again."""
    copies = make_copies(5)
    copies.hold_copy("high", 48, priority=2)
    copies.hold_copy("low", 32, priority=1)
    copies.publish("high", 2, "z")
    assert copies.adopt("low", "xyz") == 48
    copies.hold_copy("taker", 32, priority=3)
    assert (copies.valid("low"), copies.valid("high")) == (16, 32)


@pytest.mark.parametrize(("pinned", "left"), [("low", (32, 16)), ("high", (16, 32))])
def test_own_copies_before_a_shared_one_stay_while_leased(
    make_copies: MakeCopies, pinned: str, left: tuple[int, int]
) -> None:
    copies = make_copies(5)
    copies.hold_copy("high", 48, priority=2)
    copies.hold_copy("low", 32, priority=1)
    copies.publish("high", 2, "z")
    copies.adopt("low", "xyz")
    lease = copies.pin(pinned, 32)
    copies.hold_copy("taker", 32, priority=3)
    assert (copies.valid("low"), copies.valid("high")) == left
    copies.release(lease)


def test_nobody_loses_to_itself_what_it_shares(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 64, resident=True)
    share(copies, "a", "equal", 4)
    copies.set_resident("equal", True)
    with pytest.raises(HostMemoryExhausted):
        copies.begin("a", 80)
    assert (copies.valid("a"), copies.valid("equal"), copies.lost) == (64, 64, [])


def test_a_new_owner_has_nothing_of_who_is_gone(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("gone", 16, priority=5, resident=True)
    copies.drop("gone")
    copies.commit(copies.begin("new", 64))
    with pytest.raises(HostMemoryExhausted):
        copies.begin("equal", 16)  # not redundant
    copies.hold_copy("high", 16, priority=1)
    assert copies.lost == [("new", 48)]


def test_many_owners_of_one_prompt_give_it_up_together(make_copies: MakeCopies) -> None:
    copies = make_copies(12)
    copies.hold_copy(0, 64)
    for owner in range(1, 100):
        share(copies, 0, owner, 4)
    copies.hold_copy("high", 10 * 16, priority=1)
    assert {copies.valid(owner) for owner in range(100)} == {32}
    assert sorted(copies.lost, key=str) == sorted(((o, 32) for o in range(100)), key=str)
    assert copies.contaminated_blocks == 2


def test_contaminated_content_is_found_until_it_is_given_out(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("low", 64)
    copies.publish_all("low", "wxyz")
    copies.hold_copy("high", 16, priority=1)
    assert copies.match("wxyz") == 3
    assert copies.adopt("low", "wxyz") == 48


# -- being told ----------------------------------------------------------------------------------


def test_a_listener_that_fails_costs_only_this_swap_out(make_copies: MakeCopies) -> None:
    def fail(owner: Hashable, left: int) -> None:
        raise RuntimeError(f"{owner} lost all but {left}")

    copies = make_copies(4, on_lost=fail)
    copies.hold_copy("low", 64)
    copies.set_priority("high", 1)
    with pytest.raises(RuntimeError, match="low lost all but 32"):
        copies.begin("high", 32)
    copies.check_integrity()
    assert (copies.valid("low"), copies.covered("high"), copies.num_leases()) == (32, 0, 0)
    copies.hold_copy("high", 32, priority=1)


def test_copies_without_a_listener(make_copies: MakeCopies) -> None:
    copies = make_copies(4, on_lost=None)
    copies.hold_copy("low", 64)
    copies.hold_copy("high", 32, priority=1)
    assert (copies.valid("low"), copies.contaminated_blocks) == (32, 2)

"""Swap-outs: what must be written, and from when it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest

from kvswitch.copies import HostCopies
from kvswitch.errors import (
    ConfigError,
    HostMemoryExhausted,
    IntegrityError,
    InvalidTransition,
    UnknownSequence,
)

MakeCopies: TypeAlias = Callable[..., Any]


def test_a_copy_is_valid_once_its_swap_out_has_arrived(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    fill = copies.begin("a", 37)
    assert (fill.first, len(fill.blocks), fill.tokens) == (0, 3, 37)
    assert (copies.valid("a"), copies.covered("a"), copies.num_leases()) == (0, 37, 1)
    copies.commit(fill)
    assert (copies.valid("a"), copies.covered("a"), copies.num_leases()) == (37, 37, 0)
    assert copies.table("a").tolist() == fill.blocks.tolist()


def test_the_next_swap_out_sends_only_what_the_host_lacks(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 37)
    fill = copies.begin("a", 70)
    assert fill.first == 2, "blocks 0 and 1 are there; block 2 has 5 of its 16 tokens"
    assert copies.table("a").tolist()[2:] == fill.blocks.tolist()
    assert len(fill.blocks) == 3
    copies.commit(fill)
    assert copies.valid("a") == 70


def test_nothing_is_sent_when_the_copy_is_complete(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 37)
    fill = copies.begin("a", 37)
    assert (len(fill.blocks), fill.tokens, copies.num_leases()) == (0, 37, 0)
    copies.commit(fill)
    assert copies.valid("a") == 37


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_the_overwritten_tail_is_invalid_until_its_fill_is_committed(
    make_copies: MakeCopies, end: str
) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 37)
    fill = copies.begin("a", 50)
    assert copies.valid("a") == 32, "block 2 is being overwritten"
    getattr(copies, end)(fill)
    assert copies.valid("a") == (50 if end == "commit" else 32)
    assert len(copies.table("a")) == (4 if end == "commit" else 2), "garbage is given back"


def test_the_next_increment_lies_right_behind_the_copy(make_copies: MakeCopies) -> None:
    """Section 3.3: room for the next turn is reserved, and kept while nobody needs it."""
    copies = make_copies(60, first_group=8)
    for owner in "ab":
        copies.hold_copy(owner, 2 * 16)
    for turn in range(2, 6):
        for owner in "ab":
            copies.hold_copy(owner, turn * 16 + 5)
    for owner in "ab":
        assert (np.diff(copies.table(owner)) == 1).all()


def test_reserved_room_is_given_to_whoever_needs_it(make_copies: MakeCopies) -> None:
    copies = make_copies(20, first_group=12)
    copies.hold_copy("a", 2 * 16)
    copies.hold_copy("b", 18 * 16)
    assert copies.lost == []
    assert len(copies.table("b")) == 18


# -- several fills under way -------------------------------------------------------------------


def test_fills_build_on_each_other_while_pending(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    one = copies.begin("a", 40)
    two = copies.begin("a", 60)
    assert two.first == 2
    assert not set(two.blocks.tolist()) & set(one.blocks.tolist()), "both write: not the same"
    assert copies.covered("a") == 60
    copies.commit(one)
    assert copies.valid("a") == 32, "the second rewrites the block of tokens 32 to 39"
    copies.commit(two)
    assert copies.valid("a") == 60


def test_a_fill_that_ends_early_counts_when_those_before_it_do(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    one, two = copies.begin("a", 32), copies.begin("a", 64)
    copies.commit(two)
    assert (copies.valid("a"), copies.covered("a")) == (0, 64)
    copies.check_integrity()
    assert copies.num_leases() == 1
    copies.commit(one)
    assert copies.valid("a") == 64


@pytest.mark.parametrize("committed_first", [False, True])
def test_what_is_built_on_an_aborted_fill_counts_for_nothing(
    make_copies: MakeCopies, committed_first: bool
) -> None:
    copies = make_copies(20)
    copies.hold_copy("a", 16)
    one, two = copies.begin("a", 32), copies.begin("a", 64)
    if committed_first:
        copies.commit(two)
    copies.abort(one)
    assert copies.covered("a") == 16, "not 64: blocks 2 and 3 can never be reached"
    if not committed_first:
        copies.commit(two)
    assert copies.valid("a") == 16
    assert len(copies.table("a")) == 1
    copies.hold_copy("b", 32)
    copies.publish("b", 1, "y")
    assert copies.adopt("a", "xy") == 32, "nothing is pending any more"


def test_a_copy_is_begun_again_where_it_broke_off(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    one, two = copies.begin("a", 32), copies.begin("a", 64)
    copies.abort(one)
    three = copies.begin("a", 64)
    assert (three.first, len(three.blocks)) == (0, 4)
    assert not set(three.blocks.tolist()) & set(two.blocks.tolist())
    copies.commit(two)
    assert copies.valid("a") == 0
    copies.commit(three)
    assert copies.valid("a") == 64


def test_an_aborted_later_fill_does_not_hurt_an_earlier_one(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    one, two = copies.begin("a", 32), copies.begin("a", 64)
    copies.abort(two)
    assert (copies.covered("a"), len(copies.table("a"))) == (32, 2)
    copies.commit(one)
    assert copies.valid("a") == 32


@pytest.mark.parametrize("ends", ["commit commit", "commit abort", "abort commit", "abort abort"])
def test_a_fill_ends_once(make_copies: MakeCopies, ends: str) -> None:
    copies = make_copies(20)
    first, second = ends.split()
    fill = copies.begin("a", 32)
    getattr(copies, first)(fill)
    with pytest.raises(InvalidTransition, match="already"):
        getattr(copies, second)(fill)
    assert fill.committed == (first == "commit")
    assert copies.valid("a") == (32 if first == "commit" else 0)


# -- changes while a fill is pending -------------------------------------------------------------


def test_truncation_lowers_what_a_pending_fill_will_make_valid(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    fill = copies.begin("a", 64)
    copies.truncate("a", 20)
    assert (fill.tokens, copies.covered("a"), len(copies.table("a"))) == (20, 20, 2)
    assert copies.pool.free_blocks == 16, "the transfer still writes all four"
    copies.commit(fill)
    assert (copies.valid("a"), copies.pool.free_blocks) == (20, 18)


def test_after_truncation_what_is_still_written_is_not_begun_again(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    old = copies.begin("a", 64)
    copies.truncate("a", 20)
    new = copies.begin("a", 64)
    assert new.first == 1
    assert not set(new.blocks.tolist()) & set(old.blocks.tolist())
    copies.commit(old)
    assert copies.valid("a") == 16
    copies.commit(new)
    assert copies.valid("a") == 64


def test_blocks_of_a_dropped_owner_come_free_when_its_fill_has_ended(
    make_copies: MakeCopies,
) -> None:
    copies = make_copies(4)
    fill = copies.begin("a", 64)
    copies.drop("a")
    assert "a" not in copies
    assert (copies.pool.free_blocks, copies.num_leases()) == (0, 1)
    with pytest.raises(HostMemoryExhausted):
        copies.begin("b", 1)
    copies.commit(fill)
    assert (copies.pool.free_blocks, copies.num_leases()) == (4, 0)


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_an_owner_that_comes_again_has_nothing_of_its_former_self(
    make_copies: MakeCopies, end: str
) -> None:
    copies = make_copies(10)
    one, two = copies.begin("a", 32), copies.begin("a", 64)
    copies.commit(two)
    copies.drop("a")
    assert copies.num_leases() == 1, "the second has ended, though it still waited for the first"
    copies.hold_copy("a", 20)
    again = copies.begin("a", 48)
    getattr(copies, end)(one)
    assert (copies.valid("a"), copies.covered("a")) == (16, 48)
    copies.commit(again)
    assert copies.valid("a") == 48


def test_invalidate_all_also_discounts_what_is_under_way(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    copies.hold_copy("a", 40)
    copies.publish_all("a", "xy")
    copies.hold_copy("gone", 32)
    copies.publish("gone", 0, "z")
    copies.drop("gone")
    lease, fill = copies.pin("a", 40), copies.begin("b", 40)
    copies.invalidate_all()
    assert (copies.valid("a"), copies.covered("b")) == (0, 0)
    assert (copies.match("xy"), copies.match("z"), copies.num_leases()) == (0, 0, 2)
    assert copies.pool.groups().cached == 0
    again = copies.begin("b", 40)
    assert not set(again.blocks.tolist()) & {*fill.blocks.tolist(), *lease.blocks.tolist()}
    copies.commit(fill)
    assert copies.valid("b") == 0
    copies.commit(again)
    assert copies.valid("b") == 40
    copies.release(lease)


# -- leases of swap-ins --------------------------------------------------------------------------


def test_a_pinned_block_is_replaced_not_overwritten(make_copies: MakeCopies) -> None:
    copies = make_copies(20)
    copies.hold_copy("a", 40)
    lease = copies.pin("a", 40)
    fill = copies.begin("a", 60)
    assert fill.first == 2
    assert not set(fill.blocks.tolist()) & set(lease.blocks.tolist())
    copies.commit(fill)
    assert copies.pool.free_blocks == 20 - 5
    copies.release(lease)
    assert copies.pool.free_blocks == 20 - 4


@pytest.mark.parametrize("change", ["drop", "truncate", "invalidate_all"])
def test_pinned_blocks_keep_their_bytes_whatever_happens(
    make_copies: MakeCopies, change: str
) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 64)
    lease = copies.pin("a", 64)
    {
        "drop": lambda: copies.drop("a"),
        "truncate": lambda: copies.truncate("a", 0),
        "invalidate_all": copies.invalidate_all,
    }[change]()
    with pytest.raises(HostMemoryExhausted):
        copies.begin("b", 1)
    copies.release(lease)
    assert copies.pool.free_blocks == 4


def test_what_a_pending_fill_brings_can_be_pinned(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    fill = copies.begin("a", 40)
    lease = copies.pin("a", 40)
    assert lease.blocks.tolist() == fill.blocks.tolist()
    copies.commit(fill)
    copies.release(lease)
    assert copies.valid("a") == 40


def test_a_lease_ends_once(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 40)
    lease = copies.pin("a", 20)
    copies.release(lease)
    with pytest.raises(InvalidTransition, match="already"):
        copies.release(lease)
    assert copies.valid("a") == 40


# -- mistakes ------------------------------------------------------------------------------------


def test_mistakes_are_named_and_change_nothing(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.hold_copy("a", 40)
    with pytest.raises(InvalidTransition, match="cannot copy -1 tokens of 'b'"):
        copies.begin("b", -1)
    with pytest.raises(InvalidTransition, match="cannot truncate 'a' to -1"):
        copies.truncate("a", -1)
    for tokens in (-1, 41):
        with pytest.raises(InvalidTransition, match=f"cannot pin {tokens} .* there are 40"):
            copies.pin("a", tokens)
    for call in (copies.table, copies.drop, lambda owner: copies.pin(owner, 0)):
        with pytest.raises(UnknownSequence, match="'b'"):
            call("b")
    assert (len(copies), "b" in copies, copies.valid("a")) == (1, False, 40)


def test_an_unknown_owner_has_nothing(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    copies.truncate("a", 10)
    copies.set_resident("a", True)
    assert (copies.valid("a"), copies.covered("a"), len(copies)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("num_blocks", "block_tokens", "first_group"), [(0, 16, 60), (10, 0, 60), (10, 16, 0)]
)
def test_sizes_that_cannot_be_are_refused(
    num_blocks: int, block_tokens: int, first_group: int
) -> None:
    with pytest.raises(ConfigError, match=r"at least 1|from 1"):
        HostCopies(num_blocks, block_tokens, first_group=first_group)


def test_integrity_check_finds_leaks_and_contradictions(make_copies: MakeCopies) -> None:
    copies = make_copies(8)
    copies.hold_copy("a", 40)
    copies.publish("a", 0, "x")
    entry = copies._owners.get("a")
    assert entry is not None
    copies.pool.hold(copies.table("a"))
    with pytest.raises(IntegrityError, match="references"):
        copies.check_integrity()
    copies.pool.release(copies.table("a"))
    entry.valid = 20
    with pytest.raises(IntegrityError, match="3 host blocks for 20 tokens"):
        copies.check_integrity()
    entry.valid = 40
    copies._keys._block["x"] += 1
    with pytest.raises(IntegrityError, match="content keys"):
        copies.check_integrity()
    copies._keys._block["x"] -= 1
    copies._keys._index[copies.table("a")[0]] = 3
    with pytest.raises(IntegrityError, match="another place"):
        copies.check_integrity()
    copies._keys._index[copies.table("a")[0]] = 0
    copies._owners.last_block[entry.row] += 1
    with pytest.raises(IntegrityError, match="last host block"):
        copies.check_integrity()
    copies._owners.last_block[entry.row] -= 1

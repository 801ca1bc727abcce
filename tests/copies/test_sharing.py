"""Copies that several owners share, found by content keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest

from kvswitch.errors import InvalidTransition, UnknownSequence

MakeCopies: TypeAlias = Callable[..., Any]


def test_published_copies_are_adopted_without_a_swap_out(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 40)
    copies.publish_all("a", "xy")
    assert copies.match("xyz") == 2
    assert copies.adopt("b", "xyz") == 32
    assert copies.table("b").tolist() == copies.table("a").tolist()[:2]
    assert copies.pool.free_blocks == 7
    fill = copies.begin("b", 50)
    assert fill.first == 2, "only the rest is sent"
    copies.commit(fill)


def test_only_full_committed_copies_are_published(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    fill = copies.begin("a", 40)
    with pytest.raises(InvalidTransition, match="not a full, committed one: 0 tokens"):
        copies.publish("a", 0, "x")
    copies.commit(fill)
    for index in (-1, 2):
        with pytest.raises(InvalidTransition, match="not a full, committed one: 40 tokens"):
            copies.publish("a", index, "x")
    with pytest.raises(UnknownSequence):
        copies.publish("b", 0, "x")
    assert copies.match("x") == 0


def test_content_is_published_once(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 16)
    copies.hold_copy("b", 16)
    assert copies.publish("a", 0, "x")
    assert copies.publish("a", 0, "x"), "the same again"
    assert not copies.publish("b", 0, "x"), "another copy has it"
    copies.adopt("c", "x")
    assert copies.table("c").tolist() == copies.table("a").tolist()


def test_a_block_has_its_latest_key_only(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 16)
    copies.publish("a", 0, "x")
    copies.publish("a", 0, "y")
    assert (copies.match("x"), copies.match("y")) == (0, 1)


def test_copies_of_who_is_gone_are_found_until_their_blocks_are_given_out(
    make_copies: MakeCopies,
) -> None:
    copies = make_copies(6)
    copies.hold_copy("a", 64)
    copies.publish_all("a", "wxyz")
    blocks = copies.table("a").tolist()
    copies.drop("a")
    assert copies.pool.free_blocks == 6, "they count as free"
    copies.hold_copy("b", 48)
    assert copies.match("wxyz") == 3, "two blocks were really free, the third was the tail's"
    assert copies.adopt("c", "wxyz") == 48
    assert copies.table("c").tolist() == blocks[:3]


def test_what_was_used_least_recently_is_given_out_first(make_copies: MakeCopies) -> None:
    copies = make_copies(4)
    for owner, keys in (("a", "wx"), ("b", "yz")):
        copies.hold_copy(owner, 32)
        copies.publish_all(owner, keys)
    copies.drop("b")
    copies.drop("a")
    copies.hold_copy("c", 32)
    assert (copies.match("wx"), copies.match("yz")) == (2, 0)


def test_content_in_room_reserved_for_others_is_adopted_too(make_copies: MakeCopies) -> None:
    """The pool may reserve freed blocks for an owner's growth; their content is still there."""
    copies = make_copies(200, first_group=60)
    for owner, blocks in (("long", 180), ("short", 20)):
        copies.hold_copy(owner, blocks * 16)
        for index in range(blocks):
            copies.publish(owner, index, (owner, index))
    copies.drop("short")
    copies.drop("long")
    copies.hold_copy("a", 16)
    reserved = copies.pool.groups().tails
    assert reserved > 5, "otherwise this shows nothing"
    for owner, blocks in (("long", 179), ("short", 20)):
        keys = [(owner, index) for index in range(blocks)]
        assert copies.match(keys) == blocks
        assert copies.adopt(owner, keys) == blocks * 16
    assert copies.pool.free_blocks == 0
    assert not set(copies.table("a").tolist()) & set(copies.table("short").tolist())


def test_an_overwritten_copy_loses_its_key(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 48)
    copies.publish_all("a", "xyz")
    copies.truncate("a", 40)
    assert copies.match("xyz") == 3, "block 2 still holds what its key says"
    fill = copies.begin("a", 48)
    assert fill.first == 2
    assert copies.match("xyz") == 2
    copies.commit(fill)
    assert copies.match("xyz") == 2, "other tokens may be in it now"


@pytest.mark.parametrize("who", ["a", "b"])
def test_a_shared_copy_is_replaced_not_overwritten(make_copies: MakeCopies, who: str) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 32)
    copies.publish_all("a", "xy")
    copies.adopt("b", "xy")
    shared = copies.table("a").tolist()
    copies.truncate(who, 20)
    fill = copies.begin(who, 32)
    assert fill.first == 1
    assert not set(fill.blocks.tolist()) & set(shared)
    assert copies.match("xy") == 2
    copies.commit(fill)
    other = "b" if who == "a" else "a"
    assert (copies.valid(other), copies.table(other).tolist()) == (32, shared)


def test_adoption_keeps_full_copies_and_replaces_the_partial_one(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 48)
    copies.publish_all("a", "xyz")
    copies.hold_copy("b", 20)
    own = copies.table("b").tolist()
    assert copies.adopt("b", "xyz") == 48
    assert copies.table("b").tolist() == own[:1] + copies.table("a").tolist()[1:]


def test_adoption_needs_no_key_for_what_the_owner_has(make_copies: MakeCopies) -> None:
    """Its own leading copies may never have been published: another copy had the key."""
    copies = make_copies(10)
    copies.hold_copy("a", 32)
    copies.publish("a", 1, "y")
    copies.hold_copy("b", 16)
    assert copies.match("xy") == 0
    assert copies.adopt("b", "xy") == 32


def test_nothing_is_adopted_while_a_fill_is_pending(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 32)
    copies.publish_all("a", "xy")
    fill = copies.begin("b", 32)
    assert copies.adopt("b", "xy") == 0
    copies.commit(fill)
    assert copies.valid("b") == 32


def test_nothing_to_adopt_creates_no_owner(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    assert copies.adopt("b", "xy") == 0
    assert copies.adopt("b", "") == 0
    assert "b" not in copies


def test_a_key_is_found_at_its_own_place_only(make_copies: MakeCopies) -> None:
    """KV depends on all tokens before it, so a key cannot be right anywhere else."""
    copies = make_copies(10)
    copies.hold_copy("a", 48)
    copies.publish_all("a", "xyz")
    assert [copies.match(keys) for keys in ("xx", "y", "xz", "xyz")] == [1, 0, 1, 3]
    assert copies.adopt("a", "xyzx") == 48
    assert copies.adopt("b", "xyx") == 32


def test_shared_blocks_are_freed_by_their_last_owner(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 32)
    copies.publish_all("a", "xy")
    for owner in "bcd":
        copies.adopt(owner, "xy")
    copies.drop("a")
    assert copies.adopt("e", "xy") == 32, "the publisher need not be among them"
    for owner, free in zip("bcde", (8, 8, 8, 10), strict=True):
        copies.drop(owner)
        copies.check_integrity()
        assert copies.pool.free_blocks == free
    assert copies.adopt("f", "xy") == 32


def test_pinned_content_of_who_is_gone_can_be_adopted(make_copies: MakeCopies) -> None:
    copies = make_copies(10)
    copies.hold_copy("a", 32)
    copies.publish_all("a", "xy")
    lease = copies.pin("a", 32)
    copies.drop("a")
    assert copies.adopt("b", "xy") == 32
    copies.drop("b")
    copies.release(lease)
    assert copies.adopt("c", "xy") == 32
    assert np.array_equal(copies.table("c"), lease.blocks)
    lease = copies.pin("c", 32)
    copies.drop("c")
    copies.release(lease)
    assert (copies.pool.free_blocks, copies.pool.groups().cached) == (10, 2)

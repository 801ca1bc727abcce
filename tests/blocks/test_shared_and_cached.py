"""Blocks with several owners, leases, and free blocks whose content is cached."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvswitch.blocks import BlockGroupPool, Groups
from kvswitch.errors import ConfigError, InvalidTransition, OutOfBlocks
from kvswitch.messages import BlockIds


def ids(*blocks: int) -> BlockIds:
    return np.array(blocks, np.int32)


def span(start: int, stop: int) -> BlockIds:
    return np.arange(start, stop, dtype=np.int32)


# --- shared blocks and leases ---


def test_attached_blocks_are_shared_until_the_last_owner_ends() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    pool.attach("b", pool.table("a")[:6])
    assert pool.references(span(0, 10)).tolist() == [2] * 6 + [1] * 4
    assert pool.free_blocks == 90
    pool.free("a")
    assert pool.table("b").tolist() == list(range(6))
    assert pool.free_blocks == 94
    pool.free("b")
    assert pool.free_blocks == 100
    pool.check_integrity()


def test_growth_after_a_shared_prefix_takes_blocks_of_its_own() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    pool.attach("b", pool.table("a")[:6])
    pool.allocate("b", 12)
    assert not set(pool.table("b")[6:]) & set(pool.table("a"))
    pool.truncate("b", 3)
    pool.allocate("b", 12)
    assert not set(pool.table("b")[3:]) & set(pool.table("a"))
    assert pool.table("a").tolist() == list(range(10)), "a has not noticed"
    pool.check_integrity()


def test_detached_blocks_stay_in_use_until_released() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    blocks = pool.detach("a")
    assert "a" not in pool
    assert pool.groups().tails == 0
    assert pool.free_blocks == 90
    pool.attach("a", blocks)  # taken back while a copy still reads them
    pool.release(blocks)
    assert pool.references(blocks).tolist() == [1] * 10
    pool.free("a")
    assert pool.free_blocks == 100
    pool.check_integrity()


def test_a_lease_keeps_blocks_of_a_freed_sequence() -> None:
    pool = BlockGroupPool(20)
    pool.allocate("a", 10)
    pool.hold(span(2, 5))
    pool.free("a")
    with pytest.raises(OutOfBlocks):
        pool.allocate("b", 18)
    pool.release(span(2, 5))
    pool.allocate("b", 18)
    pool.check_integrity()


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        (ids(3, 20), InvalidTransition, "not in use"),
        (ids(3, 100), ConfigError, "pool of 100"),
        (ids(-1, 3), ConfigError, "pool of 100"),
        (ids(4, 3, 4), ConfigError, "block 4 is named twice"),
        (np.zeros((1, 1), np.int32), ConfigError, "one dimension"),
    ],
)
def test_wrong_ids_change_nothing(blocks: BlockIds, error: type[Exception], message: str) -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    uses: list[Callable[[BlockIds], object]] = [pool.hold, pool.release]
    if error is ConfigError:
        uses += [pool.references, pool.forget_cached, lambda ids: pool.attach("b", ids)]
    for use in uses:
        with pytest.raises(error, match=message):
            use(blocks)
    assert pool.references(span(0, 10)).tolist() == [1] * 10
    assert pool.free_blocks == 90
    assert len(pool) == 1
    pool.check_integrity()


def test_what_is_reserved_for_growth_cannot_be_attached() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    assert pool.groups().tails
    with pytest.raises(InvalidTransition, match="reserved"):
        pool.attach("b", ids(9, 10))
    assert "b" not in pool
    assert pool.references(ids(9, 10)).tolist() == [1, 0]
    pool.check_integrity()


def test_a_table_cannot_name_a_block_twice() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    with pytest.raises(InvalidTransition, match="block 9 is already in the table of 'a'"):
        pool.attach("a", ids(9))
    pool.check_integrity()


def test_free_blocks_can_be_attached_from_the_middle_of_a_large_group() -> None:
    pool = BlockGroupPool(10_000)
    pool.attach("a", ids(9_000, 9_001, 4_000))
    assert pool.table("a").tolist() == [9_000, 9_001, 4_000]
    assert pool.groups().free == 3
    assert pool.groups().largest == 4_999
    pool.check_integrity()


@pytest.mark.parametrize("blocks", [-1, 11])
def test_truncate_to_a_size_the_table_does_not_have(blocks: int) -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    with pytest.raises(InvalidTransition, match="its table has 10"):
        pool.truncate("a", blocks)
    assert pool.size("a") == 10
    pool.check_integrity()


# --- cached content ---


def test_uncached_blocks_are_used_first_and_cached_ones_oldest_first() -> None:
    pool = BlockGroupPool(30)
    for i, sequence in enumerate("abc"):
        pool.allocate(sequence, 10, expected=10)
        assert pool.table(sequence)[0] == 10 * i
    pool.free("b", cached=True)
    pool.free("a", cached=True)
    pool.free("c")
    assert pool.groups() == Groups(free=1, largest=10, uncached=10, cached=20, tails=0)
    pool.allocate("d", 10, expected=10)
    assert pool.table("d").tolist() == list(range(20, 30))
    pool.allocate("e", 3, expected=3)
    assert pool.table("e").tolist() == [17, 18, 19], "oldest release, and of it the last blocks"
    pool.attach("a", span(0, 10))
    pool.attach("b", span(10, 17))
    assert pool.free_blocks == 0
    pool.check_integrity()


def test_cached_content_is_spared_while_other_blocks_suffice() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("all", 100)
    pool.detach("all")
    pool.release(np.r_[0:8, 20:25, 30:34].astype(np.int32))
    pool.release(span(40, 100), cached=True)
    pool.allocate("a", 8)
    assert pool.groups().cached == 60, "a group is large enough, even if there is no room behind"
    pool.allocate("b", 9, expected=9)
    assert pool.groups().cached == 60, "two groups are large enough together"
    pool.allocate("c", 3, expected=3)
    assert pool.groups().cached == 57
    pool.check_integrity()


def test_a_short_rest_of_a_run_is_given_up_with_it() -> None:
    """Ten blocks are needed: of a run of 13 all go, of one of 30 only ten."""
    for cached, left in ((13, 0), (30, 20)):
        pool = BlockGroupPool(100)
        pool.allocate("old", cached, expected=cached)
        pool.allocate("others", 100 - cached)
        pool.free("old", cached=True)
        pool.allocate("new", 10, expected=10)
        assert pool.groups().cached == left
        assert pool.table("new").tolist() == list(range(left, left + 10))
        pool.check_integrity()


def test_a_prefix_hit_makes_blocks_young_again() -> None:
    pool = BlockGroupPool(20)
    pool.allocate("a", 10, expected=10)
    pool.allocate("b", 10)
    pool.free("a", cached=True)
    pool.free("b", cached=True)
    pool.attach("a", span(0, 10))
    pool.free("a", cached=True)
    pool.allocate("c", 10, expected=10)
    assert sorted(pool.table("c")) == list(range(10, 20))
    pool.check_integrity()


def test_room_for_growth_costs_little_cached_content() -> None:
    pool = BlockGroupPool(1000)
    pool.allocate("a", 1000)
    pool.free("a", cached=True)
    pool.allocate("b", 10, expected=500)
    assert pool.groups().cached >= 1000 - 10 - 1000 // 10


def test_headroom_keeps_as_much_free_of_cached_content() -> None:
    pool = BlockGroupPool(1000, headroom=0.06)
    pool.allocate("a", 1000)
    pool.free("a", cached=True)
    pool.allocate("b", 10, expected=10)
    pool.allocate("b", 20, expected=20)
    assert pool.groups().uncached + pool.groups().tails >= 50


def test_forgotten_content_is_not_spared() -> None:
    pool = BlockGroupPool(20)
    pool.allocate("a", 20)
    pool.free("a", cached=True)
    pool.forget_cached(span(5, 10))
    pool.forget_cached(span(5, 10))
    assert pool.groups() == Groups(free=1, largest=5, uncached=5, cached=15, tails=0)
    pool.allocate("b", 5)
    assert pool.table("b").tolist() == list(range(5, 10))
    pool.check_integrity()


def test_blocks_in_reserved_room_can_be_had_once_the_reservation_ends() -> None:
    pool = BlockGroupPool(20, first_group=8)
    pool.allocate("a", 4)
    tail = np.array([5, 6], np.int32)
    with pytest.raises(InvalidTransition, match="reserved"):
        pool.attach("b", tail)
    pool.end_reservations(tail)
    pool.attach("b", tail)
    assert pool.table("b").tolist() == [5, 6]
    pool.check_integrity()
    pool.end_reservations(np.array([0, 5, 12], np.int32))  # in use, in use, free: nothing to end
    pool.check_integrity()

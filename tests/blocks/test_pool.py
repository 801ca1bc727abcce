"""What a sequence gets of a BlockGroupPool, one property at a time.

Blocks in several hands and cached content are in `test_shared_and_cached.py`;
`test_pool_model.py` tries everything in any order.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from kvswitch.blocks import BlockGroupPool, Groups
from kvswitch.errors import (
    ConfigError,
    IntegrityError,
    OutOfBlocks,
    UnknownSequence,
)
from kvswitch.messages import BlockIds


def span(start: int, stop: int) -> BlockIds:
    return np.arange(start, stop, dtype=np.int32)


def pool_with_free(num_blocks: int, *groups: range) -> BlockGroupPool:
    """Return a pool with all blocks in use but for the given groups."""
    pool = BlockGroupPool(num_blocks)
    pool.allocate("all", num_blocks)
    pool.detach("all")
    for group in groups:
        pool.release(span(group.start, group.stop))
    return pool


# --- the pool as a whole ---


def test_a_new_pool_is_one_free_group() -> None:
    pool = BlockGroupPool(100)
    assert pool.num_blocks == pool.free_blocks == 100
    assert pool.groups() == Groups(free=1, largest=100, uncached=100, cached=0, tails=0)
    assert len(pool) == 0
    assert "a" not in pool
    pool.check_integrity()


@pytest.mark.parametrize(
    ("num_blocks", "options", "named"),
    [
        (0, {}, "num_blocks"),
        (-1, {}, "num_blocks"),
        (2**31, {}, "num_blocks"),
        (10, {"first_group": 0}, "first_group"),
        (10, {"headroom": 1.0}, "headroom"),
        (10, {"headroom": -0.1}, "headroom"),
    ],
)
def test_settings_that_cannot_work_are_named(
    num_blocks: int, options: dict[str, float], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        BlockGroupPool(num_blocks, **options)  # type: ignore[arg-type]


def test_headroom_is_soft() -> None:
    pool = BlockGroupPool(100, headroom=0.06)
    assert pool.available() == 94
    assert pool.available(headroom=False) == 100
    pool.allocate("a", 97)
    assert pool.available() == 0
    assert pool.available(headroom=False) == 3
    pool.allocate("a", 100)
    assert pool.free_blocks == 0


# --- tables ---


def test_a_table_is_contiguous_where_it_can_be_and_grows_in_its_group() -> None:
    pool = BlockGroupPool(1000)
    pool.allocate("a", 10)
    pool.allocate("b", 10)
    for size in range(11, 40):
        pool.allocate("a", size)
        pool.allocate("b", size)
        assert len(pool.table("a")) == len(pool.table("b")) == size
    for sequence in "ab":
        table = pool.table(sequence)
        assert table.dtype == np.int32
        assert (np.diff(table) == 1).all()
        assert pool.size(sequence) == len(table) == 39
    pool.check_integrity()


def test_allocating_no_more_than_there_is_changes_nothing() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    table = pool.table("a")
    pool.allocate("a", 10)
    pool.allocate("a", 3)
    assert pool.table("a") is table, "it is cached until it changes"


def test_a_table_handed_out_is_read_only_and_never_changes() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10)
    before = pool.table("a")
    with pytest.raises(ValueError, match="read-only"):
        before[0] = 7
    copy = before.copy()
    pool.truncate("a", 4)
    pool.allocate("x", 3)
    assert pool.table("x")[0] == 4
    pool.allocate("a", 8)
    pool.allocate("a", 90)
    assert np.array_equal(before, copy)


def test_an_empty_sequence_exists() -> None:
    pool = BlockGroupPool(10)
    pool.allocate("a", 0)
    assert "a" in pool
    assert len(pool.table("a")) == 0
    pool.free("a")
    assert "a" not in pool
    pool.check_integrity()


def test_a_negative_size_is_refused() -> None:
    pool = BlockGroupPool(10)
    with pytest.raises(ConfigError, match="-1"):
        pool.allocate("a", -1)
    assert "a" not in pool


@pytest.mark.parametrize(
    "use",
    [
        lambda pool: pool.table("a"),
        lambda pool: pool.size("a"),
        lambda pool: pool.truncate("a", 0),
        lambda pool: pool.detach("a"),
        lambda pool: pool.free("a"),
    ],
)
def test_an_unknown_sequence_is_named(use: Callable[[BlockGroupPool], object]) -> None:
    with pytest.raises(UnknownSequence, match="'a'"):
        use(BlockGroupPool(10))


def test_out_of_blocks_leaves_everything_as_it_was() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 40)
    table, groups = pool.table("a"), pool.groups()
    with pytest.raises(OutOfBlocks, match="61 more blocks needed, 60 of 100 are free"):
        pool.allocate("a", 101)
    with pytest.raises(OutOfBlocks):
        pool.allocate("b", 61)
    assert pool.table("a") is table
    assert "b" not in pool
    assert pool.groups() == groups
    pool.check_integrity()


# --- where blocks come from ---


def test_the_smallest_group_that_suffices_is_taken_and_of_equals_the_first() -> None:
    pool = pool_with_free(100, range(0, 9), range(20, 25), range(30, 34), range(40, 45))
    pool.allocate("a", 5, expected=5)
    assert pool.table("a").tolist() == [20, 21, 22, 23, 24]
    pool.allocate("b", 5, expected=5)
    assert pool.table("b").tolist() == [40, 41, 42, 43, 44]
    pool.allocate("c", 5, expected=5)
    assert pool.table("c").tolist() == [0, 1, 2, 3, 4]
    pool.check_integrity()


def test_if_no_group_is_large_enough_pieces_are_few() -> None:
    pool = pool_with_free(100, range(0, 2), range(10, 17), range(20, 21), range(30, 34))
    pool.allocate("a", 12)
    assert pool.table("a").tolist() == [*range(10, 17), *range(30, 34), 0]
    pool.check_integrity()


def test_pieces_come_from_tails_where_those_are_larger_than_free_groups() -> None:
    pool = pool_with_free(200, range(0, 100), range(150, 160))
    pool.allocate("a", 50, expected=80)
    pool.allocate("b", 20, expected=20)
    assert pool.groups() == Groups(free=1, largest=10, uncached=10, cached=0, tails=30)
    pool.allocate("c", 12)
    assert pool.table("c").tolist() == [*range(65, 77)], "half of a tail, not a group of 10"
    pool.allocate("d", 20, expected=20)
    assert pool.table("d").tolist() == [*range(50, 65), *range(150, 155)]
    pool.allocate("e", 6)
    assert pool.table("e").tolist() == [*range(155, 160), 79], "a group, not a tail of 3"
    pool.check_integrity()


def test_a_sequence_goes_on_in_place_when_its_group_is_used_up() -> None:
    pool = BlockGroupPool(100)
    pool.allocate("a", 10, expected=11)
    pool.allocate("a", 11)
    assert pool.groups().tails == 0
    pool.allocate("a", 30)
    assert pool.table("a").tolist() == list(range(30))


def test_a_large_free_group_is_cut_in_three_to_leave_room_behind_a_neighbour() -> None:
    pool = BlockGroupPool(1000)
    pool.allocate("a", 10, expected=11)
    pool.allocate("b", 10)
    assert pool.groups().free == 2, "one in front of b, one behind"
    pool.allocate("a", 30)
    assert pool.table("a").tolist() == list(range(30))
    pool.check_integrity()


def test_unused_tails_are_taken_back_last_and_from_their_far_end() -> None:
    pool = pool_with_free(400, range(0, 200))
    pool.allocate("a", 20, expected=150)
    assert pool.groups().tails > 100
    pool.allocate("b", pool.groups().uncached)
    tails = pool.groups().tails
    assert tails == pool.free_blocks, "they count as free"
    pool.allocate("c", 10)
    pool.allocate("a", 20 + pool.groups().tails // 2)
    assert (np.diff(pool.table("a")) == 1).all(), "what is near was left to it"
    pool.allocate("d", pool.free_blocks)
    assert pool.free_blocks == 0
    pool.check_integrity()


def test_the_largest_tail_is_found_after_many_sequences_have_come_and_gone() -> None:
    pool = BlockGroupPool(100_000)
    for i in range(1000):
        pool.allocate(i, 5, expected=5 + i * 67 % 150)
        if i >= 150:
            pool.free(i - 150)
        assert len(pool._active._heap) <= 2 * 150 + 64, "ended groups are forgotten"
    assert pool.groups().tails == sum(range(150))
    while blocks := pool.groups().largest:
        pool.allocate(object(), blocks, expected=blocks)
    for tail in reversed(range(76, 150)):
        pool.allocate(f"takes {tail}", tail, expected=tail)
        assert (np.diff(pool.table(f"takes {tail}")) == 1).all(), "in one piece"
    pool.check_integrity()


def test_freed_neighbours_merge() -> None:
    pool = BlockGroupPool(90)
    for sequence in "abc":
        pool.allocate(sequence, 30)
    for sequence in "acb":
        pool.free(sequence)
    assert pool.groups() == Groups(free=1, largest=90, uncached=90, cached=0, tails=0)


# --- how large active groups are ---


def tail_of_a_new_sequence(pool: BlockGroupPool, blocks: int = 10) -> int:
    before = pool.groups().tails
    pool.allocate("probe", blocks)
    tail = pool.groups().tails - before
    pool.free("probe")
    return tail


def test_the_first_group_has_the_size_asked_for() -> None:
    assert tail_of_a_new_sequence(BlockGroupPool(10_000)) == 60
    assert tail_of_a_new_sequence(BlockGroupPool(10_000, first_group=7)) == 7


def test_an_expected_size_is_reserved() -> None:
    pool = BlockGroupPool(10_000)
    pool.allocate("a", 10, expected=200)
    assert pool.groups().tails == 190


@pytest.mark.parametrize("growth", [0, 5, 40])
def test_groups_adapt_to_how_much_sequences_grow(growth: int) -> None:
    pool = BlockGroupPool(10_000)
    for i in range(100):
        pool.allocate(i, 20)
        pool.allocate(i, 20 + growth)
        pool.free(i)
    assert tail_of_a_new_sequence(pool) == pytest.approx(growth, rel=0.25)


def test_what_was_truncated_counts_as_needed() -> None:
    pool = BlockGroupPool(10_000)
    for i in range(100):
        pool.allocate(i, 20)
        pool.allocate(i, 60)
        pool.truncate(i, 0)
        pool.free(i)
    assert tail_of_a_new_sequence(pool) == pytest.approx(40, rel=0.25)


def test_tails_shrink_as_memory_gets_tight() -> None:
    pool = BlockGroupPool(1000)
    pool.allocate("large", 900, expected=900)
    assert tail_of_a_new_sequence(pool) == 90 * 2 // 3 // 2, "shared with one other"
    for i in range(5):
        pool.allocate(i, 1, expected=1)
    assert tail_of_a_new_sequence(pool) == 85 * 2 // 3 // 7, "shared with six others"


# --- bookkeeping ---


def test_a_million_blocks_badly_fragmented_cost_60_mb_at_most() -> None:
    tracemalloc.start()
    try:
        pool = BlockGroupPool(1_000_000)
        pool.allocate("all", 1_000_000)
        pool.detach("all")
        pool.release(np.arange(0, 1_000_000, 2, dtype=np.int32))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pool.groups().free == 500_000
    assert used <= 60e6


def corrupt_references(pool: BlockGroupPool) -> None:
    pool._references[0] = 0


def corrupt_table(pool: BlockGroupPool) -> None:
    pool._tables["b"].extend(pool.table("a"))


def corrupt_count(pool: BlockGroupPool) -> None:
    pool._free_blocks += 1


def corrupt_tail(pool: BlockGroupPool) -> None:
    pool._tables["a"].end -= 1


def corrupt_marks(pool: BlockGroupPool) -> None:
    pool._active._wanted[50] ^= 1


def corrupt_heap(pool: BlockGroupPool) -> None:
    pool._active._heap.clear()


def corrupt_tags(pool: BlockGroupPool) -> None:
    pool._free._tags[500] += 1


def corrupt_sizes(pool: BlockGroupPool) -> None:
    pool._free.blocks -= 1


def corrupt_order(pool: BlockGroupPool) -> None:
    pool._cached._older[int(pool._cached.ids()[3])] = 0


@pytest.mark.parametrize(
    "corrupt",
    [
        corrupt_references,
        corrupt_table,
        corrupt_count,
        corrupt_tail,
        corrupt_marks,
        corrupt_heap,
        corrupt_tags,
        corrupt_sizes,
        corrupt_order,
    ],
)
def test_check_integrity_finds_what_is_wrong(corrupt: Callable[[BlockGroupPool], None]) -> None:
    pool = BlockGroupPool(1000)
    for sequence in "abc":
        pool.allocate(sequence, 10)
    pool.free("c", cached=True)
    pool.check_integrity()
    corrupt(pool)
    with pytest.raises(IntegrityError):
        pool.check_integrity()

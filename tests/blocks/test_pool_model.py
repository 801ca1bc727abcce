"""BlockGroupPool against a shadow model: every operation, in any order, with shared blocks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvswitch.blocks import BlockGroupPool
from kvswitch.errors import InvalidTransition, OutOfBlocks, UnknownSequence

NUM_BLOCKS = 48
NAMES = st.sampled_from("abcdef")


def block_ids(blocks: object) -> np.ndarray:
    return np.array(list(blocks), np.int32)  # type: ignore[call-overload]


class PoolMachine(RuleBasedStateMachine):
    """`tables` and `leases` say all there is to know; what they do not name is free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockGroupPool(NUM_BLOCKS, first_group=6)
        self.tables: dict[str, list[int]] = {}
        self.leases: list[list[int]] = []
        self.cached: list[int] = []  # in the order in which they are to be given up
        self.handed_out: list[tuple[np.ndarray, list[int]]] = []

    def references(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for ids in (*self.tables.values(), *self.leases):
            counts.update(ids)
        return counts

    def dropped(self, ids: list[int], cached: bool) -> None:
        """Say that `ids` have lost a reference in the model."""
        idle = [block for block in ids if not self.references()[block]]
        if cached:
            self.cached += reversed(idle)

    @rule(name=NAMES, grow=st.integers(0, 30), expected=st.none() | st.integers(0, 60))
    def allocate(self, name: str, grow: int, expected: int | None) -> None:
        before = self.tables.get(name, [])
        used = self.references()
        free = NUM_BLOCKS - len(used)
        if grow > free:
            with pytest.raises(OutOfBlocks, match="preempt"):
                self.pool.allocate(name, len(before) + grow, expected=expected)
            assert (name in self.pool) == (name in self.tables)
            return
        self.pool.allocate(name, len(before) + grow, expected=expected)
        table = self.pool.table(name).tolist()
        assert table[: len(before)] == before
        new = set(table[len(before) :])
        assert len(new) == grow
        assert not new & used.keys(), "blocks in use were handed out"
        self.tables[name] = table
        # Cached content goes oldest first, and only as much as is of use.
        kept = [b for b in self.cached if b not in new and self.is_cached(b)]
        assert kept == self.cached[len(self.cached) - len(kept) :]
        if grow <= self.groups_before.largest:
            assert kept == self.cached, "cached content was given up for nothing"
        self.cached = kept

    def is_cached(self, block: int) -> bool:
        return bool(self.pool._cached.contains(np.array([block], np.int32))[0])

    def is_reserved(self, block: int) -> bool:
        return any(table.next <= block < table.end for table in self.pool._tables.values())

    @rule(name=NAMES)
    def grow_by_one(self, name: str) -> None:
        self.allocate(name, 1, None)

    @rule(name=NAMES)
    def allocate_no_more_than_there_is(self, name: str) -> None:
        if name in self.tables:
            self.pool.allocate(name, max(0, len(self.tables[name]) - 1))
            assert self.pool.size(name) == len(self.tables[name])

    @rule(name=NAMES, keep=st.integers(0, 30), cached=st.booleans())
    def truncate(self, name: str, keep: int, cached: bool) -> None:
        if name not in self.tables:
            with pytest.raises(UnknownSequence):
                self.pool.truncate(name, 0)
            return
        if keep > len(self.tables[name]):
            with pytest.raises(InvalidTransition):
                self.pool.truncate(name, keep)
            return
        self.pool.truncate(name, keep, cached=cached)
        ids = self.tables[name]
        self.tables[name] = ids[:keep]
        self.dropped(ids[keep:], cached)

    @rule(name=NAMES, cached=st.booleans())
    def free(self, name: str, cached: bool) -> None:
        if name not in self.tables:
            with pytest.raises(UnknownSequence):
                self.pool.free(name)
            return
        self.pool.free(name, cached=cached)
        self.dropped(self.tables.pop(name), cached)

    @rule(name=NAMES)
    def detach(self, name: str) -> None:
        if name in self.tables:
            ids = self.pool.detach(name).tolist()
            assert ids == self.tables.pop(name)
            self.leases.append(ids)

    @rule(name=NAMES, part=st.slices(20))
    def hold(self, name: str, part: slice) -> None:
        ids = self.tables.get(name, [])[part]
        self.pool.hold(block_ids(ids))
        self.leases.append(ids)

    @precondition(lambda self: self.leases)
    @rule(which=st.randoms(use_true_random=False), cached=st.booleans())
    def release(self, which: object, cached: bool) -> None:
        ids = self.leases.pop(which.randrange(len(self.leases)))  # type: ignore[attr-defined]
        self.pool.release(block_ids(ids), cached=cached)
        self.dropped(ids, cached)

    @rule(name=NAMES, source=NAMES, blocks=st.integers(0, 20))
    def share(self, name: str, source: str, blocks: int) -> None:
        """A prefix of another sequence: its blocks get one more owner."""
        prefix = self.tables.get(source, [])[:blocks]
        prefix = [b for b in prefix if b not in self.tables.get(name, [])]
        self.pool.attach(name, block_ids(prefix))
        self.tables.setdefault(name, []).extend(prefix)

    @rule(name=NAMES, data=st.data())
    def hit(self, name: str, data: st.DataObject) -> None:
        """A prefix hit: cached blocks come back to life, with blocks in use among them."""
        mine = self.tables.get(name, [])
        candidates = [b for b in {*self.cached, *self.references()} if b not in mine]
        if not candidates:
            return
        ids = data.draw(st.lists(st.sampled_from(sorted(candidates)), unique=True))
        self.pool.attach(name, block_ids(ids))
        self.cached = [b for b in self.cached if b not in ids]
        self.tables.setdefault(name, []).extend(ids)

    @rule(name=NAMES, first=st.integers(0, NUM_BLOCKS - 1), length=st.integers(1, 4))
    def attach_any_idle(self, name: str, first: int, length: int) -> None:
        """Whatever is free may be attached, but for what is reserved for growth."""
        ids = [
            b
            for b in range(first, min(first + length, NUM_BLOCKS))
            if not self.references()[b] and b not in self.cached
        ]
        if any(self.is_reserved(block) for block in ids):
            with pytest.raises(InvalidTransition, match="reserved"):
                self.pool.attach(name, block_ids(ids))
            assert self.pool.groups() == self.groups_before
            return
        self.pool.attach(name, block_ids(ids))
        self.tables.setdefault(name, []).extend(ids)

    @rule(data=st.data())
    def forget_cached(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.integers(0, NUM_BLOCKS - 1), unique=True))
        self.pool.forget_cached(block_ids(ids))
        self.cached = [b for b in self.cached if b not in ids]

    @invariant()
    def pool_agrees_with_the_model(self) -> None:
        self.pool.check_integrity()
        counts = self.references()
        assert self.pool.free_blocks == NUM_BLOCKS - len(counts)
        everything = self.pool.references(np.arange(NUM_BLOCKS, dtype=np.int32))
        assert everything.tolist() == [counts[b] for b in range(NUM_BLOCKS)]
        assert len(self.pool) == len(self.tables)
        for name, ids in self.tables.items():
            assert self.pool.table(name).tolist() == ids
            assert self.pool.size(name) == len(ids)
            self.handed_out.append((self.pool.table(name), ids.copy()))
        for table, ids in self.handed_out[-20:]:
            assert table.tolist() == ids, "a table handed out before has changed"
        groups = self.pool.groups()
        assert groups.cached == len(self.cached)
        assert groups.uncached + groups.cached + groups.tails == self.pool.free_blocks
        assert self.pool._cached.ids().tolist() == self.cached
        self.groups_before = groups

    def teardown(self) -> None:
        for name in self.tables:
            self.pool.free(name)
        for ids in self.leases:
            self.pool.release(block_ids(ids))
        self.pool.forget_cached(np.arange(NUM_BLOCKS, dtype=np.int32))
        assert self.pool.free_blocks == NUM_BLOCKS, "a reference has leaked"
        assert self.pool.groups().largest == NUM_BLOCKS, "neighbours were not merged"
        self.pool.check_integrity()


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)

"""Pages in block groups against a shadow of SGLang's books, with holds that come and go."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds
from kvswitch_sglang import overhead
from kvswitch_sglang.allocator import GroupTokenAllocator
from kvswitch_sglang.overhead import Overhead
from kvswitch_sglang.pages import NOBODY, PagePool
from kvswitch_sglang.settings import Settings


class Holder:
    """Holds pages by chance, gives them up when asked."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.soft: list[list[int]] = []  # given up when asked
        self.hard: list[list[int]] = []  # until everything is settled
        self.wrote: list[int] = []
        self.gone: list[Hashable] = []
        pool.holder = self

    def hold(self, pages: list[int], *, hard: bool) -> None:
        self.pool.hold(pages)
        (self.hard if hard else self.soft).append(pages)

    def yield_pages(self, pages: int) -> bool:
        held = bool(self.soft)
        while pages > 0 and self.soft:
            given = self.soft.pop(0)
            self.pool.release(given)
            pages -= len(given)
        return held

    def settle(self) -> None:
        for held in (*self.soft, *self.hard):
            self.pool.release(held)
        self.soft, self.hard = [], []

    def written(self, pages: BlockIds) -> None:
        self.wrote += pages.tolist()

    def going(self, owner: Hashable) -> None:
        self.gone.append(owner)

    @property
    def held(self) -> list[int]:
        return [page for held in (*self.soft, *self.hard) for page in held]


def make(pages: int = 64) -> tuple[PagePool, Holder]:
    pool = PagePool(pages, first_group=8, headroom=0.06)
    return pool, Holder(pool)


@pytest.mark.parametrize("seed", range(20))
def test_books_agree_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    pool, holder = make()
    used: dict[str, list[int]] = {}
    for _ in range(300):
        choice = rng.random()
        free = 64 - sum(map(len, used.values()))
        if choice < 0.45 and free:
            owner = f"r{rng.randrange(6)}"
            count = rng.randint(1, min(free, 12))
            got = pool.take([(owner, count), (NOBODY, 0)]).tolist()
            assert len(set(got)) == count
            assert 0 not in got
            assert not any(set(got) & set(pages) for pages in used.values())
            assert holder.wrote[-count:] == got
            used.setdefault(owner, []).extend(got)
        elif choice < 0.6 and used:
            pages = rng.choice(list(used.values()))
            holder.hold(rng.sample(pages, rng.randint(1, len(pages))), hard=rng.random() < 0.3)
        elif choice < 0.95 and used:
            owner = rng.choice(list(used))
            if rng.random() < 0.5:
                pool.give(np.array(used.pop(owner), np.int32))
                pool.forget(owner)
            else:  # a part of them, as when the tree has the same content
                part = used[owner][: rng.randint(1, len(used[owner]))]
                used[owner] = used[owner][len(part) :]
                pool.give(np.array(part, np.int32))
                used = {k: v for k, v in used.items() if v}
        elif rng.random() < 0.1:
            pool.clear()
            used.clear()
        assert pool.available == 64 - sum(map(len, used.values()))
        assert sorted(pool.free_pages()) == sorted(
            set(range(1, 65)) - {p for pages in used.values() for p in pages}
        )
        pool.check_integrity(holder.held)
    pool.clear()
    holder.settle()
    pool.check_integrity([])
    assert pool.available == 64


def test_pages_of_a_request_adjoin_while_others_grow() -> None:
    pool, _ = make(256)
    tables: dict[str, list[int]] = {name: [] for name in "abcd"}
    for _ in range(40):
        got = pool.take([(name, 1) for name in tables]).tolist()
        for name, page in zip(tables, got, strict=True):
            tables[name].append(page)
    for pages in tables.values():
        runs = 1 + int(np.count_nonzero(np.diff(pages) != 1))
        assert len(pages) / runs >= 8


def test_more_is_to_be_free_where_what_is_taken_would_be_short_runs() -> None:
    pool = PagePool(64, first_group=8, headroom=0.25)
    Holder(pool)
    pages = pool.take([("a", 64)]).tolist()
    pool.give(np.array(pages[:20:2], np.int32))
    pool.give(np.array(pages[40:44], np.int32))
    assert pool.ample(4) == 4
    assert pool.ample(5) == 5 + 16


def test_held_pages_are_free_to_sglang_and_given_up_when_needed() -> None:
    pool, holder = make(8)
    pages = pool.take([("a", 8)]).tolist()
    holder.hold(pages[:4], hard=False)
    holder.hold(pages[4:], hard=True)
    pool.give(np.array(pages, np.int32))
    assert pool.available == 8
    assert pool.take([("b", 3)]).tolist()
    assert holder.held == pages[4:], "only what can be given up, as long as that suffices"
    pool.take([("b", 5)])
    assert holder.held == []


def test_who_has_ended_is_told_before_its_pages_go() -> None:
    pool, holder = make(8)
    pages = pool.take([("a", 4)]).tolist()
    pool.note_ended("a", pages, ["k0", "k1", "k2", "k3"])
    assert pool.keep(pages, ["k0", "k1", "other", "k3"]) == 2
    pool.release(pages[:2])
    pool.give(np.array(pages[3:], np.int32))
    assert holder.gone == ["a"]
    assert pool.keep(pages, ["k0", "k1", "k2", "k3"]) == 3, "the last one is no longer its own"
    pool.release(pages[:3])
    pool.check_integrity([])


def test_a_leak_is_found() -> None:
    pool, _ = make(8)
    pages = pool.take([("a", 2)]).tolist()
    pool.hold(pages)
    with pytest.raises(IntegrityError, match="leaked"):
        pool.check_integrity([])


class Copy:
    """A copy to the host that somebody may have to wait for."""

    waited = False

    def synchronize(self) -> None:
        self.waited = True


def stage(allocator: GroupTokenAllocator, ids: Any, copied: Copy) -> None:
    allocator._to_host = lambda ids: (ids, copied)  # type: ignore[method-assign]
    allocator.later(ids, allocator.pages.give, given=len(ids))


def test_pages_on_their_way_to_the_host_are_waited_for_two_passes_later_or_when_needed() -> None:
    allocator: GroupTokenAllocator = object.__new__(GroupTokenAllocator)
    allocator.page_size, allocator.device = 1, "cpu"
    allocator.start(Settings(), 8, Overhead())
    Holder(allocator.pages)
    assert allocator._choose([("a", 6)])
    given = allocator.free_pages

    def give(first: int, last: int) -> Copy:
        copied = Copy()
        stage(allocator, given[first:last], copied)
        return copied

    early = give(0, 2)
    assert allocator.available_size() == 4
    assert allocator._choose([("b", 2)])
    assert not early.waited
    for _ in range(2):
        assert not early.waited
        allocator.begin_pass()
        assert allocator._choose([("b", 0)])
    assert early.waited
    one, two = give(2, 3), give(3, 6)
    assert allocator._choose([("b", 3)])
    assert (one.waited, two.waited) == (True, False)
    assert not allocator._choose([("b", 4)])
    assert allocator._choose([("b", 3)])
    allocator.pages.check_integrity([])


def test_a_load_waits_for_what_was_evicted_for_it_where_other_pages_are_short_runs() -> None:
    allocator: GroupTokenAllocator = object.__new__(GroupTokenAllocator)
    allocator.page_size, allocator.device = 1, "cpu"
    allocator.start(Settings(headroom=0.25), 16, Overhead())
    Holder(allocator.pages)
    assert allocator._choose([("a", 16)])
    pages = allocator.free_pages
    allocator.pages.give(pages[:8:2].numpy().astype(np.int32))
    evicted = Copy()
    stage(allocator, pages[8:12], evicted)
    assert allocator.ample(1) == 1
    assert not evicted.waited
    assert allocator.ample(3) == 3 + 4
    got = allocator.alloc_for("load", 3)
    assert evicted.waited
    assert got is not None
    assert np.diff(got).tolist() == [1, 1]


def test_time_inside_counts_once_and_without_what_was_spent_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(overhead, "perf_counter", lambda: now)
    inside = Overhead()
    with inside:
        now += 1
        with inside:
            now += 10
            inside.leave_out(4)
        now += 2
    now += 100

    def late() -> None:
        nonlocal now
        now += 5
        raise KeyError("gone")

    with pytest.raises(KeyError), inside:
        late()
    assert inside.seconds == 14

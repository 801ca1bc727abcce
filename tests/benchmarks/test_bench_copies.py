"""Host copies: what the planner pays for a swap-out, a shared prefix, and memory that is short.

Each operation is timed with 10,000 and with 1,000,000 host blocks, side by side in one benchmark
group; 1,000 owners hold half of them. Contamination is timed with 1,000 and with 10,000 owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, TypeAlias

import numpy as np
import pytest

from kvswitch.copies import HostCopies

Benchmark: TypeAlias = Any
BLOCK_TOKENS = 16
OWNERS = 1_000
SWAPPED = 60  # blocks of a swap-out
ROUNDS = 300


@pytest.fixture(scope="module", params=[10_000, 1_000_000], ids="{:,} blocks".format)
def half_full(request: pytest.FixtureRequest) -> HostCopies:
    """Owners' copies with a key a block, and as much free memory, in one piece."""
    copies = HostCopies(request.param, BLOCK_TOKENS, first_group=1)
    each = request.param // 2 // OWNERS
    for owner in range(OWNERS):
        copies.commit(copies.begin(owner, each * BLOCK_TOKENS))
        for index in range(min(each, SWAPPED)):
            copies.publish(owner, index, (owner, index))
    return copies


@pytest.fixture
def new_owner(half_full: HostCopies) -> Iterator[Callable[[], Any]]:
    """Return a set-up function that names a new owner each round and drops the last one."""
    names = map("owner {}".format, count())
    known: list[str] = []

    def drop_all() -> None:
        while known:
            if (owner := known.pop()) in half_full:
                half_full.drop(owner)

    def setup() -> tuple[tuple[str], dict[str, Any]]:
        drop_all()
        known.append(next(names))
        return (known[-1],), {}

    yield setup
    drop_all()
    half_full.check_integrity()
    assert half_full.num_leases() == 0


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_begin_and_end_of_60_blocks(
    benchmark: Benchmark, half_full: HostCopies, new_owner: Callable[[], Any], end: str
) -> None:
    benchmark.group = f"begin and {end} a swap-out of 60 blocks"
    finish = getattr(half_full, end)

    def swap_out(owner: str) -> None:
        finish(half_full.begin(owner, SWAPPED * BLOCK_TOKENS))

    benchmark.pedantic(swap_out, setup=new_owner, rounds=ROUNDS)


def test_incremental_begin_and_commit(
    benchmark: Benchmark, half_full: HostCopies, new_owner: Callable[[], Any]
) -> None:
    """Behind a copy of 60 blocks come 3 more; the last, partial one is overwritten."""
    benchmark.group = "begin and commit an incremental swap-out of 4 blocks"
    copies = half_full

    def with_copy() -> tuple[tuple[str], dict[str, Any]]:
        (owner,), _ = new_owner()
        copies.commit(copies.begin(owner, SWAPPED * BLOCK_TOKENS - 5))
        return (owner,), {}

    def swap_out(owner: str) -> None:
        copies.commit(copies.begin(owner, (SWAPPED + 3) * BLOCK_TOKENS))

    benchmark.pedantic(swap_out, setup=with_copy, rounds=ROUNDS)


def test_publish_60_blocks(
    benchmark: Benchmark, half_full: HostCopies, new_owner: Callable[[], Any]
) -> None:
    benchmark.group = "publish 60 copies"

    def with_copy() -> tuple[tuple[str, list[tuple[str, int]]], dict[str, Any]]:
        (owner,), _ = new_owner()
        half_full.commit(half_full.begin(owner, SWAPPED * BLOCK_TOKENS))
        return (owner, [(owner, index) for index in range(SWAPPED)]), {}

    def publish(owner: str, keys: list[tuple[str, int]]) -> None:
        for index, key in enumerate(keys):
            half_full.publish(owner, index, key)

    benchmark.pedantic(publish, setup=with_copy, rounds=ROUNDS)


@pytest.mark.parametrize("gone", [False, True], ids=["shared", "of who is gone"])
def test_adopt_60_blocks(
    benchmark: Benchmark, half_full: HostCopies, new_owner: Callable[[], Any], gone: bool
) -> None:
    benchmark.group = f"adopt 60 copies ({'of who is gone' if gone else 'shared'})"
    copies, keys = half_full, [("prompt", index) for index in range(SWAPPED)]
    copies.commit(copies.begin("prompt", SWAPPED * BLOCK_TOKENS))
    for index, key in enumerate(keys):
        copies.publish("prompt", index, key)
    if gone:
        copies.drop("prompt")
    benchmark.pedantic(copies.adopt, setup=lambda: (new_owner()[0] + (keys,), {}), rounds=ROUNDS)
    assert copies.match(keys) == SWAPPED
    if not gone:
        copies.drop("prompt")


def test_pin_and_release_60_blocks(
    benchmark: Benchmark, half_full: HostCopies, new_owner: Callable[[], Any]
) -> None:
    benchmark.group = "pin and release 60 copies"
    (owner,), _ = new_owner()
    half_full.commit(half_full.begin(owner, SWAPPED * BLOCK_TOKENS))
    benchmark.pedantic(
        lambda: half_full.release(half_full.pin(owner, SWAPPED * BLOCK_TOKENS)), rounds=ROUNDS
    )


# --- when host memory is short ---


@pytest.mark.parametrize("owners", [1_000, 10_000], ids="{:,} owners".format)
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "on one prompt"])
def test_contamination(benchmark: Benchmark, owners: int, shared: bool) -> None:
    """A swap-out of 60 blocks takes those of three others; then three new ones come.

    `shared`: all owners have a prompt of 20 blocks in common, and half of them nothing else.
    """
    benchmark.group = "begin and commit 60 blocks that others lose"
    rng = np.random.default_rng(0)
    names = count()
    prompt = [("prompt", index) for index in range(20)]
    copies = HostCopies(owners * 20 + 20, BLOCK_TOKENS, first_group=1)
    copies.set_priority("prompt", 9)
    copies.commit(copies.begin("prompt", 20 * BLOCK_TOKENS))
    for index, key in enumerate(prompt):
        copies.publish("prompt", index, key)
    copies.set_priority("taker", 9)

    def newcomer(blocks: int) -> None:
        owner = next(names)
        copies.set_priority(owner, float(rng.integers(8)))
        have = copies.adopt(owner, prompt) if shared else 0
        if blocks:
            copies.commit(copies.begin(owner, have + blocks * BLOCK_TOKENS))
        copies.set_resident(owner, bool(rng.integers(2)))

    for number in range(owners):
        newcomer(40 * (number % 2) if shared else 20)
    while copies.pool.free_blocks >= 20:
        newcomer(20)

    def refill() -> None:
        copies.truncate("taker", 0)
        while copies.pool.free_blocks >= 20:
            newcomer(20)

    def swap_out() -> None:
        copies.commit(copies.begin("taker", SWAPPED * BLOCK_TOKENS))

    benchmark.pedantic(swap_out, setup=refill, rounds=100)
    assert copies.contaminated_blocks >= SWAPPED
    copies.check_integrity()

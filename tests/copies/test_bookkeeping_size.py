"""What the bookkeeping of a large host memory costs."""

from __future__ import annotations

import tracemalloc

from kvswitch.copies import HostCopies

NUM_BLOCKS = 1_000_000
OWNERS = 1_000


def test_a_million_host_blocks_cost_at_most_200_megabytes() -> None:
    """In 1,000 copies, half of them published; the keys themselves are the engine's."""
    each = NUM_BLOCKS // OWNERS
    keys = [[(owner, index) for index in range(each)] for owner in range(0, OWNERS, 2)]
    tracemalloc.start()
    try:
        copies = HostCopies(NUM_BLOCKS, 16)
        for owner in range(OWNERS):
            copies.commit(copies.begin(owner, each * 16))
        for owner, its_keys in enumerate(keys):
            for index, key in enumerate(its_keys):
                copies.publish(owner, index, key)
        assert copies.pool.free_blocks == 0
        for owner in range(0, OWNERS, 4):  # some are gone, but can still be found
            copies.drop(owner)
        assert copies.pool.groups().cached == NUM_BLOCKS // 8
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 200e6, f"{peak / 1e6:.0f} MB"
    copies.check_integrity()

"""Set-up for tests of host copies."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest

from kvswitch.copies import HostCopies

BLOCK_TOKENS = 16


class Copies(HostCopies):
    """With what most tests begin with, and with a record of what was lost."""

    def __init__(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS, **settings: Any) -> None:
        self.lost: list[tuple[Hashable, int]] = []
        settings.setdefault("on_lost", lambda owner, left: self.lost.append((owner, left)))
        super().__init__(num_blocks, block_tokens, **settings)

    def hold_copy(
        self, owner: Hashable, tokens: int, *, priority: float = 0.0, resident: bool = False
    ) -> None:
        """Swap `tokens` out and wait for it; `resident`: they stay on the device too."""
        self.set_priority(owner, priority)
        self.commit(self.begin(owner, tokens))
        self.set_resident(owner, resident)

    def publish_all(self, owner: Hashable, keys: str) -> None:
        """Publish an owner's leading copies, one character a key."""
        for index, key in enumerate(keys):
            assert self.publish(owner, index, key)


@pytest.fixture
def make_copies() -> Iterator[Callable[..., Copies]]:
    """Make HostCopies that are checked, and from which nothing may have leaked, in the end."""
    made: list[Copies] = []

    def make(num_blocks: int, **settings: Any) -> Copies:
        made.append(Copies(num_blocks, **settings))
        return made[-1]

    yield make
    for copies in made:
        copies.check_integrity()
        assert copies.num_leases() == 0, "a lease was not ended"
        for owner in [entry.id for entry in copies._owners]:
            copies.drop(owner)
        copies.check_integrity()
        assert copies.pool.free_blocks == copies.pool.num_blocks, "a host block has leaked"

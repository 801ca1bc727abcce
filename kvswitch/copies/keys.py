"""Content keys: host copies that others may adopt, found by what is in them."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Hashable, Sequence

import numpy as np
import numpy.typing as npt

from kvswitch.copies.owners import Fill
from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["ContentKeys", "PendingKeys"]


class ContentKeys:
    """Which host block holds the content that a key names, and as which block of a sequence.

    A key belongs to a block, not to an owner: it holds until the block is given out again. It names
    all tokens from the start of a sequence, so it is found at its own place in a sequence only.

    Parameters
    ----------
    num_blocks : int
        Host blocks. At first none of them has a key.
    """

    def __init__(self, num_blocks: int) -> None:
        self._block: dict[Hashable, int] = {}
        self._key: list[Hashable | None] = [None] * num_blocks
        # Place in the sequence, -1 without a key. The view is the same memory, for many at a time.
        self._index = array("i", [-1]) * num_blocks
        self._indices = np.frombuffer(self._index, np.int32)

    def __len__(self) -> int:
        return len(self._block)

    def add(self, key: Hashable, block: int, index: int) -> bool:
        """Name the content of `block`, the `index`-th of a sequence; False if another has `key`."""
        if key in self._block:
            return self._block[key] == block
        if self._index[block] >= 0:
            del self._block[self._key[block]]
        self._block[key] = block
        self._key[block] = key
        self._index[block] = index
        return True

    def find(self, keys: Sequence[Hashable], first: int = 0) -> list[int]:
        """Blocks named by `keys[first:]`, up to the first key that names none at its place."""
        blocks = []
        for index in range(first, len(keys)):
            block = self._block.get(keys[index])
            if block is None or self._index[block] != index:
                break
            blocks.append(block)
        return blocks

    def named(self, blocks: BlockIds) -> npt.NDArray[np.bool_]:
        """Return a mask: which of `blocks` have a key."""
        return self._indices[blocks] >= 0

    def forget(self, blocks: BlockIds) -> None:
        """Take the keys from `blocks`: their content is about to change."""
        named = blocks[self.named(blocks)]
        for block in named.tolist():
            del self._block[self._key[block]]
            self._key[block] = None
        self._indices[named] = -1

    def clear(self) -> None:
        """Take the keys from all blocks."""
        self._block.clear()
        self._key = [None] * len(self._key)
        self._indices[:] = -1

    def at_their_place(self, table: BlockIds) -> bool:
        """Whether all blocks of a table that have a key were named at their index in it."""
        indices = self._indices[table]
        return bool(((indices < 0) | (indices == np.arange(len(table)))).all())

    def check_integrity(self) -> None:
        """Raise IntegrityError if keys and blocks contradict each other."""
        named = np.flatnonzero(self._indices >= 0).tolist()
        if {self._key[block]: block for block in named} != self._block:
            raise IntegrityError("content keys and the blocks that they name disagree")


class PendingKeys:
    """Content keys of copies that are still being written: which fill brings what a key names."""

    def __init__(self) -> None:
        self._fills: dict[Hashable, tuple[Fill, int]] = {}
        self._keys: dict[Fill, list[Hashable]] = {}

    def announce(self, fill: Fill, keys: Sequence[Hashable]) -> None:
        """Name the full blocks that `fill` will write: `keys` are those from its first block on."""
        new = []
        for index, key in enumerate(keys, fill.first):
            if key not in self._fills:
                self._fills[key] = fill, index
                new.append(key)
        if new:
            self._keys[fill] = new

    def find(self, keys: Sequence[Hashable], first: int) -> list[Fill]:
        """Fills that bring `keys[first:]`, one a key, up to the first that none brings there."""
        fills = []
        for index in range(first, len(keys)):
            fill, place = self._fills.get(keys[index], (None, -1))
            if fill is None or place != index:
                break
            fills.append(fill)
        return fills

    def withdraw(self, fill: Fill, first: int = 0) -> None:
        """Let nobody follow `fill` from its owner's block `first` on."""
        if fill not in self._keys:
            return
        kept = []
        for key in self._keys.pop(fill):
            if self._fills[key][1] < first:
                kept.append(key)
            else:
                del self._fills[key]
        if kept:
            self._keys[fill] = kept

    def clear(self) -> None:
        """Let nobody follow any fill."""
        self._fills.clear()
        self._keys.clear()

    def check_integrity(self, pending: Collection[object]) -> None:
        """Raise IntegrityError unless each key is that of a pending fill, and noted there."""
        noted = {key: fill for fill, keys in self._keys.items() for key in keys}
        if noted != {key: fill for key, (fill, _) in self._fills.items()}:
            raise IntegrityError("keys of pending copies and the fills that bring them disagree")
        if any(fill not in pending for fill in self._keys):
            raise IntegrityError("a key waits for a fill that has ended")

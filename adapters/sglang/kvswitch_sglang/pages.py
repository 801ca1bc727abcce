"""The pages of SGLang's KV cache in block groups, and as the planner sees them.

What SGLang has given back is free to it at once, even while a swap-out still reads it: such pages
are *held* by a reference, and counted as free. Where an allocation needs them, the planner gives
them up, and the forward that writes them waits (`EngineSwapManager.give_way`, `written`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.errors import IntegrityError
from kvswitch.messages import BlockIds

__all__ = ["NOBODY", "Holder", "PagePool"]

NOBODY: Hashable = object()
"""Owner of pages that are taken for no request in particular."""


class Holder(Protocol):
    """Who holds pages that SGLang has given back."""

    def yield_pages(self, pages: int) -> bool:
        """Give up holds on at least so many, if so many are held; whether there was any."""

    def settle(self) -> None:
        """End everything under way, and with it all holds."""

    def written(self, pages: BlockIds) -> None:
        """Take note that the coming forward writes these."""

    def going(self, owner: Hashable) -> None:
        """Take note that pages of `owner`, which has ended, are about to be given back."""


class PagePool:
    """Pages 1 to `num_pages`; page 0 is SGLang's, for padding.

    Parameters
    ----------
    num_pages : int
    first_group
        As for `BlockGroupPool`.
    headroom : float
        Share of the pages that should be free besides, where what is taken would be many runs.

    Attributes
    ----------
    available : int
        Pages that are free in SGLang's eyes.
    """

    holder: Holder

    def __init__(self, num_pages: int, *, first_group: int, headroom: float) -> None:
        self.num_pages = num_pages
        self._groups = BlockGroupPool(num_pages + 1, first_group=first_group, headroom=headroom)
        self._headroom = int(num_pages * headroom)
        self._groups.attach(NOBODY, np.zeros(1, np.int32))
        self._groups.detach(NOBODY)
        self._used = np.zeros(num_pages + 1, np.bool_)
        self._used[0] = True
        self._ended: dict[int, tuple[Hashable, Hashable]] = {}  # page -> its key, and whose it was
        self.available = num_pages

    # -- SGLang's allocator ------------------------------------------------------------------------

    def ample(self, pages: int) -> int:
        """How many pages should be free for `pages` of them to be in few runs."""
        return pages if self._groups.groups().largest >= pages else pages + self._headroom

    def take(self, demands: Iterable[tuple[Hashable, int]]) -> BlockIds:
        """Pages for several owners, in order; their sum must be `available`.

        Parameters
        ----------
        demands : iterable of (owner, int)
            How many pages each is to get more.
        """
        demands = [(owner, pages) for owner, pages in demands if pages]
        total = sum(pages for _, pages in demands)
        self._make_free(total)
        taken = [self._grow(owner, pages) for owner, pages in demands]
        pages = np.concatenate(taken) if taken else np.empty(0, np.int32)
        self._used[pages] = True
        self.available -= total
        self.holder.written(pages)
        return pages

    def _make_free(self, pages: int) -> None:
        groups = self._groups
        while (short := pages - groups.free_blocks) > 0 and self.holder.yield_pages(short):
            pass  # not all that is held is free to SGLang
        if short > 0:
            # Only what a swap-in writes for somebody who has gone cannot be had earlier.
            self.holder.settle()

    def _grow(self, owner: Hashable, pages: int) -> BlockIds:
        groups = self._groups
        size = groups.size(owner) if owner in groups else 0
        groups.allocate(owner, size + pages)
        got = groups.table(owner)[size:]
        if owner is NOBODY:
            groups.detach(owner)
        return got

    def give(self, pages: BlockIds) -> None:
        """SGLang gives pages back."""
        if self._ended:
            self._note_going(pages)
        self._used[pages] = False
        self.available += len(pages)
        self._groups.release(pages)

    def _note_going(self, pages: BlockIds) -> None:
        ended = self._ended
        found = [ended[page][1] for page in pages.tolist() if page in ended]
        for owner in dict.fromkeys(found):
            self.holder.going(owner)  # before anything is given: all of its pages are still there
        for page in pages.tolist():
            ended.pop(page, None)

    def forget(self, owner: Hashable) -> None:
        """`owner` grows no more: room reserved for it is free again."""
        if owner in self._groups:
            self._groups.detach(owner)

    def free_pages(self) -> BlockIds:
        """All pages that are free in SGLang's eyes."""
        return np.flatnonzero(~self._used).astype(np.int32)

    def clear(self) -> None:
        """SGLang gives everything back; nothing has ended any more."""
        self._ended.clear()
        used = np.flatnonzero(self._used[1:]).astype(np.int32) + 1
        if len(used):
            self.give(used)

    # -- the planner -------------------------------------------------------------------------------

    def note_ended(self, owner: Hashable, pages: Sequence[int], keys: Sequence[Hashable]) -> None:
        """`owner` has ended; its pages are the tree's, and will be given back some time."""
        self._ended.update((page, (key, owner)) for page, key in zip(pages, keys, strict=True))

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each."""
        self._groups.hold(np.asarray(blocks, np.int32))

    def release(self, blocks: Sequence[int], *, copied: bool = False) -> None:
        """Take a reference from each."""
        self._groups.release(np.asarray(blocks, np.int32))

    def keep(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> int:
        """Hold the leading ones that still have the content that `keys` name."""
        count = 0
        for block, key in zip(blocks, keys, strict=False):
            if self._ended.get(block, (None,))[0] != key:
                break
            count += 1
        self.hold(blocks[:count])
        return count

    def check_integrity(self, held: Sequence[int]) -> None:
        """Compare references with SGLang's use and the blocks that transfers hold.

        Raises
        ------
        IntegrityError
            They differ: something leaks.
        """
        every = np.arange(self.num_pages + 1, dtype=np.int32)
        expected = self._used.astype(np.int32)
        np.add.at(expected, np.asarray(held, np.intp), 1)
        wrong = np.flatnonzero(self._groups.references(every) != expected)
        if wrong.size:
            raise IntegrityError(f"leaked or lost references on pages {wrong[:8].tolist()}")
        if self.available != (free := int((~self._used).sum())):
            raise IntegrityError(f"{free} pages are free, {self.available} were counted")

"""SGLang's two page allocators on block groups.

All of SGLang's kernels take pages from the front of ``free_pages``, request after request. So the
pages are chosen here, on the host, put there in that order, and the rest is SGLang's own code. On a
GPU, pages that are given back are known by number once a small copy to the host has ended that was
begun when they were; pages of requests that have ended, too. With overlapped scheduling it waits
for the forward under way: two passes on, the result of that has been processed. Until then pages
given back count as free, but are taken, and waited for, only where others do not suffice. So what
a pass will need is evicted a pass ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.allocator import (
    BaseTokenToKVPoolAllocator,
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)

from kvswitch.errors import ConfigError
from kvswitch.messages import BlockIds
from kvswitch_sglang.overhead import Overhead
from kvswitch_sglang.pages import NOBODY, PagePool
from kvswitch_sglang.settings import Settings

__all__ = ["GroupPagedAllocator", "GroupTokenAllocator", "take_over"]


class _Staged(NamedTuple):
    """Numbers on their way from the device to the host."""

    number: int  # of the pass that has sent them
    ids: torch.Tensor
    copied: Any
    then: Callable[[BlockIds], None]
    given: int  # pages that are free, in SGLang's eyes


class GroupMixin(BaseTokenToKVPoolAllocator):
    """Mixed into SGLang's allocators; shares their base, so that one can become a `GroupMixin`.

    Attributes
    ----------
    pages : PagePool
    batch : list of (owner, tokens) or None
        For whom the coming allocation is, in its order, and how many tokens it is to add.
    late : bool
        Whether page numbers come from a device, and are known here only later.
    taken : int
        Pages taken in this pass.
    """

    pages: PagePool
    batch: list[tuple[Hashable, int]] | None
    late: bool
    taken: int
    page_size: int
    device: Any
    free_pages: torch.Tensor

    def start(self, settings: Settings, num_pages: int, overhead: Overhead) -> None:
        """Begin to allocate in groups; all pages are free."""
        self.pages = PagePool(
            num_pages, first_group=settings.first_group, headroom=settings.headroom
        )
        self.batch = None
        self.late = torch.device(self.device).type != "cpu"
        self.taken = 0
        self._overhead = overhead
        self._pass = 0
        self._staged: deque[_Staged] = deque()
        self._none = torch.empty(0, dtype=torch.int64, device=self.device)
        self.free_pages = self._none

    # -- what SGLang asks --------------------------------------------------------------------------

    def available_size(self) -> int:
        """Tokens that are free."""
        staged = sum(each.given for each in self._staged)
        return (self.pages.available + staged) * self.page_size

    def get_all_free_pages(self) -> torch.Tensor:
        """All free pages, in no particular order."""
        self._drain()
        return torch.from_numpy(self.pages.free_pages().astype(np.int64)).to(self.device)

    def merge_and_sort_free(self) -> None:
        """Do nothing: free pages are always in order."""

    def clear(self) -> None:
        """Everything is free."""
        self._drain()
        self.pages.clear()
        self.free_pages = self._none
        self.free_group = None
        self.free_page_ids_group: list[torch.Tensor] = []
        self.staged_pages: list[torch.Tensor] = []
        self.release_pages = self._none

    # -- choosing ----------------------------------------------------------------------------------

    def ample(self, pages: int) -> int:
        """How many pages should be free for `pages` of them to be in few runs."""
        with self._overhead:
            self._drain(pages)
            return self.pages.ample(pages)

    def alloc_for(self, owner: Hashable, pages: int) -> BlockIds | None:
        """Pages for one owner; None if there are too few."""
        self._drain(pages)
        self._drain(self.pages.ample(pages))  # what was evicted for it was given back just now
        if pages > self.pages.available:
            return None
        self.taken += pages
        return self.pages.take([(owner, pages)])

    def _choose(self, demands: Sequence[tuple[Hashable, int]]) -> bool:
        with self._overhead:
            total = sum(pages for _, pages in demands)
            self._drain(total)
            if total > self.pages.available:
                return False
            self.taken += total
            self.free_pages = self.indices(self.pages.take(demands))
            return True

    def indices(self, pages: BlockIds) -> torch.Tensor:
        """Page numbers on the device."""
        ids = torch.from_numpy(pages.astype(np.int64))
        if ids.device != torch.device(self.device):
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        return ids

    def _owners(self, rows: int) -> list[Hashable]:
        if self.batch is None or len(self.batch) != rows:
            return [NOBODY] * rows
        return [owner for owner, _ in self.batch]

    # -- giving back -------------------------------------------------------------------------------

    def begin_pass(self) -> None:
        """Begin a scheduling pass."""
        self._pass += 1
        self.taken = 0
        self._drain(0)

    def settle(self) -> None:
        """Wait for all that is on its way to the host."""
        self._drain()

    def later(self, ids: torch.Tensor, then: Callable[[BlockIds], None], *, given: int = 0) -> None:
        """Call `then` with numbers that are on the device once they are known here, in order."""
        self._staged.append(_Staged(self._pass, *self._to_host(ids), then, given))

    @staticmethod
    def _to_host(ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
        host.copy_(ids, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return host, copied

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        with self._overhead:
            for ids in page_ids:
                if self.late:
                    self.later(ids, self.pages.give, given=len(ids))
                else:
                    self.pages.give(ids.numpy().astype(np.int32))

    def _drain(self, pages: int | None = None) -> None:
        """Take note of what was sent long ago, or until `pages` are free; None: of all."""
        staged = self._staged
        while staged and (
            pages is None or staged[0].number < self._pass - 1 or self.pages.available < pages
        ):
            each = staged.popleft()
            started = perf_counter()
            each.copied.synchronize()
            self._overhead.leave_out(perf_counter() - started)
            each.then(each.ids.numpy().astype(np.int32))


class GroupPagedAllocator(GroupMixin, PagedTokenToKVPoolAllocator):
    """Pages of several tokens."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Whole pages for nobody in particular."""
        if not self._choose([(NOBODY, need_size // self.page_size)]):
            return None
        slots: torch.Tensor | None = super().alloc(need_size)
        return slots

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots for the tokens between `prefix_lens` and `seq_lens` of each request."""
        size = self.page_size
        counts = (-(-seq_lens_cpu // size) - -(-prefix_lens_cpu // size)).tolist()
        owners = self._owners(len(counts))
        if not self._choose(list(zip(owners, counts, strict=True))):
            return None
        slots: torch.Tensor | None = super().alloc_extend(
            prefix_lens,
            prefix_lens_cpu,
            seq_lens,
            seq_lens_cpu,
            last_loc,
            extend_num_tokens,
            sum(counts),
        )
        return slots

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """A slot for one more token of each request."""
        grows = ((seq_lens_cpu - 1) % self.page_size == 0).tolist()
        owners = self._owners(len(grows))
        if not self._choose(list(zip(owners, map(int, grows), strict=True))):
            return None
        slots: torch.Tensor | None = super().alloc_decode(seq_lens, seq_lens_cpu, last_loc)
        return slots


class GroupTokenAllocator(GroupMixin, TokenToKVPoolAllocator):
    """Pages of one token."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Slots for the batch, in its order."""
        demands = self.batch or []
        if sum(tokens for _, tokens in demands) != need_size:
            demands = [(NOBODY, need_size)]
        if not self._choose(demands):
            return None
        slots: torch.Tensor | None = super().alloc(need_size)
        return slots

    def free(self, free_index: torch.Tensor) -> None:
        """Give slots back."""
        if self.free_group is not None:
            super().free(free_index)
        elif free_index.numel():
            self._release_page_ids(free_index)


_KINDS: dict[type, type[GroupMixin]] = {
    PagedTokenToKVPoolAllocator: GroupPagedAllocator,
    TokenToKVPoolAllocator: GroupTokenAllocator,
}


def take_over(allocator: Any, settings: Settings, overhead: Overhead) -> GroupMixin:
    """Let SGLang's `allocator`, which others refer to already, allocate in groups from now on.

    Parameters
    ----------
    allocator
        All of its pages are free.
    settings : Settings
    overhead : Overhead
        Where time spent here is counted.

    Raises
    ------
    ConfigError
        It is of an unknown kind, or in use. Nothing has changed.
    """
    kind = _KINDS.get(type(allocator))
    if kind is None:
        raise ConfigError(
            f"kvswitch does not work with SGLang's {type(allocator).__name__}: only with one pool "
            "of full-attention KV cache. Leave out what asks for another one"
        )
    if allocator.available_size() // allocator.page_size != allocator.size // allocator.page_size:
        raise ConfigError("the KV cache is in use already: kvswitch must be there from the start")
    allocator.__class__ = kind
    found: GroupMixin = allocator
    found.start(settings, allocator.size // allocator.page_size, overhead)
    return found

"""Block groups in vLLM's block pool, and the pool as the planner sees it.

vLLM's managers allocate through one `BlockPool`, whose free blocks are in a queue. `GroupQueue`
takes its place: the same operations, but blocks come from a `BlockGroupPool`, in runs for each
request. Reference counts, hashes and evictions stay vLLM's. What is free is always said truly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from kvswitch.blocks import BlockGroupPool
from kvswitch.errors import OutOfBlocks

__all__ = ["GroupQueue", "VllmPool", "install_groups"]

_OUTSIDE: Hashable = object()  # owner of blocks that are taken for nobody in particular


class GroupQueue:
    """vLLM's ``FreeKVCacheBlockQueue`` on block groups.

    Blocks whose content may still be hit (they have a hash) are given out after all others, least
    recently freed first, as vLLM does. Not so those whose content has gone to the host as well: to
    overwrite them costs a copy at most, and they make long runs.

    Parameters
    ----------
    blocks : list of KVCacheBlock
        All blocks of the pool.
    free : iterable of KVCacheBlock
        Those that are free now.
    first_group, headroom
        As for `BlockGroupPool`.

    Attributes
    ----------
    num_free_blocks : int
    request : Hashable or None
        For whom blocks are being taken.
    """

    def __init__(
        self, blocks: list[Any], free: Iterable[Any], *, first_group: int, headroom: float
    ) -> None:
        self._blocks = blocks
        self._groups = BlockGroupPool(len(blocks), first_group=first_group, headroom=headroom)
        self._taken: list[int] = []  # hit in the prefix cache, not yet told to the groups
        self._copied: set[int] = set()  # about to be free, and the host has their content
        self.request: Hashable | None = None
        idle = [block.block_id for block in free]
        used = np.setdiff1d(np.arange(len(blocks), dtype=np.int32), np.array(idle, np.int32))
        if len(used):
            self._groups.attach(_OUTSIDE, used.astype(np.int32))
            self._groups.detach(_OUTSIDE)
        self.num_free_blocks = len(idle)

    def popleft(self) -> Any:
        """Take one block."""
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Any]:
        """Take `n` blocks for the present request, in runs where possible."""
        if n == 0:
            return []
        if n > self.num_free_blocks:
            raise OutOfBlocks(f"{n} blocks asked for, {self.num_free_blocks} are free")
        self.settle()
        owner = _OUTSIDE if self.request is None else self.request
        groups = self._groups
        size = groups.size(owner) if owner in groups else 0
        groups.allocate(owner, size + n)
        table = groups.table(owner)
        if owner is _OUTSIDE:
            groups.detach(owner)
        self.num_free_blocks -= n
        blocks = self._blocks
        if n == 1:
            return [blocks[table[size]]]
        return [blocks[i] for i in table[size:].tolist()]

    def remove(self, block: Any) -> None:
        """Take this very block: its content has been hit."""
        self._taken.append(block.block_id)
        self.num_free_blocks -= 1

    def append(self, block: Any) -> None:
        """Give a block back."""
        self.append_n([block])

    def append_n(self, blocks: Sequence[Any]) -> None:
        """Give blocks back whose content may still be hit, the first to be used again first."""
        if marked := self._copied:
            self._free([block for block in blocks if block.block_id in marked], cached=False)
            blocks = [block for block in blocks if block.block_id not in marked]
        self._free(blocks, cached=True)

    def prepend_n(self, blocks: Sequence[Any]) -> None:
        """Give blocks back that mean nothing any more."""
        self._free(blocks, cached=False)

    @contextmanager
    def copied(self, ids: Iterable[int]) -> Iterator[None]:
        """What of these blocks becomes free meanwhile is given out before other cached content."""
        self._copied.update(ids)
        try:
            yield
        finally:
            self._copied.clear()

    def _free(self, blocks: Sequence[Any], *, cached: bool) -> None:
        if not blocks:
            return
        self.settle()
        # The tail of a table comes first here, and last there.
        ids = np.fromiter((block.block_id for block in reversed(blocks)), np.int32, len(blocks))
        self._groups.release(ids, cached=cached)
        self.num_free_blocks += len(blocks)

    def settle(self) -> None:
        """Book what has been hit since to the present request, or to nobody in particular."""
        if not self._taken:
            return
        ids = np.array(self._taken, np.int32)
        self._taken.clear()
        owner = _OUTSIDE if self.request is None else self.request
        self._groups.end_reservations(ids)
        self._groups.attach(owner, ids)
        if owner is _OUTSIDE:
            self._groups.detach(owner)

    def forget_content(self) -> None:
        """No free block's content can be hit any more."""
        self._groups.forget_cached(np.arange(len(self._blocks), dtype=np.int32))

    def forget_request(self, request: Hashable) -> None:
        """A request has ended, or was preempted: room reserved for its growth is free again."""
        if request in self._groups:
            self.settle()
            self._groups.detach(request)

    def get_all_free_blocks(self) -> list[Any]:
        """All free blocks, in no particular order."""
        self.settle()
        every = np.arange(len(self._blocks), dtype=np.int32)
        return [self._blocks[i] for i in every[self._groups.references(every) == 0].tolist()]

    def check_integrity(self) -> None:
        """Compare the groups with vLLM's reference counts; IntegrityError if they differ."""
        self._groups.check_integrity()
        free = {block.block_id for block in self.get_all_free_blocks()}
        assert len(free) == self.num_free_blocks
        assert free == {b.block_id for b in self._blocks if b.ref_cnt == 0 and not b.is_null}


def install_groups(manager: Any, *, first_group: int, headroom: float) -> GroupQueue:
    """Let `manager` (a ``KVCacheManager``) allocate in block groups; the queue that does it.

    Raises
    ------
    AttributeError
        vLLM is built otherwise than expected. Nothing has changed.
    """
    pool = manager.block_pool
    managers = list(manager.coordinator.single_type_managers)
    names = ("allocate_new_blocks", "allocate_external_computed_blocks")
    ends = "pop_blocks_for_free"
    missing = [n for m in managers for n in (*names, ends) if not callable(getattr(m, n, None))]
    if missing:
        raise AttributeError(f"vLLM's cache manager has no {missing[0]}")
    queue = GroupQueue(
        pool.blocks,
        pool.free_block_queue.get_all_free_blocks(),
        first_group=first_group,
        headroom=headroom,
    )

    def on_behalf(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def allocate(request_id: str, *args: Any, **kwargs: Any) -> Any:
            queue.request = request_id
            try:
                return call(request_id, *args, **kwargs)
            finally:
                queue.request = None

        return allocate

    def and_forget(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def free(request_id: str, *args: Any, **kwargs: Any) -> Any:
            queue.forget_request(request_id)
            return call(request_id, *args, **kwargs)

        return free

    for one in managers:
        for name in names:
            setattr(one, name, on_behalf(getattr(one, name)))
        setattr(one, ends, and_forget(getattr(one, ends)))
    pool.free_block_queue = queue
    return queue


class VllmPool:
    """vLLM's block pool as `EnginePool`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @property
    def caches(self) -> bool:
        """Whether free blocks keep their content's hash."""
        return bool(self._pool.enable_caching)

    @property
    def free_blocks(self) -> int:
        """Blocks that are free."""
        return int(self._pool.get_num_free_blocks())

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block."""
        every = self._pool.blocks
        self._pool.touch([every[block] for block in blocks])
        if isinstance(queue := self._pool.free_block_queue, GroupQueue):
            queue.settle()  # not to the next request that takes some

    def release(self, blocks: Sequence[int], *, copied: bool = False) -> None:
        """Take a reference from each; those without any are free, the tail to be used first."""
        every = self._pool.blocks
        queue = self._pool.free_block_queue
        with queue.copied(blocks) if copied and isinstance(queue, GroupQueue) else nullcontext():
            self._pool.free_blocks([every[block] for block in reversed(blocks)])

    def keep(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> int:
        """Hold the leading blocks that are still cached under `keys`."""
        from vllm.v1.core.kv_cache_utils import get_block_hash

        every = self._pool.blocks
        count = 0
        for block, key in zip(blocks, keys, strict=True):
            known = every[block].block_hash
            if known is None or get_block_hash(known) != key:
                break
            count += 1
        self.hold(blocks[:count])
        return count

"""Which host blocks hold a valid copy of whose KV cache (paper section 3.3, KV reuse).

An *owner* (a request or a conversation) has a table of host blocks, as a sequence has one of device
blocks. Its valid copies are always a prefix, so one token count says which they are::

    host table     | b0 | b1 | b2 | b3 | b4 |  (tail reserved by the pool for the next turn)
    valid tokens    ==========                  32 tokens of 16 a block: b0 and b1
    pending fill              |~~~~~~~~~~~~|    a swap-out under way: b2 (overwritten) to b4

A swap-out sends only what lies behind the valid prefix; a swap-in leaves the copies where they are.
When the host runs out, copies of others are *contaminated*: their blocks are taken, tail first, and
their owner's valid prefix shrinks. Full copies may be *published* under a content key and *adopted*
by other owners; one host block then serves several of them. While a copy is still being written,
its keys are *announced* and others *follow* its fill, so that what several share is sent once.

Nothing here touches bytes: `Fill` and `Lease` name the host blocks that a transfer writes or reads
and keep them out of the pool until the transfer has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby

import numpy as np

from kvswitch.copies.keys import PendingKeys
from kvswitch.copies.owners import Fill, Lease, Owner
from kvswitch.copies.tables import HostTables
from kvswitch.errors import (
    ConfigError,
    HostMemoryExhausted,
    IntegrityError,
    InvalidTransition,
    UnknownSequence,
)
from kvswitch.messages import BlockIds

__all__ = ["HostCopies"]

_NO_BLOCKS: BlockIds = np.empty(0, np.int32)


class HostCopies:
    """Validity, ownership and reuse of host copies over one host pool.

    Parameters
    ----------
    num_blocks : int
        Host blocks.
    block_tokens : int
        Token slots in a block.
    first_group : int
        Expected size of an owner's first block group, in blocks.
    on_lost : callable, optional
        Called by `begin` with (owner, valid tokens left) for each owner whose copies it has taken.
        Must not change the copies.

    Attributes
    ----------
    pool : BlockGroupPool
        The host blocks; an owner's table is that of the sequence of the same id.

    Raises
    ------
    ConfigError
        If a parameter is out of its range.
    """

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        *,
        first_group: int = 60,
        on_lost: Callable[[Hashable, int], None] | None = None,
    ) -> None:
        if block_tokens < 1:
            raise ConfigError(f"block_tokens must be at least 1, got {block_tokens}")
        self.block_tokens = block_tokens
        self._tables = HostTables(num_blocks, block_tokens, first_group, on_lost)
        self._owners = self._tables.owners
        self._keys = self._tables.keys
        self.pool = self._tables.pool
        self._pending = PendingKeys()
        self._held: set[Fill | Lease] = set()

    # -- questions -----------------------------------------------------------------------------

    def __contains__(self, owner: Hashable) -> bool:
        return owner in self._owners

    def __len__(self) -> int:
        return len(self._owners)

    def valid(self, owner: Hashable) -> int:
        """Tokens of `owner` that the host holds (0 for an unknown owner)."""
        entry = self._owners.get(owner)
        return entry.valid if entry else 0

    def covered(self, owner: Hashable) -> int:
        """Tokens that will be valid once every pending fill of `owner` is committed."""
        entry = self._owners.get(owner)
        return entry.covered(self.block_tokens) if entry else 0

    def table(self, owner: Hashable) -> BlockIds:
        """Host blocks of `owner`, in order; those behind the valid prefix mean nothing yet.

        Raises
        ------
        UnknownSequence
            There is no such owner.
        """
        return self._tables.of(self._get(owner))

    @property
    def contaminated_blocks(self) -> int:
        """Host blocks taken from owners so far, to be given to others."""
        return self._tables.contaminated_blocks

    def num_leases(self) -> int:
        """Fills and leases that hold blocks: 0 when no transfer is under way."""
        return len(self._held)

    # -- writing a copy --------------------------------------------------------------------------

    def begin(self, owner: Hashable, tokens: int) -> Fill:
        """Get host blocks for a swap-out that completes `owner`'s copy up to `tokens`.

        The valid prefix is lowered to the block boundary before what will be overwritten, and
        raised again by `commit`. If no blocks are free, it takes those of others: lowest priority
        first, redundant copies before only ones, least recently used first, tail before head. If
        not all can be had, the fill covers as many leading tokens as can.

        Raises
        ------
        HostMemoryExhausted
            Not a single block can be had. Nothing has changed.
        InvalidTransition
            `tokens` is negative.
        """
        if tokens < 0:
            raise InvalidTransition(f"cannot copy {tokens} tokens of {owner!r}")
        entry = self._owners.get(owner)
        covered = entry.covered(self.block_tokens) if entry else 0
        first = covered // self.block_tokens
        if tokens <= covered:
            return Fill(entry or self._owners.add(owner), first, _NO_BLOCKS, covered)
        table = self._tables.of(entry)
        keep = len(table)
        if keep > first and self.pool.references(table[first:])[0] > 1:
            # The block to go on in is shared or leased: it is not overwritten, but replaced.
            keep = first
        last = self._blocks(tokens)
        granted = min(last, keep + self._tables.make_room(last - keep, entry))
        if granted == first:
            raise HostMemoryExhausted(
                f"nothing of {owner!r} ({tokens} tokens) can be held: all {self.pool.num_blocks} "
                "host blocks have copies of equal or higher priority, or are being copied. "
                "Recompute it, free what has ended or lower its priority, or give kvswitch more "
                "host memory"
            )
        entry = entry or self._owners.add(owner)
        self._owners.touch(entry)
        if keep < len(table):
            self._tables.cut(entry, keep)
        blocks = self._tables.grow(entry, granted, first)
        self.pool.hold(blocks)
        entry.limit(first * self.block_tokens)
        fill = Fill(entry, first, blocks, min(tokens, granted * self.block_tokens))
        entry.fills.append(fill)
        self._held.add(fill)
        return fill

    def commit(self, fill: Fill) -> None:
        """The bytes of `fill` have arrived: its tokens become valid, once those before it are.

        Raises
        ------
        InvalidTransition
            It has ended already.
        """
        self._end(fill, committed=True)

    def abort(self, fill: Fill) -> None:
        """The bytes of `fill` will not arrive: what it would have made valid stays invalid.

        Raises
        ------
        InvalidTransition
            It has ended already.
        """
        self._end(fill, committed=False)

    def _end(self, fill: Fill, *, committed: bool) -> None:
        if fill._ended:
            raise InvalidTransition("this fill has been committed or aborted already")
        fill._ended = True
        fill.committed = committed
        if not len(fill.blocks):
            return
        self._held.remove(fill)
        self._pending.withdraw(fill)
        self._tables.release(fill.blocks)
        entry = fill._owner
        if self._owners.get(entry.id) is not entry:
            return
        if committed:
            entry.settle(self.block_tokens)
        else:
            entry.fills.remove(fill)
            entry.settle(self.block_tokens)
            self._trim(entry)

    # -- changing what is valid ------------------------------------------------------------------

    def truncate(self, owner: Hashable, tokens: int) -> None:
        """Only the first `tokens` of `owner` still mean what the copy holds.

        Raises
        ------
        InvalidTransition
            `tokens` is negative.
        """
        if tokens < 0:
            raise InvalidTransition(f"cannot truncate {owner!r} to {tokens} tokens")
        if entry := self._owners.get(owner):
            entry.limit(tokens)
            for fill in entry.fills:
                self._pending.withdraw(fill, tokens // self.block_tokens)
            self._trim(entry)

    def drop(self, owner: Hashable) -> None:
        """Forget `owner`. What it published can be adopted until its blocks are given out again.

        Raises
        ------
        UnknownSequence
            There is no such owner.
        """
        entry = self._get(owner)
        for fill in entry.fills:
            self._pending.withdraw(fill)
        self._tables.cut(entry, 0)
        self._owners.remove(entry)

    def invalidate_all(self) -> None:
        """No copy is valid any more: the weights have changed, or the engine reset its cache.

        Leases and fills under way hold their blocks until they end, but what they read or write
        counts for nothing.
        """
        self._keys.clear()
        self._pending.clear()
        self.pool.forget_cached(np.arange(self.pool.num_blocks, dtype=np.int32))
        for entry in self._owners:
            self._tables.cut(entry, 0)

    def _trim(self, entry: Owner) -> None:
        """Give back blocks behind everything valid or pending."""
        self._tables.cut(entry, self._blocks(entry.covered(self.block_tokens)))

    # -- content keys ----------------------------------------------------------------------------

    def publish(self, owner: Hashable, index: int, key: Hashable) -> bool:
        """Let others adopt `owner`'s `index`-th copy under `key`; False if another copy has it.

        A key must name all tokens up to its block's end, the tenant's salt included.

        Raises
        ------
        UnknownSequence
            There is no such owner.
        InvalidTransition
            That copy is not full, or not committed.
        """
        entry = self._get(owner)
        if not 0 <= index < entry.valid // self.block_tokens:
            raise InvalidTransition(
                f"copy {index} of {owner!r} is not a full, committed one: "
                f"{entry.valid} tokens are valid"
            )
        return self._keys.add(key, int(self.pool.table(owner)[index]), index)

    def match(self, keys: Sequence[Hashable]) -> int:
        """How many leading `keys` name copies that can be adopted."""
        return len(self._keys.find(keys))

    def reach(self, owner: Hashable, keys: Sequence[Hashable] = ()) -> int:
        """Tokens that `owner` would have, pending fills included, after `adopt` of `keys`. Pure."""
        entry = self._owners.get(owner)
        if entry is None:
            return len(self._keys.find(keys)) * self.block_tokens
        covered = entry.covered(self.block_tokens)
        have = covered // self.block_tokens
        if entry.fills or len(keys) <= have:
            return covered
        found = len(self._keys.find(keys, have))
        return (have + found) * self.block_tokens if found else covered

    def adopt(self, owner: Hashable, keys: Sequence[Hashable]) -> int:
        """Make `owner` an owner of the copies published under its `keys`.

        Full copies that `owner` has already stay as they are, and the first key behind them that
        names none ends the search. While a fill is pending, nothing is adopted.

        Parameters
        ----------
        keys : sequence of Hashable
            Keys of its leading full blocks, from the first one on.

        Returns
        -------
        int
            Valid tokens of `owner` afterwards.
        """
        entry = self._owners.get(owner)
        if entry and entry.fills:
            return entry.valid
        have = entry.valid // self.block_tokens if entry else 0
        blocks = np.array(self._keys.find(keys, have), np.int32)
        if not len(blocks):
            return entry.valid if entry else 0
        entry = self._extend(owner, have, blocks)
        entry.valid = (have + len(blocks)) * self.block_tokens
        return entry.valid

    def announce(self, fill: Fill, keys: Sequence[Hashable]) -> None:
        """Let others `follow` a pending fill of its own blocks.

        No longer from where its owner is truncated, nor once it is dropped: the bytes may change
        then, or not be sent.

        Parameters
        ----------
        keys : sequence of Hashable
            Keys of its owner's leading full blocks, from the first one on.
        """
        if fill in self._held:
            self._pending.announce(fill, keys[fill.first : fill.tokens // self.block_tokens])

    def follow(self, owner: Hashable, keys: Sequence[Hashable]) -> list[Fill]:
        """Make `owner` an owner of copies that other owners' fills are about to write.

        To be called after `adopt`, with the same keys; as there, nothing is found while a fill of
        its own is pending, and full copies that it has already stay as they are.

        Returns
        -------
        list of Fill
            Each must be committed or aborted when its `source` is.
        """
        entry = self._owners.get(owner)
        if entry and entry.fills:
            return []
        have = entry.valid // self.block_tokens if entry else 0
        fills = []
        for source, found in groupby(self._pending.find(keys, have)):
            count = len(list(found))
            blocks = source.blocks[have - source.first :][:count]
            entry = self._extend(owner, have, blocks)
            have += count
            fill = Fill(entry, have - count, blocks, have * self.block_tokens, source=source)
            self.pool.hold(blocks)
            entry.fills.append(fill)
            self._held.add(fill)
            fills.append(fill)
        return fills

    def _extend(self, owner: Hashable, have: int, blocks: BlockIds) -> Owner:
        """Put others' blocks in `owner`'s table, behind the `have` that stay."""
        entry = self._owners.get(owner) or self._owners.add(owner)
        self._owners.touch(entry)
        self._tables.cut(entry, have)
        self._tables.attach(entry, blocks)
        return entry

    # -- reading a copy --------------------------------------------------------------------------

    def pin(self, owner: Hashable, tokens: int) -> Lease:
        """Keep the bytes of `owner`'s first `tokens` where they are until the lease is released.

        Tokens of a pending fill may be pinned too: the reader must come after that fill's transfer.

        Raises
        ------
        UnknownSequence
            There is no such owner.
        InvalidTransition
            The host does not hold so many.
        """
        entry = self._get(owner)
        covered = entry.covered(self.block_tokens)
        if not 0 <= tokens <= covered:
            raise InvalidTransition(f"cannot pin {tokens} tokens of {owner!r}: there are {covered}")
        lease = Lease(self._tables.of(entry)[: self._blocks(tokens)])
        self.pool.hold(lease.blocks)
        self._held.add(lease)
        self._owners.touch(entry)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease.

        Raises
        ------
        InvalidTransition
            It has ended already: the blocks may be somebody else's by now.
        """
        if lease._released:
            raise InvalidTransition("this lease has been released already")
        lease._released = True
        self._held.remove(lease)
        self._tables.release(lease.blocks)

    # -- who loses host memory first ---------------------------------------------------------------

    def set_priority(self, owner: Hashable, priority: float) -> None:
        """Set how much `owner` matters; larger is more. Creates the owner if need be."""
        entry = self._owners.get(owner) or self._owners.add(owner)
        self._owners.priority[entry.row] = priority

    def set_resident(self, owner: Hashable, resident: bool) -> None:
        """Say whether `owner`'s KV is also on the device: its copies are then redundant."""
        if entry := self._owners.get(owner):
            self._owners.resident[entry.row] = resident
            self._owners.touch(entry)

    # -- bookkeeping -----------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves. Linear in the pool."""
        self._tables.check_integrity()
        self._pending.check_integrity(self._held)
        references = np.zeros(self.pool.num_blocks, np.int32)
        for held in self._held:
            references[held.blocks] += 1
        for entry in self._owners:
            table = self._tables.of(entry)
            references[table] += 1
            if len(table) != self._blocks(entry.covered(self.block_tokens)):
                raise IntegrityError(
                    f"{entry.id!r} has {len(table)} host blocks for "
                    f"{entry.covered(self.block_tokens)} tokens"
                )
            if any(not fill.committed and fill not in self._held for fill in entry.fills):
                raise IntegrityError(f"{entry.id!r} waits for a fill that has ended")
        actual = self.pool.references(np.arange(self.pool.num_blocks, dtype=np.int32))
        if (wrong := np.flatnonzero(actual != references)).size:
            raise IntegrityError(f"leaked or lost references on host blocks {wrong[:8].tolist()}")

    def _get(self, owner: Hashable) -> Owner:
        entry = self._owners.get(owner)
        if entry is None:
            raise UnknownSequence(f"no copies of {owner!r}")
        return entry

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

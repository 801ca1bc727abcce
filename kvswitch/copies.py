"""Which host blocks hold a valid copy of whose KV cache (paper section 3.3, KV reuse).

An *owner* (a request or a conversation) has a table of host blocks, as a sequence has one of device
blocks. Its valid copies are always a prefix, so one token count says which they are::

    host table     | b0 | b1 | b2 | b3 | b4 |  (tail reserved by the pool for the next turn)
    valid tokens    ================            37 tokens of 16 a block: b0, b1 whole, b2 in part
    pending fill              |~~~~~~~~~|       a swap-out under way: b2 (overwritten) to b4

A swap-out sends only what lies behind the valid prefix; a swap-in leaves the copies where they are.
When the host runs out, copies of others are *contaminated*: their blocks are taken, tail first, and
their owner's valid prefix shrinks. Full copies may be *published* under a content key and *adopted*
by other owners; one host block then serves several of them.

Nothing here touches bytes: `Fill` and `Lease` name the host blocks that a transfer writes or reads
and keep them out of the pool until the transfer has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvswitch.blocks import BlockGroupPool
from kvswitch.errors import (
    ConfigError,
    HostMemoryExhausted,
    IntegrityError,
    InvalidTransition,
    UnknownSequence,
)
from kvswitch.messages import BlockIds

__all__ = ["Fill", "HostCopies", "Lease"]


@dataclass(slots=True, eq=False)
class _Owner:
    """What one owner has. `row` is its place in the arrays that order contamination."""

    id: Hashable
    row: int
    valid: int = 0
    fills: list[Fill] = field(default_factory=list)
    pins: list[Lease] = field(default_factory=list)
    gone: bool = False


@dataclass(slots=True, eq=False)
class Fill:
    """Host blocks that a swap-out is about to write; pending until `commit` or `abort`.

    Attributes
    ----------
    first : int
        Index, in the owner's table, of the first block to write.
    blocks : BlockIds
        The host blocks to write, in order; empty if the copy is complete already.
    tokens : int
        Valid tokens of the owner once this is committed. Less than was asked for if the host
        could not hold all; lowered by a truncation meanwhile.
    """

    _owner: _Owner
    first: int
    blocks: BlockIds
    tokens: int
    committed: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class Lease:
    """Host blocks that a swap-in reads; they keep their bytes until `HostCopies.release`."""

    _owner: _Owner
    blocks: BlockIds
    released: bool = False


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
        Called with (owner, valid tokens left) whenever copies are contaminated.
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
        self.pool = BlockGroupPool(num_blocks, first_group=first_group)
        self.block_tokens = block_tokens
        self.contaminated_blocks = 0
        self._on_lost = on_lost
        self._owners: dict[Hashable, _Owner] = {}
        # One row an owner: who loses copies first is decided by sorting these.
        self._priority = np.zeros(64)
        self._last_use = np.zeros(64, np.int64)
        self._resident = np.zeros(64, np.bool_)
        self._live = np.zeros(64, np.bool_)
        self._row_owner: list[_Owner | None] = [None] * 64
        self._free_rows = list(range(63, -1, -1))
        self._clock = 0
        # Transfers under way for owners that are gone.
        self._orphans: set[Fill | Lease] = set()
        # Content keys of full copies, by block and back. A key outlives its owner: a freed block
        # can be adopted until it is given out again.
        self._block_of: dict[Hashable, int] = {}
        self._key_of: list[Hashable | None] = [None] * num_blocks
        self._has_key = np.zeros(num_blocks, np.bool_)
        # Row of a block's only owner (-1: none); blocks with more are in `_sharers`.
        self._owner_row = np.full(num_blocks, -1, np.int32)
        self._sharers: dict[int, set[_Owner]] = {}

    # -- questions ---------------------------------------------------------------------------

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
        return _covered(entry) if entry else 0

    def table(self, owner: Hashable) -> BlockIds:
        """Host blocks of `owner`, in order; those behind the valid prefix mean nothing yet."""
        self._get(owner)
        return self.pool.table(owner) if owner in self.pool else np.empty(0, np.int32)

    def num_leases(self) -> int:
        """Fills and leases not yet ended: 0 when no transfer is under way."""
        return sum(1 for _ in self._leases())

    def _leases(self) -> Iterator[Fill | Lease]:
        yield from self._orphans
        for entry in self._owners.values():
            yield from entry.fills
            yield from entry.pins

    # -- writing a copy ----------------------------------------------------------------------

    def begin(self, owner: Hashable, tokens: int) -> Fill:
        """Get host blocks for a swap-out that completes `owner`'s copy up to `tokens`.

        The valid prefix is lowered to the block boundary before what will be overwritten, and
        raised again by `commit`. Takes blocks from others, in the order of `contaminate`, if none
        are free. If not all can be had, the fill covers as many leading tokens as can.

        Raises
        ------
        HostMemoryExhausted
            Not a single block can be had.
        """
        if tokens < 0:
            raise InvalidTransition(f"cannot copy {tokens} tokens of {owner!r}")
        known = self._owners.get(owner)
        entry = known or self._new_owner(owner)
        self._touch(entry)
        covered = _covered(entry)
        if tokens <= covered:
            return Fill(entry, covered // self.block_tokens, np.empty(0, np.int32), covered)
        first = covered // self.block_tokens
        last = -(-tokens // self.block_tokens)
        # A block that others own or a transfer reads is not overwritten: another takes its place.
        size = self.pool.size(owner) if owner in self.pool else 0
        keep = size
        if size > first:
            tail = self.pool.table(owner)[first:]
            keep = first if self.pool.references(tail).max() > 1 else min(size, last)
        granted = min(last, keep + self._find_room(last - keep, entry))
        if granted <= first:
            if known is None:
                self._forget(entry)
            raise HostMemoryExhausted(
                f"nothing of {owner!r} ({tokens} tokens) can be held: all {self.pool.num_blocks} "
                "host blocks have copies of equal or higher priority. Recompute it, or give "
                "kvswitch more host memory"
            )
        if keep < size:
            self._drop_tail(entry, keep)
        self.pool.allocate(owner, granted)
        blocks = self.pool.table(owner)[first:granted].copy()
        self._owner_row[blocks] = entry.row
        self._unpublish(blocks)
        self.pool.hold(blocks)
        boundary = first * self.block_tokens
        entry.valid = min(entry.valid, boundary)
        for earlier in entry.fills:
            earlier.tokens = min(earlier.tokens, boundary)
        fill = Fill(entry, first, blocks, min(tokens, granted * self.block_tokens))
        entry.fills.append(fill)
        return fill

    def commit(self, fill: Fill) -> None:
        """The bytes of `fill` have arrived: its tokens become valid."""
        fill.committed = True
        self._end(fill)

    def abort(self, fill: Fill) -> None:
        """The bytes of `fill` will not arrive: what it would have made valid stays invalid."""
        self._end(fill)

    def _end(self, fill: Fill) -> None:
        if fill.ended:
            raise InvalidTransition("this fill has ended already")
        fill.ended = True
        self._release_blocks(fill.blocks)
        entry = fill._owner
        if entry.gone:
            self._orphans.discard(fill)
            return
        if fill not in entry.fills:  # an empty fill: there was nothing to write
            return
        # Fills of one owner follow each other; a later one counts only on top of the earlier.
        while entry.fills and entry.fills[0].ended:
            done = entry.fills.pop(0)
            if done.committed and entry.valid >= done.first * self.block_tokens:
                entry.valid = max(entry.valid, done.tokens)
        self._trim(entry)

    # -- changing what is valid --------------------------------------------------------------

    def truncate(self, owner: Hashable, tokens: int) -> None:
        """Only the first `tokens` of `owner` still mean what the copy holds."""
        entry = self._owners.get(owner)
        if entry is None:
            return
        entry.valid = min(entry.valid, tokens)
        for fill in entry.fills:
            fill.tokens = min(fill.tokens, tokens)
        self._trim(entry)

    def drop(self, owner: Hashable) -> None:
        """Forget `owner`. What it published can be adopted until its blocks are given out again."""
        entry = self._owners.get(owner)
        if entry is None:
            raise UnknownSequence(f"no copies of {owner!r}")
        self._forget(entry)

    def invalidate_all(self) -> None:
        """No copy is valid any more: the weights have changed, or the engine reset its cache."""
        for entry in self._owners.values():
            entry.valid = 0
            for fill in entry.fills:
                fill.tokens = 0
            self._trim(entry)
        keyed = np.flatnonzero(self._has_key).astype(np.int32)
        self._unpublish(keyed)
        if len(keyed):
            self.pool.forget_cached(keyed[self.pool.references(keyed) == 0])

    # -- content keys ------------------------------------------------------------------------

    def publish(self, owner: Hashable, index: int, key: Hashable) -> bool:
        """Let others adopt `owner`'s `index`-th copy under `key`; False if `key` is taken.

        Raises
        ------
        InvalidTransition
            That copy is not full, or not committed.
        """
        entry = self._get(owner)
        if not 0 <= index < entry.valid // self.block_tokens:
            raise InvalidTransition(
                f"copy {index} of {owner!r} is not a full, committed one: "
                f"{entry.valid} tokens are valid"
            )
        block = int(self.pool.table(owner)[index])
        if key in self._block_of:
            return self._block_of[key] == block
        if self._has_key[block]:
            del self._block_of[self._key_of[block]]
        self._block_of[key] = block
        self._key_of[block] = key
        self._has_key[block] = True
        return True

    def match(self, keys: Sequence[Hashable]) -> int:
        """How many leading `keys` name copies that can be adopted."""
        for n, key in enumerate(keys):
            if key not in self._block_of:
                return n
        return len(keys)

    def adopt(self, owner: Hashable, keys: Sequence[Hashable]) -> int:
        """Make `owner` an owner of the copies published under the leading `keys`.

        Copies that `owner` has already stay as they are; a pending fill is not touched.

        Returns
        -------
        int
            Valid tokens of `owner` afterwards.
        """
        entry = self._owners.get(owner)
        have = entry.valid // self.block_tokens if entry else 0
        found = self.match(keys)
        if found <= have or (entry and entry.fills):
            return entry.valid if entry else 0
        blocks = np.array([self._block_of[key] for key in keys[have:found]], np.int32)
        entry = entry or self._new_owner(owner)
        self._drop_tail(entry, have)
        self._attach(entry, blocks)
        entry.valid = found * self.block_tokens
        self._touch(entry)
        return entry.valid

    def _attach(self, entry: _Owner, blocks: BlockIds) -> None:
        rows = self._owner_row[blocks]
        self._owner_row[blocks[rows < 0]] = entry.row
        for block, row in zip(blocks[rows >= 0].tolist(), rows[rows >= 0].tolist(), strict=True):
            self._sharers.setdefault(block, {self._owner_at(row)}).add(entry)
        self.pool.attach(entry.id, blocks)

    # -- reading a copy ----------------------------------------------------------------------

    def pin(self, owner: Hashable, tokens: int) -> Lease:
        """Keep the bytes of `owner`'s first `tokens` where they are until the lease is released.

        Tokens of a pending fill may be pinned too: the reader must come after that fill's transfer.
        """
        entry = self._get(owner)
        if tokens > _covered(entry):
            raise InvalidTransition(
                f"cannot pin {tokens} tokens of {owner!r}: the host has {_covered(entry)}"
            )
        blocks = self.table(owner)[: -(-tokens // self.block_tokens)].copy()
        self.pool.hold(blocks)
        self._touch(entry)
        lease = Lease(entry, blocks)
        entry.pins.append(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease. Ending it twice is an error: the blocks may be somebody else's by then."""
        if lease.released:
            raise InvalidTransition("this lease has been released already")
        lease.released = True
        self._release_blocks(lease.blocks)
        if lease._owner.gone:
            self._orphans.discard(lease)
        else:
            lease._owner.pins.remove(lease)

    # -- who loses host memory first -----------------------------------------------------------

    def set_priority(self, owner: Hashable, priority: float) -> None:
        """Set how much `owner` matters; larger is more. Creates the owner if need be."""
        entry = self._owners.get(owner) or self._new_owner(owner)
        self._priority[entry.row] = priority

    def set_resident(self, owner: Hashable, resident: bool) -> None:
        """Say whether `owner`'s KV is also on the device: its copies are then redundant."""
        entry = self._owners.get(owner)
        if entry is not None:
            self._resident[entry.row] = resident
            self._touch(entry)

    def _find_room(self, blocks: int, taker: _Owner) -> int:
        """Free up to `blocks` host blocks for `taker`; how many can be allocated now."""
        short = blocks - self.pool.free_blocks
        if short > 0:
            self._contaminate(short, taker)
        return min(blocks, self.pool.free_blocks)

    def _contaminate(self, blocks: int, taker: _Owner) -> None:
        """Take `blocks` host blocks from others.

        First from the lowest priority, redundant copies before only ones, least recently used
        first, tail before head. Equals give redundant copies only; nobody of higher priority gives.
        A copy with several owners counts as its highest owner's.
        """
        limit = self._priority[taker.row]
        may = self._live & ((self._priority < limit) | ((self._priority == limit) & self._resident))
        may[taker.row] = False
        rows = np.flatnonzero(may)
        keys = (self._last_use[rows], ~self._resident[rows], self._priority[rows])
        for row in rows[np.lexsort(keys)].tolist():
            blocks -= self._peel(self._owner_at(row), blocks, may)
            if blocks <= 0:
                return

    def _peel(self, entry: _Owner, want: int, may: npt.NDArray[np.bool_]) -> int:
        """Take up to `want` blocks off the tail of `entry`'s copies; how many became free."""
        if entry.fills or entry.id not in self.pool:
            return 0
        table = self.pool.table(entry.id)
        references = self.pool.references(table)
        floor = max((len(lease.blocks) for lease in entry.pins), default=0)
        size = len(table)
        losers = {entry}
        while size > floor and len(table) - size < want:
            if references[size - 1] > 1:
                # Leased by a transfer, or shared: then every owner must be one that may lose, and
                # `entry` the last of them in the order.
                owners = self._sharers.get(int(table[size - 1]), set())
                if len(owners) < references[size - 1] or any(
                    not may[o.row] or o.fills or o.pins or self._rank(o) > self._rank(entry)
                    for o in owners
                ):
                    break
                losers |= owners
            size -= 1
        freed = len(table) - size
        if freed:
            self.contaminated_blocks += freed
            for loser in losers:
                self._drop_tail(loser, size)
                loser.valid = min(loser.valid, size * self.block_tokens)
                if self._on_lost:
                    self._on_lost(loser.id, loser.valid)
        return freed

    def _rank(self, entry: _Owner) -> tuple[float, bool, int]:
        """Place in the order of contamination; the smallest loses first."""
        row = entry.row
        return float(self._priority[row]), not self._resident[row], int(self._last_use[row])

    # -- bookkeeping ---------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves."""
        self.pool.check_integrity()
        references = np.zeros(self.pool.num_blocks, np.int32)
        owned: dict[int, set[_Owner]] = {}
        for owner, entry in self._owners.items():
            table = self.table(owner)
            if len(table) * self.block_tokens < entry.valid:
                raise IntegrityError(f"{owner!r}: {entry.valid} tokens in {len(table)} blocks")
            references[table] += 1
            for block in table.tolist():
                owned.setdefault(block, set()).add(entry)
        for held in self._leases():
            np.add.at(references, held.blocks, 1)
        actual = self.pool.references(np.arange(self.pool.num_blocks, dtype=np.int32))
        if (wrong := np.flatnonzero(actual != references)).size:
            raise IntegrityError(f"leaked or lost references on host blocks {wrong[:8].tolist()}")
        for block in range(self.pool.num_blocks):
            row = int(self._owner_row[block])
            recorded = self._sharers.get(block) or ({self._owner_at(row)} if row >= 0 else set())
            if recorded != owned.get(block, set()):
                raise IntegrityError(f"host block {block}: the owners on record are not its owners")
        if set(self._block_of.values()) != set(np.flatnonzero(self._has_key).tolist()):
            raise IntegrityError("content keys and blocks disagree")

    def _get(self, owner: Hashable) -> _Owner:
        try:
            return self._owners[owner]
        except KeyError:
            raise UnknownSequence(f"no copies of {owner!r}") from None

    def _new_owner(self, owner: Hashable) -> _Owner:
        if not self._free_rows:
            rows = len(self._row_owner)
            self._priority = np.resize(self._priority, 2 * rows)
            self._last_use = np.resize(self._last_use, 2 * rows)
            self._resident = np.resize(self._resident, 2 * rows)
            self._live = np.resize(self._live, 2 * rows)
            self._live[rows:] = False
            self._row_owner.extend([None] * rows)
            self._free_rows = list(range(2 * rows - 1, rows - 1, -1))
        entry = _Owner(owner, self._free_rows.pop())
        self._priority[entry.row] = 0.0
        self._resident[entry.row] = False
        self._live[entry.row] = True
        self._row_owner[entry.row] = entry
        self._owners[owner] = entry
        self._touch(entry)
        return entry

    def _forget(self, entry: _Owner) -> None:
        self._drop_tail(entry, 0)
        entry.gone = True
        self._orphans.update(entry.fills, entry.pins)
        del self._owners[entry.id]
        self._live[entry.row] = False
        self._row_owner[entry.row] = None
        self._free_rows.append(entry.row)

    def _owner_at(self, row: int) -> _Owner:
        entry = self._row_owner[row]
        assert entry is not None
        return entry

    def _touch(self, entry: _Owner) -> None:
        self._clock += 1
        self._last_use[entry.row] = self._clock

    def _trim(self, entry: _Owner) -> None:
        """Give back table blocks behind everything valid or pending."""
        self._drop_tail(entry, -(-_covered(entry) // self.block_tokens))

    def _drop_tail(self, entry: _Owner, size: int) -> None:
        """Cut `entry`'s table to `size` blocks."""
        if entry.id not in self.pool:
            return
        tail = self.pool.table(entry.id)[size:].copy()
        if not len(tail) and size:
            return
        self.pool.hold(tail)
        if size:
            self.pool.truncate(entry.id, size)
        else:
            self.pool.free(entry.id)
        alone = self._owner_row[tail] == entry.row
        if self._sharers:
            for place, block in enumerate(tail.tolist()):
                sharers = self._sharers.get(block)
                if sharers is None:
                    continue
                sharers.discard(entry)
                alone[place] = False
                if len(sharers) == 1:
                    self._owner_row[block] = sharers.pop().row
                    del self._sharers[block]
        self._owner_row[tail[alone]] = -1
        self._release_blocks(tail)

    def _release_blocks(self, blocks: BlockIds) -> None:
        """Give up one reference; a freed block with a key can still be adopted, so goes last."""
        keyed = self._has_key[blocks]
        if keyed.any():
            self.pool.release(blocks[keyed], cached=True)
            blocks = blocks[~keyed]
        self.pool.release(blocks)

    def _unpublish(self, blocks: BlockIds) -> None:
        for block in blocks[self._has_key[blocks]].tolist():
            del self._block_of[self._key_of[block]]
            self._key_of[block] = None
            self._has_key[block] = False


def _covered(entry: _Owner) -> int:
    return max([entry.valid, *(fill.tokens for fill in entry.fills)])

"""HostCopies against a shadow model that holds what was written into every host block.

The model knows nothing of how validity is kept. It writes down, block by block, the tokens whose
KV a swap-out brought there (or garbage, for blocks given out and not committed), and holds that
against what `HostCopies` claims to be valid. Whose blocks are taken when memory is short it works
out block by block, from the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count, groupby, islice, takewhile
from operator import eq
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvswitch.blocks import BlockGroupPool
from kvswitch.copies import Fill, HostCopies, Lease
from kvswitch.copies.keys import ContentKeys, PendingKeys
from kvswitch.copies.owners import Owner, Owners
from kvswitch.errors import HostMemoryExhausted, InvalidTransition, OutOfBlocks
from kvswitch.messages import BlockIds

NUM_BLOCKS = 20
BLOCK_TOKENS = 4
NAMES = st.sampled_from("abcde")
SHARES = st.integers(0, 12).map(lambda twelfths: 1 - twelfths / 12)
PRIORITIES = st.integers(0, 3)
LENGTHS = st.integers(1, 8 * BLOCK_TOKENS)
BOOLEANS = st.booleans()
Key: TypeAlias = tuple[int, ...]
Mask: TypeAlias = npt.NDArray[np.bool_]
Rows: TypeAlias = npt.NDArray[np.intp]
Content: TypeAlias = dict[int, tuple[object, ...]]
GARBAGE: tuple[object, ...] = ("garbage",) * BLOCK_TOKENS


@dataclass
class Shadow:
    """An owner as the engine sees it: its tokens, and what was last said about it."""

    tokens: list[int]
    priority: float = 0.0
    resident: bool = False
    used: int = 0

    def rank(self) -> tuple[float, bool, int]:
        return self.priority, not self.resident, self.used


@dataclass(eq=False)
class Pending:
    """A fill, and the tokens whose KV it brings, block by block."""

    name: str
    fill: Fill
    brings: list[tuple[object, ...]]
    followers: list[Pending] = field(default_factory=list)


@dataclass(eq=False)
class Reading:
    """A lease, and what its blocks held when it was taken (None: a fill is to write them first)."""

    lease: Lease
    holds: list[tuple[object, ...] | None]


owned = precondition(lambda machine: machine.owners)


class CopiesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lost: list[tuple[Hashable, int]] = []
        self.copies = HostCopies(
            NUM_BLOCKS,
            BLOCK_TOKENS,
            first_group=3,
            on_lost=lambda owner, left: self.lost.append((owner, left)),
        )
        self.owners: dict[str, Shadow] = {}
        self.content: Content = {}
        self.pending: list[Pending] = []
        self.reading: list[Reading] = []
        self.keys: dict[Key, int] = {}  # published: key -> block
        self.announced: dict[Key, tuple[Pending, int]] = {}  # which will be the how-many-eth block
        self.fresh = count()
        self.clock = count(1)
        self.weights = 0
        self.contaminated = 0

    # -- the model ---------------------------------------------------------------------------

    def table(self, name: str) -> list[int]:
        return self.copies.table(name).tolist() if name in self.owners else []

    def leased(self) -> Counter[int]:
        held: Counter[int] = Counter()
        for pending in self.pending:
            held.update(pending.fill.blocks.tolist())
        for reading in self.reading:
            held.update(reading.lease.blocks.tolist())
        return held

    def used_blocks(self) -> set[int]:
        return {*self.leased()}.union(*map(self.table, self.owners))

    def content_of(self, tokens: list[int], index: int) -> tuple[object, ...]:
        """What the KV of a sequence's block looks like, with the present weights."""
        part = tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        return tuple((self.weights, index, token) for token in part)

    def keys_of(self, name: str) -> list[Key]:
        """True content keys: all tokens up to a block's end. The tenant's salt would go here."""
        tokens = self.owners[name].tokens
        ends = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
        return [tuple(tokens[:end]) for end in ends]

    def good_tokens(self, name: str, content: Content) -> int:
        """How many leading tokens of `name` its host blocks really hold."""
        tokens = self.owners[name].tokens
        good = 0
        for index, block in enumerate(self.table(name)):
            wanted = self.content_of(tokens, index)
            found = content.get(block, GARBAGE)
            same = sum(1 for _ in takewhile(bool, map(eq, wanted, found)))
            good += same
            if same < BLOCK_TOKENS:
                break
        return good

    def any_owner(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.owners)))

    def losers(self, taker: str, short: int) -> tuple[dict[str, int], int]:
        """Blocks left to each owner after `short` have been taken for `taker`, and how many were.

        One block at a time: of all blocks that may go (not leased, last of all their owners, and
        every owner may lose), that whose highest owner is lowest.
        """
        leased = self.leased()
        tables = {name: self.table(name) for name in self.owners}
        mine = self.owners[taker].priority

        def may_lose(name: str) -> bool:
            other = self.owners[name]
            redundant = other.resident and other.priority == mine
            return name != taker and (other.priority < mine or redundant)

        taken = 0
        while taken < short:
            may_go = []
            for block in {table[-1] for table in tables.values() if table} - leased.keys():
                shared_by = [other for other, table in tables.items() if block in table]
                last_of_all = all(tables[other][-1] == block for other in shared_by)
                if last_of_all and all(map(may_lose, shared_by)):
                    may_go.append((max(self.owners[o].rank() for o in shared_by), shared_by))
            if not may_go:
                break
            for name in min(may_go)[1]:
                tables[name] = tables[name][:-1]
            taken += 1
        return {name: len(table) for name, table in tables.items()}, taken

    # -- swap-outs ---------------------------------------------------------------------------

    @rule(name=NAMES, parts=st.lists(LENGTHS, min_size=1, max_size=3), priority=PRIORITIES)
    def begin(self, name: str, parts: list[int], priority: int) -> None:
        """Swap-outs that complete the copy, of a sequence that may be growing meanwhile."""
        for more in parts:
            self._begin(name, more, priority)

    @rule(name=NAMES, more=LENGTHS, priority=PRIORITIES, resident=BOOLEANS)
    def copy(self, name: str, more: int, priority: int, resident: bool) -> None:
        """One that arrives at once, and is published."""
        if pending := self._begin(name, more, priority):
            self._end(pending, True)
            self._publish(name)
            self._set_resident(name, resident)

    @rule(blocks=st.integers(1, NUM_BLOCKS), priority=st.integers(1, 4))
    def squeeze(self, blocks: int, priority: int) -> None:
        """Somebody more important than most comes, and goes again."""
        if pending := self._begin("urgent", blocks * BLOCK_TOKENS, priority):
            self._end(pending, True)
        self._drop("urgent")

    def _begin(self, name: str, more: int, priority: int) -> Pending | None:
        self._set_priority(name, priority)
        shadow = self.owners[name]
        covered = self.copies.covered(name)
        goal = covered + more
        tokens = shadow.tokens + [next(self.fresh) for _ in range(goal - len(shadow.tokens))]
        before = {other: self.table(other) for other in self.owners}
        valid = {other: self.copies.valid(other) for other in self.owners}
        leased, used = self.leased(), self.used_blocks()
        shared = Counter(block for table in before.values() for block in table)
        first, last = covered // BLOCK_TOKENS, -(-goal // BLOCK_TOKENS)
        keep = len(before[name])
        if keep > first and (leased[before[name][first]] or shared[before[name][first]] > 1):
            keep = first  # never overwritten
        free = NUM_BLOCKS - len(used)
        left, taken = self.losers(name, last - keep - free)
        granted = min(last, keep + free + taken)
        self.lost.clear()
        if granted == first:
            with pytest.raises(HostMemoryExhausted, match="Recompute it"):
                self.copies.begin(name, goal)
            assert {other: self.table(other) for other in self.owners} == before
            assert {other: self.copies.valid(other) for other in self.owners} == valid
            assert not self.lost
            return None
        fill = self.copies.begin(name, goal)
        shadow.tokens, shadow.used = tokens, next(self.clock)
        # Who lost what is what the rule says, and was told.
        losers = {other for other in left if other != name and left[other] < len(before[other])}
        assert {other: len(self.table(other)) for other in left if other != name} == {
            other: blocks for other, blocks in left.items() if other != name
        }
        for other in losers:
            assert self.copies.valid(other) == min(valid[other], left[other] * BLOCK_TOKENS)
        assert sorted(self.lost) == sorted((other, self.copies.valid(other)) for other in losers)
        self.contaminated += taken
        # What was given out is nobody else's, and its old content cannot be found any more.
        blocks = fill.blocks.tolist()
        assert (fill.first, len(blocks)) == (first, granted - first)
        assert self.table(name) == before[name][:first] + blocks
        assert fill.tokens == min(goal, granted * BLOCK_TOKENS)
        assert not leased.keys() & set(blocks), "leased blocks were handed out"
        for other in self.owners:
            assert other == name or not set(self.table(other)) & set(blocks), "shared, and written"
        self.keys = {key: block for key, block in self.keys.items() if block not in blocks}
        brings = [self.content_of(tokens[:goal], i) for i in range(first, granted)]
        self.content.update(dict.fromkeys(blocks, GARBAGE))
        self.pending.append(Pending(name, fill, brings))
        return self.pending[-1]

    @precondition(lambda self: self.pending)
    @rule(data=st.data(), ok=BOOLEANS)
    def end(self, data: st.DataObject, ok: bool) -> None:
        """Transfers end in any order: one that was not dispatched can be cancelled at once."""
        own = [pending for pending in self.pending if pending.fill.source is None]
        pending = data.draw(st.sampled_from(own))
        for each in data.draw(st.permutations([pending, *pending.followers])):
            self._end(each, ok)

    def _end(self, pending: Pending, ok: bool) -> None:
        self.pending.remove(pending)
        self._withdraw(lambda of, _: of is pending)
        for block, content in zip(pending.fill.blocks.tolist(), pending.brings, strict=True):
            self.content[block] = content if ok else GARBAGE
        (self.copies.commit if ok else self.copies.abort)(pending.fill)
        with pytest.raises(InvalidTransition):
            self.copies.commit(pending.fill)
        assert pending.fill.committed == ok

    # -- what is valid -----------------------------------------------------------------------

    @owned
    @rule(data=st.data(), share=SHARES)
    def truncate(self, data: st.DataObject, share: float) -> None:
        name = self.any_owner(data)
        tokens = self.owners[name].tokens
        kept = int(share * len(tokens))
        self.copies.truncate(name, kept)
        del tokens[kept:]
        self._withdraw(lambda of, index: of.name == name and index >= kept // BLOCK_TOKENS)

    @owned
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self._drop(self.any_owner(data))

    def _drop(self, name: str) -> None:
        self.copies.drop(name)
        del self.owners[name]
        self._withdraw(lambda of, _: of.name == name)
        for pending in self.pending:
            if pending.name == name:
                pending.name = "gone"

    @owned
    @rule(data=st.data(), sure=st.integers(0, 3))
    def invalidate_all(self, data: st.DataObject, sure: int) -> None:
        if sure == 0:
            self.copies.invalidate_all()
            self.weights += 1
            self.keys.clear()
            self.announced.clear()

    # -- content keys ------------------------------------------------------------------------

    @owned
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self._publish(self.any_owner(data))

    def _publish(self, name: str) -> None:
        complete = self.copies.valid(name) // BLOCK_TOKENS
        for index, key in enumerate(self.keys_of(name)[:complete]):
            block = self.table(name)[index]
            assert self.copies.publish(name, index, key) == (self.keys.get(key, block) == block)
            self.keys.setdefault(key, block)
        with pytest.raises(InvalidTransition):
            self.copies.publish(name, complete, "key")

    @precondition(lambda self: self.keys)
    @rule(name=NAMES, data=st.data(), more=LENGTHS, priority=PRIORITIES)
    def fork(self, name: str, data: st.DataObject, more: int, priority: int) -> None:
        """A new owner (a next turn, perhaps) whose tokens begin like published ones."""
        known = data.draw(st.sampled_from(sorted(self.keys)))
        if name in self.owners:
            self._drop(name)
        self._set_priority(name, priority)
        self.owners[name].tokens = [*known, *islice(self.fresh, more)]
        self._adopt(name)

    @owned
    @rule(data=st.data())
    def adopt(self, data: st.DataObject) -> None:
        self._adopt(self.any_owner(data))

    def _adopt(self, name: str) -> None:
        keys = self.keys_of(name)
        assert self.copies.match(keys) == sum(1 for _ in takewhile(self.keys.__contains__, keys))
        before = self.copies.valid(name)
        have = before // BLOCK_TOKENS
        found = list(takewhile(self.keys.__contains__, keys[have:]))
        if not found or any(pending.name == name for pending in self.pending):
            assert self.copies.adopt(name, keys) == before
            return
        kept = self.table(name)[:have]
        assert self.copies.adopt(name, keys) == (have + len(found)) * BLOCK_TOKENS
        assert self.table(name) == kept + [self.keys[key] for key in found]
        self.owners[name].used = next(self.clock)

    # -- copies that are still being written -------------------------------------------------

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        pending = data.draw(st.sampled_from(self.pending))
        if pending.fill.source is not None or pending.name == "gone":
            return
        keys = self.keys_of(pending.name)
        self.copies.announce(pending.fill, keys)
        last = pending.fill.tokens // BLOCK_TOKENS
        for index, key in list(enumerate(keys))[pending.fill.first : last]:
            self.announced.setdefault(key, (pending, index))

    @precondition(lambda self: self.announced)
    @rule(name=NAMES, data=st.data(), more=LENGTHS)
    def join(self, name: str, data: st.DataObject, more: int) -> None:
        """A new owner whose tokens begin like some that are being written."""
        known = data.draw(st.sampled_from(sorted(self.announced)))
        if name in self.owners:
            self._drop(name)
        self._set_priority(name, 1)
        self.owners[name].tokens = [*known, *islice(self.fresh, more)]
        self._adopt(name)
        self._follow(name)

    @owned
    @rule(data=st.data())
    def follow(self, data: st.DataObject) -> None:
        self._follow(self.any_owner(data))

    def _follow(self, name: str) -> None:
        keys, before = self.keys_of(name), self.table(name)
        have = self.copies.valid(name) // BLOCK_TOKENS
        found = list(takewhile(self.announced.__contains__, keys[have:]))
        if not found or any(pending.name == name for pending in self.pending):
            assert self.copies.follow(name, keys) == []
            assert self.table(name) == before
            return
        expected, first = [], have
        for leader, of in groupby(self.announced[key][0] for key in found):
            size, start = len(list(of)), first - leader.fill.first
            expected.append((leader, first, leader.fill.blocks.tolist()[start : start + size]))
            first += size
        fills = self.copies.follow(name, keys)
        assert [(fill.source, fill.first, fill.blocks.tolist()) for fill in fills] == [
            (leader.fill, first, blocks) for leader, first, blocks in expected
        ]
        assert self.table(name) == before[:have] + [b for *_, blocks in expected for b in blocks]
        for fill, (leader, _, blocks) in zip(fills, expected, strict=True):
            start = fill.first - leader.fill.first
            brings = leader.brings[start : start + len(blocks)]
            leader.followers.append(Pending(name, fill, brings))
            self.pending.append(leader.followers[-1])
        self.owners[name].used = next(self.clock)

    def _withdraw(self, gone: Callable[[Pending, int], bool]) -> None:
        self.announced = {key: of for key, of in self.announced.items() if not gone(*of)}

    # -- swap-ins ----------------------------------------------------------------------------

    @owned
    @rule(data=st.data(), share=SHARES)
    def pin(self, data: st.DataObject, share: float) -> None:
        name = self.any_owner(data)
        tokens = int(share * self.copies.covered(name))
        lease = self.copies.pin(name, tokens)
        self.owners[name].used = next(self.clock)
        blocks = lease.blocks.tolist()
        assert blocks == self.table(name)[: -(-tokens // BLOCK_TOKENS)]
        to_come = {block for pending in self.pending for block in pending.fill.blocks.tolist()}
        holds = [None if block in to_come else self.content[block] for block in blocks]
        self.reading.append(Reading(lease, holds))

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reading = data.draw(st.sampled_from(self.reading))
        self.reading.remove(reading)
        for block, held in zip(reading.lease.blocks.tolist(), reading.holds, strict=True):
            assert held is None or self.content[block] == held, "written while it was read"
        self.copies.release(reading.lease)
        with pytest.raises(InvalidTransition):
            self.copies.release(reading.lease)

    # -- priorities --------------------------------------------------------------------------

    @rule(name=NAMES, priority=PRIORITIES)
    def set_priority(self, name: str, priority: int) -> None:
        self._set_priority(name, priority)

    def _set_priority(self, name: str, priority: int) -> None:
        self.copies.set_priority(name, priority)
        if name not in self.owners:
            self.owners[name] = Shadow([], used=next(self.clock))
        self.owners[name].priority = priority

    @owned
    @rule(data=st.data(), resident=BOOLEANS)
    def set_resident(self, data: st.DataObject, resident: bool) -> None:
        self._set_resident(self.any_owner(data), resident)

    def _set_resident(self, name: str, resident: bool) -> None:
        self.copies.set_resident(name, resident)
        self.owners[name].resident = resident
        self.owners[name].used = next(self.clock)

    # -- what must hold ----------------------------------------------------------------------

    @invariant()
    def what_is_valid_has_the_right_content(self) -> None:
        to_come = self.content.copy()
        for pending in self.pending:
            to_come.update(zip(pending.fill.blocks.tolist(), pending.brings, strict=True))
        filling = {pending.name for pending in self.pending}
        for name in self.owners:
            valid, good = self.copies.valid(name), self.good_tokens(name, self.content)
            assert valid <= good, f"{name}: {valid} tokens said to be valid, {good} are"
            if name not in filling:
                assert valid == good, f"{name}: {good} tokens are there, {valid} known of"
            assert self.copies.covered(name) == self.good_tokens(name, to_come)

    @invariant()
    def books_are_right(self) -> None:
        self.copies.check_integrity()
        assert self.copies.num_leases() == len(self.pending) + len(self.reading)
        assert self.copies.pool.free_blocks == NUM_BLOCKS - len(self.used_blocks())
        assert self.copies.contaminated_blocks == self.contaminated
        assert len(self.copies) == len(self.owners)
        assert all(name in self.copies for name in self.owners)

    def teardown(self) -> None:
        for name in list(self.owners):
            self.copies.drop(name)
        for pending in self.pending:
            self.copies.abort(pending.fill)
        for reading in self.reading:
            self.copies.release(reading.lease)
        assert self.copies.num_leases() == 0
        assert self.copies.pool.free_blocks == NUM_BLOCKS, "a reference has leaked"
        self.copies.check_integrity()


TestCopiesMachine = CopiesMachine.TestCase
TestCopiesMachine.settings = settings(max_examples=160, stateful_step_count=50, deadline=None)


# -- negative controls: the model notices when a rule is broken --------------------------------


def overwrite_what_is_leased(pool: BlockGroupPool, ids: BlockIds) -> BlockIds:
    return np.ones(len(ids), np.int32)


def count_what_is_built_on_nothing(owner: Owner, block_tokens: int) -> None:
    for fill in owner.fills:
        if fill.committed:
            owner.valid = max(owner.valid, fill.tokens)
    owner.fills = [fill for fill in owner.fills if not fill.committed]


def promise_what_is_built_on_nothing(owner: Owner, block_tokens: int) -> int:
    return max([owner.valid, *(fill.tokens for fill in owner.fills)])


def take_from_everybody(owners: Owners, taker: Owner) -> Mask:
    may = owners.last_block >= 0
    may[taker.row] = False
    return may


def take_from_who_may_not_lose(owners: Owners, entry: Owner, may: Mask) -> list[Owner]:
    block = owners.last_block[entry.row]
    return [owner for owner in owners if owners.last_block[owner.row] == block >= 0]


def take_in_any_order(owners: Owners, rows: Rows) -> Rows:
    return rows


def keep_keys(keys: ContentKeys, blocks: BlockIds) -> None:
    """Content that is being overwritten can still be found."""


def announce_for_ever(pending: PendingKeys, fill: Fill, first: int = 0) -> None:
    """What has ended, or may change, can still be followed."""


def keep_validity(owner: Owner, tokens: int) -> None:
    """What is truncated, overwritten or taken stays valid."""


@pytest.mark.parametrize(
    ("kind", "name", "broken"),
    [
        (BlockGroupPool, "references", overwrite_what_is_leased),
        (PendingKeys, "withdraw", announce_for_ever),
        (Owner, "settle", count_what_is_built_on_nothing),
        (Owner, "covered", promise_what_is_built_on_nothing),
        (Owner, "limit", keep_validity),
        (Owners, "may_lose", take_from_everybody),
        (Owners, "_sorted", take_in_any_order),
        (Owners, "sharers", take_from_who_may_not_lose),
        (ContentKeys, "forget", keep_keys),
    ],
)
def test_the_model_notices(
    kind: type, name: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind, name, broken)
    monkeypatch.setattr(HostCopies, "check_integrity", lambda self: None)
    once = settings(
        TestCopiesMachine.settings,
        max_examples=1000,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises((AssertionError, OutOfBlocks)):
        run_state_machine_as_test(CopiesMachine, settings=once)

"""The planner against a shadow model of both memories, with every freedom a copy engine has.

Memories are grids of cells, one a token, and a cell names what was written there: (sequence,
position, version). Transfers start as early as `after` and the order of their direction permit,
read their source at their start or at their end, leave their destination torn meanwhile, end late,
fail or are cancelled. Blocks that nobody holds are poisoned. Whatever a sequence is told to be
valid must be there when it runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvswitch.errors import HostMemoryExhausted, InvalidTransition, KVSwitchError, OutOfBlocks
from kvswitch.messages import Direction, Observations, Transfer
from kvswitch.switch import SequenceState, SwapManager

BLOCK = 4
DEVICE = 12
INDEX = st.integers(0, 11)
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState

Cell: TypeAlias = tuple[str, int, int] | None


@dataclass(eq=False)
class Flight:
    """A transfer in the engine. `read` holds its source, if that was read at the start."""

    transfer: Transfer
    cancelled: bool = False
    started: bool = False
    read: list[list[Cell]] | None = None


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def pick(names: list[str], i: int) -> str:
    return names[i % len(names)]


def pairs(transfer: Transfer) -> Iterator[tuple[int, int]]:
    for src, dst, count in transfer.runs.tolist():
        yield from zip(range(src, src + count), range(dst, dst + count), strict=True)


@dataclass
class Memories:
    """Device and host, and two lanes of transfers between them."""

    device: list[list[Cell]]
    host: list[list[Cell]]
    lanes: dict[Direction, deque[Flight]] = field(
        default_factory=lambda: {direction: deque() for direction in Direction}
    )
    completed: list[int] = field(default_factory=list)  # not yet reported
    failed: list[int] = field(default_factory=list)

    def sides(self, direction: Direction) -> tuple[list[list[Cell]], list[list[Cell]]]:
        out = direction is Direction.OUT
        return (self.device, self.host) if out else (self.host, self.device)

    def under_way(self) -> set[int]:
        return {flight.transfer.id for lane in self.lanes.values() for flight in lane}

    def start(self, direction: Direction, *, early: bool) -> None:
        """Start the next transfer of a direction, if it may."""
        for flight in self.lanes[direction]:
            if not flight.started:
                if self.under_way().isdisjoint(flight.transfer.after):
                    src, dst = self.sides(direction)
                    flight.started = True
                    if early:
                        flight.read = [list(src[s]) for s, _ in pairs(flight.transfer)]
                    for _, d in pairs(flight.transfer):
                        dst[d] = [None] * BLOCK
                return

    def end(self, direction: Direction, *, ok: bool) -> None:
        """End the oldest transfer of a direction, if it has started or been cancelled."""
        lane = self.lanes[direction]
        if not lane or not (lane[0].started or lane[0].cancelled):
            return
        flight = lane.popleft()
        if ok and flight.started:
            src, dst = self.sides(direction)
            for i, (s, d) in enumerate(pairs(flight.transfer)):
                dst[d] = list(src[s] if flight.read is None else flight.read[i])
        (self.completed if ok and flight.started else self.failed).append(flight.transfer.id)

    def finish(self, transfer: int, *, ok: bool) -> None:
        """Let everything happen that a wait for `transfer` takes."""
        for direction, lane in self.lanes.items():
            while transfer in {flight.transfer.id for flight in lane}:
                if not lane[0].started and not lane[0].cancelled:
                    for earlier in lane[0].transfer.after:
                        self.finish(earlier, ok=ok)
                    self.start(direction, early=True)
                self.end(direction, ok=ok or lane[0].transfer.id != transfer)


def snapshot(planner: SwapManager) -> dict[str, Any]:
    """Everything that a verb which raises must leave as it was."""
    every = np.arange(planner.device.num_blocks, dtype=np.int32)
    hosts = np.arange(planner.copies.pool.num_blocks, dtype=np.int32)
    traffic = planner._traffic
    return {
        "queues": {
            state.name: [
                (
                    s.id,
                    s.tokens,
                    s.capacity,
                    s.priority,
                    s.table.tolist(),
                    list(s.keys),
                    [out.transfer.id for out in s.outgoing],
                    s.incoming and (s.incoming.transfer.id, s.incoming.tokens),
                )
                for s in planner.queue(state).values()
            ]
            for state in SequenceState
        },
        "device": planner.device.references(every).tolist(),
        "available": (planner.device.free_blocks, planner.available_blocks()),
        "host": planner.copies.pool.references(hosts).tolist(),
        "copies": {
            name: (
                planner.copies.valid(name),
                planner.copies.covered(name),
                planner.copies.table(name).tolist(),
            )
            for name in "abcdefz"
            if name in planner.copies
        },
        "leases": planner.copies.num_leases(),
        "traffic": (traffic._next_id, list(traffic._planned), list(traffic._cancelled)),
        "waits": set(planner._forward_waits),
        "landed": dict(planner._arrivals._landed),
        "uncopied": list(planner._departures._uncopied),
        "stats": asdict(planner.stats()),
    }


class PlannerMachine(RuleBasedStateMachine):
    """`content` says what each sequence's KV is; the planner says where it should be."""

    host_blocks = 10
    failures = True

    def __init__(self) -> None:
        super().__init__()
        self.content: dict[str, list[Cell]] = {}
        self.version = 0
        self.lost: list[str] = []

    @initialize(
        strategy=st.sampled_from(["adaptive", "async", "sync", "serial"]), reuse=st.booleans()
    )
    def build(self, strategy: Any, reuse: bool) -> None:
        self.planner = SwapManager(
            DEVICE,
            self.host_blocks,
            BLOCK,
            first_group=2,
            headroom=0.1,
            strategy=strategy,
            reuse=reuse,
            on_lost=lambda sequence, tokens: self.lost.append(str(sequence)),
        )
        self.memories = Memories(
            [[None] * BLOCK for _ in range(DEVICE)],
            [[None] * BLOCK for _ in range(self.host_blocks)],
        )

    # -- verbs -------------------------------------------------------------------------------

    def attempt(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a verb; the error that it raised, which has changed nothing."""
        before = snapshot(self.planner)
        try:
            return verb(*args, **kwargs)
        except KVSwitchError as error:
            refused = error
        assert snapshot(self.planner) == before, f"{refused!r} has changed something"
        return refused

    def those(self, *states: SequenceState) -> list[str]:
        return [name for name in self.content if self.planner.state(name) in states]

    @precondition(lambda self: len(self.content) < 6)
    @rule(tokens=st.integers(0, 30), expected=st.none() | st.integers(0, 60))
    def create(self, tokens: int, expected: int | None) -> None:
        name = next(name for name in "abcdef" if name not in self.content)
        available = self.planner.available_blocks(headroom=False)
        got = self.attempt(self.planner.allocate, name, tokens, expected=expected)
        if blocks(tokens) > available:
            assert isinstance(got, OutOfBlocks)
        else:
            assert len(got) == blocks(tokens)
            self.content[name] = []

    @precondition(lambda self: self.those(RUNNING, ARRIVING))
    @rule(i=INDEX, more=st.integers(0, 20))
    def grow(self, i: int, more: int) -> None:
        name = pick(self.those(RUNNING, ARRIVING), i)
        held = self.planner.table(name).tolist()
        tokens = len(self.content[name]) + more
        available = self.planner.available_blocks(headroom=False)
        got = self.attempt(self.planner.allocate, name, tokens)
        if blocks(tokens) - len(held) > available:
            assert isinstance(got, OutOfBlocks)
        else:
            assert len(got) >= blocks(tokens)
            assert got[: len(held)].tolist() == held

    @precondition(lambda self: self.those(RUNNING, ARRIVING, IDLE))
    @rule(i=INDEX, copy=st.sampled_from([True, True, True, False]))
    def preempt(self, i: int, copy: bool) -> None:
        name = pick(self.those(RUNNING, ARRIVING, IDLE), i)
        copy |= not self.failures
        covered, computed = self.planner.copies.covered(name), len(self.content[name])
        got = self.attempt(self.planner.preempt, name, computed, copy=copy)
        if got is not None:
            assert isinstance(got, HostMemoryExhausted)
            assert copy
            assert covered == 0 < computed

    @precondition(lambda self: self.those(LEAVING, HOST, IDLE))
    @rule(i=INDEX, fewer=st.sampled_from([0, 0, 0, 1, 3, 9]))
    def resume(self, i: int, fewer: int) -> None:
        name = pick(self.those(LEAVING, HOST, IDLE), i)
        state, accepted = self.planner.state(name), max(0, len(self.content[name]) - fewer)
        available = self.planner.available_blocks(headroom=False)
        covered = min(self.planner.copies.covered(name), accepted)
        got = self.attempt(self.planner.resume, name, accepted)
        if isinstance(got, OutOfBlocks):
            assert blocks(covered) > available
            assert state is not IDLE
            return
        assert got.tokens <= accepted
        if not self.failures and not fewer:
            assert got.tokens == accepted, "tokens were lost for no reason"
        assert (got.transfer is None) == (self.planner.state(name) is RUNNING)
        del self.content[name][got.tokens :]
        if got.transfer is None:
            self.check(name)

    @precondition(lambda self: self.those(RUNNING, ARRIVING))
    @rule(i=INDEX)
    def end_turn(self, i: int) -> None:
        name = pick(self.those(RUNNING, ARRIVING), i)
        self.planner.end_turn(name, len(self.content[name]))
        del self.content[name][self.planner.tokens(name) :]

    @precondition(lambda self: self.content)
    @rule(i=INDEX, keep=st.floats(0, 1))
    def truncate(self, i: int, keep: float) -> None:
        name = pick(list(self.content), i)
        tokens = int(len(self.content[name]) * keep)
        kept = self.planner.truncate(name, tokens)
        assert tokens - BLOCK < kept <= tokens
        del self.content[name][kept:]

    @precondition(lambda self: len(self.content) > 2)
    @rule(i=INDEX)
    def free(self, i: int) -> None:
        name = pick(list(self.content), i)
        self.planner.free(name)
        del self.content[name]

    @precondition(lambda self: self.those(RUNNING, IDLE) and len(self.content) < 6)
    @rule(i=INDEX, share=st.sampled_from([1.0, 1.0, 0.5]))
    def fork(self, i: int, share: float) -> None:
        parent = pick(self.those(RUNNING, IDLE), i)
        child = next(name for name in "abcdef" if name not in self.content)
        wanted = int(len(self.content[parent]) * share)
        assert self.planner.fork(parent, child, wanted) == wanted // BLOCK * BLOCK
        self.content[child] = self.content[parent][: wanted // BLOCK * BLOCK]

    @precondition(lambda self: self.content)
    @rule(i=INDEX)
    def tag(self, i: int) -> None:
        """Name full blocks by what is in them, as a prefix cache does."""
        name = pick(list(self.content), i)
        cells = self.content[name]
        whole = len(cells) // BLOCK
        self.planner.tag(name, [tuple(cells[: (j + 1) * BLOCK]) for j in range(whole)])

    @precondition(lambda self: self.content)
    @rule(i=INDEX, priority=st.integers(0, 3))
    def set_priority(self, i: int, priority: int) -> None:
        self.planner.set_priority(pick(list(self.content), i), priority)

    @precondition(lambda self: self.content)
    @rule(i=INDEX, j=INDEX)
    def ask_for_nonsense(self, i: int, j: int) -> None:
        """Whatever makes no sense is refused, and changes nothing."""
        name, other = pick(list(self.content), i), pick(list(self.content), j)
        state = self.planner.state(name)
        wrong: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (self.planner.preempt, (name, -1)),
            (self.planner.resume, (name, -1)),
            (self.planner.end_turn, (name, -1)),
            (self.planner.truncate, (name, -1)),
            (self.planner.allocate, (name, -1)),
            (self.planner.preempt, (name, DEVICE * BLOCK + 1)),
            (self.planner.end_turn, (name, DEVICE * BLOCK + 1)),
            (self.planner.fork, (other, name, 0)),
            (self.planner.fork, (name, "new", -1)),
            (self.planner.observe, (Observations(completed=(10**6,)),)),
        ]
        if state in (RUNNING, ARRIVING):
            wrong += [(self.planner.resume, (name,))]
        if state in (LEAVING, HOST, IDLE):
            wrong += [(self.planner.allocate, (name, 0)), (self.planner.end_turn, (name,))]
        if state in (LEAVING, HOST):
            wrong += [(self.planner.preempt, (name,))]
        if state in (LEAVING, HOST, ARRIVING):
            wrong += [(self.planner.fork, (name, "new", 0))]
        for verb, arguments in wrong:
            assert isinstance(self.attempt(verb, *arguments), InvalidTransition), (verb, arguments)

    # -- transfers ---------------------------------------------------------------------------

    @rule(direction=st.sampled_from(Direction), early=st.booleans())
    def start(self, direction: Direction, early: bool) -> None:
        self.memories.start(direction, early=early)

    @rule(direction=st.sampled_from(Direction), fail=st.integers(0, 7))
    def end(self, direction: Direction, fail: int) -> None:
        self.memories.end(direction, ok=self.succeeds(fail))

    @rule()
    def observe(self) -> None:
        """Reports may come at any time."""
        self.planner.observe(self.report())

    def succeeds(self, fail: int) -> bool:
        return fail > 0 or not self.failures

    def report(self) -> Observations:
        m = self.memories
        completed, failed = tuple(m.completed), tuple(m.failed)
        m.completed, m.failed = [], []
        return Observations(completed, failed, step_seconds=0.01)

    # -- one iteration -------------------------------------------------------------------------

    @rule(fail=st.integers(0, 7), data=st.data())
    def step(self, fail: int, data: st.DataObject) -> None:
        m = self.memories
        orders = self.planner.step(self.report())
        for transfer in orders.transfers:
            m.lanes[transfer.direction].append(Flight(transfer))
        for lane in m.lanes.values():
            for flight in lane:
                flight.cancelled |= flight.transfer.id in orders.cancel
        for transfer in orders.wait:
            m.finish(transfer, ok=self.succeeds(fail))
        if orders.wait:
            self.planner.observe(self.report())
        for name, tokens in self.planner.landed().items():
            assert isinstance(name, str)
            assert tokens <= len(self.content[name])
            del self.content[name][tokens:]
            assert self.planner.state(name) is RUNNING
        # The forward: every running sequence reads all it has, and some go on.
        running = [str(name) for name in self.planner.queue(RUNNING)]
        for name in running:
            self.check(name)
        for name in running:
            cells, table = self.content[name], self.planner.table(name)
            room = self.planner.tokens(name) - len(cells)
            for _ in range(data.draw(st.sampled_from([room, room, room // 2, 0]))):
                self.version += 1
                cell = (name, len(cells), self.version)
                m.device[table[len(cells) // BLOCK]][len(cells) % BLOCK] = cell
                cells.append(cell)
        for name in running:  # nobody has written where another reads
            self.check(name)

    @precondition(lambda self: "z" not in self.planner)
    @rule()
    def get_what_was_promised(self) -> None:
        promised = self.planner.available_blocks(headroom=False)
        got = self.attempt(self.planner.allocate, "z", (promised + 1) * BLOCK)
        assert isinstance(got, OutOfBlocks)
        exhausted = self.planner.stats().tokens_lost
        assert len(self.planner.allocate("z", promised * BLOCK)) == promised
        assert self.planner.available_blocks(headroom=False) == 0
        assert exhausted == self.planner.stats().tokens_lost
        self.planner.free("z")

    # -- what must always hold ---------------------------------------------------------------

    def check(self, name: str) -> None:
        """All of a sequence's content is where its table says."""
        table, device = self.planner.table(name), self.memories.device
        for i, cell in enumerate(self.content[name]):
            found = device[table[i // BLOCK]][i % BLOCK]
            assert found == cell, f"{name}: token {i} is {found}, not {cell}"

    @invariant()
    def books_are_in_order(self) -> None:
        planner = self.planner
        planner.check_integrity()
        idle = [t for s in planner.queue(IDLE).values() for t in s.table.tolist()]
        needed = {
            block
            for state in (RUNNING, ARRIVING)
            for s in planner.queue(state).values()
            for block in s.table.tolist()
        } | {b for i in planner._traffic.into.values() for b in i.blocks.tolist()}
        read = {b for out in planner._traffic.out.values() for b in out.blocks.tolist()}
        every = np.arange(DEVICE, dtype=np.int32)
        free = set(np.flatnonzero(planner.device.references(every) == 0).tolist())
        assert planner.available_blocks(headroom=False) == len((free | read | {*idle}) - needed)
        fills_and_pins = len(planner._traffic.out) + len(planner._traffic.into)
        assert planner.copies.num_leases() == fills_and_pins
        assert set(planner.under_way) == self.memories.under_way() | {
            *self.memories.completed,
            *self.memories.failed,
            *(t.id for t in planner._traffic._planned),
        }
        for block in free:
            self.memories.device[block] = [None] * BLOCK
        hosts = np.arange(self.host_blocks, dtype=np.int32)
        lost = (planner.copies.pool.references(hosts) == 0) & ~planner.copies._keys.named(hosts)
        for block in np.flatnonzero(lost).tolist():
            self.memories.host[block] = [None] * BLOCK

    def teardown(self) -> None:
        """When everything has ended nothing is held any more."""
        if not hasattr(self, "planner"):
            return
        for name in list(self.content):
            self.planner.free(name)
        for _ in range(100):
            orders = self.planner.step(self.report())
            for transfer in orders.transfers:
                self.memories.lanes[transfer.direction].append(Flight(transfer))
            for direction, lane in self.memories.lanes.items():
                if lane:
                    self.memories.start(direction, early=True)
                    self.memories.end(direction, ok=True)
        assert self.planner.under_way == ()
        assert self.planner.copies.num_leases() == len(self.planner.copies) == 0
        assert self.planner.device.free_blocks == DEVICE
        assert self.planner.copies.pool.free_blocks == self.host_blocks
        self.planner.check_integrity()


class AmpleHostMachine(PlannerMachine):
    """With host memory for all and no failures, nothing is ever recomputed."""

    host_blocks = 400
    failures = False


PlannerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
AmpleHostMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=60, deadline=None
)
TestScarceHostAndFailures = PlannerMachine.TestCase
TestAmpleHost = AmpleHostMachine.TestCase

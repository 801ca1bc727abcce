"""The planner against a shadow model of both memories, with every freedom a copy engine has.

Memories are grids of cells, one a token, and a cell names what was written there: (sequence,
position, version). Transfers start as early as `after` and the order of their direction permit,
read their source at their start or at their end, leave their destination torn meanwhile, end late,
fail or are cancelled. Blocks that nobody holds are poisoned. Whatever a sequence is told to be
valid must be there when it runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from kvswitch.errors import HostMemoryExhausted, InvalidTransition, KVSwitchError, OutOfBlocks
from kvswitch.messages import Direction, Observations
from kvswitch.switch import SequenceState, SwapManager

BLOCK = 4
DEVICE = 12
NAMES = "abcdef"
RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState

Cell: TypeAlias = tuple[str, int, int] | None


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


class Model:
    """`content` says what each sequence's KV is; the planner says where it should be.

    Each verb has two numbers, which say for whom it is and how it goes.
    """

    VERBS = (
        *["create", "grow", "preempt", "resume", "end_turn"] * 3,
        *["truncate", "free", "fork", "tag", "set_priority", "discard", "nonsense", "promise"],
        *["start_out", "start_in", "end_out", "end_in"] * 4,
        *["observe"] * 5,
    )

    def __init__(
        self, tools: Any, *, strategy: Any, reuse: bool, host_blocks: int, failures: bool
    ) -> None:
        self.planner = SwapManager(
            DEVICE,
            host_blocks,
            BLOCK,
            first_group=2,
            headroom=0.1,
            strategy=strategy,
            reuse=reuse,
        )
        self.failures = failures
        self.content: dict[str, list[Cell]] = {}
        self.named: dict[str, list[Cell]] = {}  # what keys name: recomputed, it is the same again
        self.version = 0
        self.memories = tools.Memories.of(DEVICE, host_blocks, BLOCK)
        self.snapshot = tools.snapshot

    def do(self, verb: str, i: int, n: int) -> None:
        getattr(self, verb)(i, n)

    # -- verbs -------------------------------------------------------------------------------

    def attempt(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a verb; the error that it raised, which has changed nothing."""
        before = self.snapshot(self.planner)
        try:
            return verb(*args, **kwargs)
        except KVSwitchError as error:
            refused = error
        assert self.snapshot(self.planner) == before, f"{refused!r} has changed something"
        return refused

    def roll_back(self, name: str, tokens: int) -> None:
        """What lies behind `tokens` will be something else."""
        del self.content[name][tokens:]
        named = self.named.get(name, [])
        del named[tokens // BLOCK * BLOCK :]

    def pick(self, i: int, *states: SequenceState) -> str | None:
        names = [n for n in self.content if not states or self.planner.state(n) in states]
        return names[i % len(names)] if names else None

    def new_name(self) -> str | None:
        return next((name for name in NAMES if name not in self.content), None)

    def create(self, i: int, n: int) -> None:
        if (name := self.new_name()) is None:
            return
        available = self.planner.available_blocks(headroom=False)
        expected = [None, 0, 2 * n][i % 3]
        got = self.attempt(self.planner.allocate, name, n, expected=expected)
        if blocks(n) > available:
            assert isinstance(got, OutOfBlocks)
        else:
            assert len(got) == blocks(n)
            self.content[name] = []

    def grow(self, i: int, n: int) -> None:
        if (name := self.pick(i, RUNNING, ARRIVING)) is None:
            return
        held = self.planner.table(name).tolist()
        tokens = len(self.content[name]) + n // 2
        available = self.planner.available_blocks(headroom=False)
        got = self.attempt(self.planner.allocate, name, tokens)
        if blocks(tokens) - len(held) > available:
            assert isinstance(got, OutOfBlocks)
        else:
            assert len(got) >= blocks(tokens)
            assert got[: len(held)].tolist() == held

    def preempt(self, i: int, n: int, *, copy: bool = True) -> None:
        if (name := self.pick(i, RUNNING, ARRIVING, IDLE)) is None:
            return
        covered, computed = self.planner.copies.covered(name), len(self.content[name])
        got = self.attempt(self.planner.preempt, name, computed, copy=copy)
        if got is None:
            self.roll_back(name, computed)
        else:
            assert isinstance(got, HostMemoryExhausted)
            assert copy
            assert covered == 0 < computed

    def discard(self, i: int, n: int) -> None:
        if self.failures:
            self.preempt(i, n, copy=False)

    def resume(self, i: int, n: int) -> None:
        if (name := self.pick(i, LEAVING, HOST, IDLE)) is None:
            return
        dropped = max(0, n - 20)  # mostly none
        state, accepted = self.planner.state(name), max(0, len(self.content[name]) - dropped)
        available = self.planner.available_blocks(headroom=False)
        covered = min(self.planner.copies.covered(name), accepted)
        got = self.attempt(self.planner.resume, name, accepted)
        if isinstance(got, OutOfBlocks):
            assert blocks(covered) > available
            assert state is not IDLE
            return
        self.roll_back(name, accepted)
        assert got.tokens <= accepted
        if not self.failures and not dropped:
            assert got.tokens == accepted, "tokens were lost for no reason"
        assert (got.transfer is None) == (self.planner.state(name) is RUNNING)
        del self.content[name][got.tokens :]
        if got.transfer is None:
            self.check(name)

    def end_turn(self, i: int, n: int) -> None:
        if (name := self.pick(i, RUNNING, ARRIVING)) is not None:
            self.planner.end_turn(name, len(self.content[name]))
            self.roll_back(name, self.planner.tokens(name))

    def truncate(self, i: int, n: int) -> None:
        if (name := self.pick(i)) is not None:
            tokens = max(0, len(self.content[name]) - n // 3)
            kept = self.planner.truncate(name, tokens)
            assert tokens - BLOCK < kept <= tokens
            self.roll_back(name, kept)

    def free(self, i: int, n: int) -> None:
        if (name := self.pick(i)) is not None:
            self.planner.free(name)
            del self.content[name]
            self.named.pop(name, None)

    def fork(self, i: int, n: int) -> None:
        parent, child = self.pick(i, RUNNING, IDLE), self.new_name()
        if parent is not None and child is not None:
            wanted = len(self.content[parent]) - n % 3
            if wanted >= 0:
                shared = wanted // BLOCK * BLOCK
                assert self.planner.fork(parent, child, wanted) == shared
                named = self.content[parent][:shared]
                self.content[child], self.named[child] = list(named), list(named)
                self.named[parent] = named + self.named.get(parent, [])[shared:]

    def tag(self, i: int, n: int) -> None:
        """Name full blocks by what is in them, as a prefix cache does."""
        if (name := self.pick(i)) is not None:
            cells = self.content[name]
            whole = len(cells) // BLOCK
            self.planner.tag(name, [tuple(cells[: (j + 1) * BLOCK]) for j in range(whole)])
            self.named[name] = cells[: whole * BLOCK]

    def set_priority(self, i: int, n: int) -> None:
        if (name := self.pick(i)) is not None:
            self.planner.set_priority(name, n % 4)

    def nonsense(self, i: int, n: int) -> None:
        """Whatever makes no sense is refused, and changes nothing."""
        name, other = self.pick(i), self.pick(n)
        if name is None:
            return
        planner, state = self.planner, self.planner.state(name)
        wrong: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
            (planner.allocate, (name, -1)),
            (planner.resume, (name, -1)),
            (planner.preempt, (name, -1)),
            (planner.preempt, (name, DEVICE * BLOCK + 1)),
            (planner.end_turn, (name, -1)),
            (planner.end_turn, (name, DEVICE * BLOCK + 1)),
            (planner.truncate, (name, -1)),
            (planner.fork, (other, name, 0)),
            (planner.fork, (name, "new", -1)),
            (planner.observe, (Observations(completed=(10**6,)),)),
        ]
        if state in (RUNNING, ARRIVING):
            wrong += [(planner.resume, (name,))]
        if state in (LEAVING, HOST, IDLE):
            wrong += [(planner.allocate, (name, 0)), (planner.end_turn, (name,))]
        if state in (LEAVING, HOST):
            wrong += [(planner.preempt, (name,))]
        if state in (LEAVING, HOST, ARRIVING):
            wrong += [(planner.fork, (name, "new", 0))]
        for verb, arguments in wrong:
            assert isinstance(self.attempt(verb, *arguments), InvalidTransition), (verb, arguments)

    def promise(self, i: int, n: int) -> None:
        """`available_blocks` promises what can be had, no more and no less."""
        if i % 4:
            return
        promised = self.planner.available_blocks(headroom=False)
        got = self.attempt(self.planner.allocate, "z", (promised + 1) * BLOCK)
        assert isinstance(got, OutOfBlocks)
        assert len(self.planner.allocate("z", promised * BLOCK)) == promised
        assert self.planner.available_blocks(headroom=False) == 0
        self.planner.free("z")

    # -- transfers ---------------------------------------------------------------------------

    def start_out(self, i: int, n: int) -> None:
        self.memories.start(Direction.OUT, early=n % 2 == 0)

    def start_in(self, i: int, n: int) -> None:
        self.memories.start(Direction.IN, early=n % 2 == 0)

    def end_out(self, i: int, n: int) -> None:
        self.memories.end(Direction.OUT, ok=self.succeeds(n))

    def end_in(self, i: int, n: int) -> None:
        self.memories.end(Direction.IN, ok=self.succeeds(n))

    def observe(self, i: int, n: int) -> None:
        """Reports may come at any time."""
        self.planner.observe(self.report())

    def succeeds(self, n: int) -> bool:
        return n % 8 > 0 or not self.failures

    def report(self) -> Observations:
        m = self.memories
        completed, failed = tuple(m.completed), tuple(m.failed)
        m.completed, m.failed = [], []
        return Observations(completed, failed, step_seconds=0.01)

    # -- one iteration -------------------------------------------------------------------------

    def iterate(self, n: int) -> None:
        """What an engine does once an iteration, its forward included."""
        m = self.memories
        orders = self.planner.step(self.report())
        for transfer in orders.transfers:
            m.submit(transfer)
        for transfer_id in orders.cancel:
            m.cancel(transfer_id)
        for transfer_id in orders.wait:
            m.finish(transfer_id, ok=self.succeeds(n))
        if orders.wait:
            self.planner.observe(self.report())
        for name, tokens in self.planner.landed().items():
            assert isinstance(name, str)
            assert self.planner.state(name) is RUNNING
            assert tokens <= len(self.content[name])
            del self.content[name][tokens:]
        # Every running sequence reads all it has; most of them go on.
        running = [str(name) for name in self.planner.queue(RUNNING)]
        for name in running:
            self.check(name)
        for place, name in enumerate(running):
            cells, table = self.content[name], self.planner.table(name)
            room = self.planner.tokens(name) - len(cells)
            for _ in range(room if (place + n) % 4 else room // 2):
                cell = self.compute(name, len(cells))
                m.device[table[len(cells) // BLOCK]][len(cells) % BLOCK] = cell
                cells.append(cell)
        for name in running:  # nobody has written where another reads
            self.check(name)
        self.check_books()

    def compute(self, name: str, position: int) -> Cell:
        named = self.named.get(name, [])
        if position < len(named):
            return named[position]
        self.version += 1
        return name, position, self.version

    def finish(self) -> None:
        """When everything has ended nothing is held any more."""
        for name in list(self.content):
            self.planner.free(name)
        self.content.clear()
        self.named.clear()
        for _ in range(100):
            self.iterate(1)
            for direction in Direction:
                self.memories.start(direction, early=True)
                self.memories.end(direction, ok=True)
        assert self.planner.under_way == ()
        assert self.planner.copies.num_leases() == len(self.planner.copies) == 0
        assert self.planner.device.free_blocks == DEVICE
        assert self.planner.copies.pool.free_blocks == self.planner.copies.pool.num_blocks

    # -- what must always hold ---------------------------------------------------------------

    def check(self, name: str) -> None:
        """All of a sequence's content is where its table says."""
        table, device = self.planner.table(name), self.memories.device
        for i, cell in enumerate(self.content[name]):
            found = device[table[i // BLOCK]][i % BLOCK]
            assert found == cell, f"{name}: token {i} is {found}, not {cell}"

    def check_books(self) -> None:
        planner, memories = self.planner, self.memories
        planner.check_integrity()
        traffic = planner._traffic
        tables = {
            state: {b for s in planner.queue(state).values() for b in s.table.tolist()}
            for state in SequenceState
        }
        written = {b for incoming in traffic.into.values() for b in incoming.blocks.tolist()}
        read = {b for out in traffic.out.values() for b in out.blocks.tolist()}
        references = planner.device.references(np.arange(DEVICE, dtype=np.int32))
        free = set(np.flatnonzero(references == 0).tolist())
        to_be_had = (free | read | tables[IDLE]) - tables[RUNNING] - tables[ARRIVING] - written
        assert planner.available_blocks(headroom=False) == len(to_be_had)
        assert planner.available_blocks() == max(0, len(to_be_had) - 1)
        followers = sum(len(out.followers) for out in traffic.out.values())
        assert planner.copies.num_leases() == len(traffic.out) + followers + len(traffic.into)
        planned = {transfer.id for transfer in traffic._planned}
        unreported = {*memories.completed, *memories.failed}
        assert set(planner.under_way) == memories.under_way() | unreported | planned
        # Whoever reads what has been given up shall notice.
        for block in free:
            memories.device[block] = [None] * BLOCK
        hosts = np.arange(planner.copies.pool.num_blocks, dtype=np.int32)
        lost = (planner.copies.pool.references(hosts) == 0) & ~planner.copies._keys.named(hosts)
        for block in np.flatnonzero(lost).tolist():
            memories.host[block] = [None] * BLOCK


VERBS = st.tuples(st.sampled_from(Model.VERBS), st.integers(0, 11), st.integers(0, 30))


class PlannerMachine(RuleBasedStateMachine):
    """Scarce host memory, and transfers that fail."""

    tools: Any = None
    host_blocks = 10
    failures = True

    @initialize(
        strategy=st.sampled_from(["adaptive", "async", "sync", "serial"]), reuse=st.booleans()
    )
    def build(self, strategy: str, reuse: bool) -> None:
        self.model = Model(
            self.tools,
            strategy=strategy,
            reuse=reuse,
            host_blocks=self.host_blocks,
            failures=self.failures,
        )

    @rule(verbs=st.lists(VERBS, max_size=6), n=st.integers(0, 15))
    def iteration(self, verbs: list[tuple[str, int, int]], n: int) -> None:
        for verb in verbs:
            self.model.do(*verb)
            self.model.check_books()
        self.model.iterate(n)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.finish()


class AmpleHostMachine(PlannerMachine):
    """With host memory for all and no failures, nothing is ever recomputed."""

    host_blocks = 400
    failures = False


@pytest.mark.parametrize("machine", [PlannerMachine, AmpleHostMachine])
def test_planner_against_the_model(
    machine: type[PlannerMachine], tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "tools", tools)
    run_state_machine_as_test(
        machine, settings=settings(max_examples=80, stateful_step_count=25, deadline=None)
    )


def run(tools: Any, seed: int, iterations: int) -> SwapManager:
    """One long run, much faster than hypothesis, which is there to find a short one."""
    rng = random.Random(seed)
    failures = rng.random() < 0.7
    model = Model(
        tools,
        strategy=rng.choice(["adaptive", "async", "sync", "serial"]),
        reuse=rng.random() < 0.8,
        host_blocks=rng.choice([5, 10, 20, 400]) if failures else 400,
        failures=failures,
    )
    for _ in range(iterations):
        for _ in range(rng.randrange(12)):
            model.do(rng.choice(Model.VERBS), rng.randrange(12), rng.randrange(31))
        model.iterate(rng.randrange(16))
    model.finish()
    return model.planner


def test_long_seeded_runs_of_the_planner(tools: Any) -> None:
    stats = [run(tools, seed, 100).stats() for seed in range(50)]
    # Whatever can happen has happened.
    for name, least in {
        "take_backs": 30,
        "conflicts": 30,
        "evictions": 30,
        "idle_copies": 30,
        "contaminated_blocks": 10,
        "transfers_failed": 10,
        "blocks_out_incremental": 30,
    }.items():
        assert sum(getattr(s, name) for s in stats) >= least, name


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_very_long_seeded_runs_of_the_planner(tools: Any, seed: int) -> None:
    run(tools, seed, 2000)

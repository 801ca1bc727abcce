"""A planner that is easy to talk to, a model of what it moves, and a link that makes trouble."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest

from kvswitch import KVSwitch
from kvswitch.errors import TransferError
from kvswitch.messages import Direction, Observations, SwapOrders, Transfer
from kvswitch.switch import SequenceState, SwapManager
from kvswitch.transfer import Backend, Copies, CpuBackend, Queue

Cell: TypeAlias = tuple[str, int, int] | None
"""What was written: (sequence, position, version)."""


class Planner(SwapManager):
    """Blocks of 4 tokens."""

    def __init__(self, device: int = 12, host: int = 60, **settings: Any) -> None:
        super().__init__(device, host, 4, **{"first_group": 1, "headroom": 0.0, **settings})
        self.sent: dict[int, Transfer] = {}

    def orders(self) -> SwapOrders:
        orders = super().orders()
        self.sent.update({transfer.id: transfer for transfer in orders.transfers})
        self.check_integrity()
        return orders

    def end(self, *ids: int) -> None:
        self.observe(Observations(completed=ids))
        self.check_integrity()

    def fail(self, *ids: int) -> None:
        self.observe(Observations(failed=ids))
        self.check_integrity()

    def end_all(self) -> None:
        """Let everything that is under way, and all copies ahead of need, come to an end."""
        self.orders()
        while self.under_way:
            self.end(*self.under_way)
            self.orders()

    def on_host(self, sequence: str, tokens: int, priority: float = 0.0) -> None:
        """Create a sequence that has left, with copies of `tokens`."""
        self.allocate(sequence, tokens)
        self.set_priority(sequence, priority)
        self.preempt(sequence)
        self.end_all()

    def idle(self, sequence: str, tokens: int, *, copied: bool, priority: float = 0.0) -> None:
        """Create an idle sequence."""
        self.allocate(sequence, tokens)
        self.set_priority(sequence, priority)
        self.end_turn(sequence)
        if copied:
            self.end_all()


@pytest.fixture
def make() -> Iterator[Callable[..., Planner]]:
    """Make planners; when all has ended and been freed, nothing may be held any more."""
    made: list[Planner] = []

    def make(*args: Any, **settings: Any) -> Planner:
        made.append(Planner(*args, **settings))
        return made[-1]

    yield make
    for planner in made:
        for state in SequenceState:
            for sequence in list(planner.queue(state)):
                planner.free(sequence)
        planner.orders()
        planner.observe(Observations(failed=planner.under_way))
        planner.check_integrity()
        assert planner.copies.num_leases() == len(planner.copies) == 0
        assert planner.device.free_blocks == planner.device.num_blocks
        assert planner.copies.pool.free_blocks == planner.copies.pool.num_blocks


def pairs(transfer: Transfer) -> Iterator[tuple[int, int]]:
    for src, dst, count in transfer.runs.tolist():
        yield from zip(range(src, src + count), range(dst, dst + count), strict=True)


@dataclass(eq=False)
class Flight:
    """A transfer in the engine. `read` holds its source, if that was read at the start."""

    transfer: Transfer
    cancelled: bool = False
    started: bool = False
    read: list[list[Cell]] | None = None


@dataclass
class Memories:
    """Device and host as grids of cells, and two lanes of transfers between them.

    A cell names what was written there; None is poison. Transfers start as early as `after` and the
    order of their direction permit, read their source at their start or at their end, and leave
    their destination torn meanwhile.
    """

    device: list[list[Cell]]
    host: list[list[Cell]]
    lanes: dict[Direction, deque[Flight]] = field(
        default_factory=lambda: {direction: deque() for direction in Direction}
    )
    completed: list[int] = field(default_factory=list)  # not yet reported
    failed: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, device_blocks: int, host_blocks: int, block_tokens: int) -> Memories:
        sides = [[[None] * block_tokens for _ in range(n)] for n in (device_blocks, host_blocks)]
        return cls(*sides)

    def submit(self, transfer: Transfer) -> None:
        self.lanes[transfer.direction].append(Flight(transfer))

    def cancel(self, transfer: int) -> None:
        for lane in self.lanes.values():
            for flight in lane:
                flight.cancelled |= flight.transfer.id == transfer

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
                        dst[d] = [None] * len(dst[d])
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


class UnrulyQueue:
    """A queue that takes its time, and fails before or amid a window."""

    def __init__(self, queue: Queue, rng: random.Random, trouble: float) -> None:
        self._queue = queue
        self._rng = rng
        self._trouble = trouble
        self.go = threading.Event()
        self.go.set()
        self.record = queue.record
        self.wait = queue.wait

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        self.go.wait()
        fate = self._rng.random()
        if fate < 0.3:
            time.sleep(fate / 1000)
        if fate > 1 - self._trouble:
            self._queue.copy(copies, start, (start + stop) // 2)
            raise TransferError("the link had a bad moment")
        self._queue.copy(copies, start, stop)


class UnrulyBackend(Backend):
    """The CPU backend, with queues that fail in a share of `trouble` of their windows."""

    coalesce = True

    def __init__(self, seed: int, trouble: float, bandwidth: float | None = None) -> None:
        self._inner = CpuBackend(bandwidth=bandwidth)
        self._seed = seed
        self._trouble = trouble
        self.queues: dict[Direction, UnrulyQueue] = {}
        self.event = self._inner.event
        self.fence = self._inner.fence
        self.close = self._inner.close

    def open_queue(self, direction: Direction) -> Queue:
        rng = random.Random(2 * self._seed + direction)
        queue = UnrulyQueue(self._inner.open_queue(direction), rng, self._trouble)
        self.queues[direction] = queue
        return queue

    def pause(self, direction: Direction) -> None:
        self.queues[direction].go.clear()

    def go_on(self) -> None:
        for queue in self.queues.values():
            queue.go.set()


BLOCK_BYTES = 4 * 64 * 8


class Puppet(Backend):
    """A CPU backend whose queues stop when told to, and raise what they are told to."""

    coalesce = True

    def __init__(self) -> None:
        self._inner = CpuBackend()
        self.copied = 0  # windows
        self.go = threading.Event()
        self.go.set()
        self.raises: dict[Direction, list[BaseException | None]] = {d: [] for d in Direction}
        self.event = self._inner.event
        self.fence = self._inner.fence
        self.close = self._inner.close

    def open_queue(self, direction: Direction) -> Queue:
        inner, puppet = self._inner.open_queue(direction), self

        class PuppetQueue:
            record = inner.record
            wait = inner.wait

            def copy(self, copies: Copies, start: int, stop: int) -> None:
                puppet.go.wait()
                raises = puppet.raises[direction]
                if raises and (error := raises.pop(0)) is not None:
                    raise error
                puppet.copied += 1
                inner.copy(copies, start, stop)

        return PuppetQueue()


@pytest.fixture
def cache() -> Any:
    return np.zeros((12, 4, 64))


@pytest.fixture
def make_switch(cache: Any) -> Iterator[Callable[..., KVSwitch]]:
    """Make a KVSwitch with room for 12 blocks on the device and 12 on the host."""
    made: list[KVSwitch] = []

    def make(host_blocks: int = 12, **settings: Any) -> KVSwitch:
        own = {key: settings.pop(key) for key in ("backend", "plugins") if key in settings}
        config = {"host_memory": host_blocks * BLOCK_BYTES, "first_group": 1, "headroom": 0.0}
        made.append(KVSwitch(cache, {**config, **settings}, block_tokens=4, **own))
        return made[-1]

    yield make
    for switch in made:
        switch.close()
        switch.check_integrity()
        assert switch.planner.copies.num_leases() == 0
    gc.collect()
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kvswitch")]


def settle(switch: KVSwitch) -> dict[Any, int]:
    """Step until nothing is under way; what has landed."""
    landed: dict[Any, int] = {}
    end = time.monotonic() + 20
    while time.monotonic() < end:
        landed.update(switch.step().landed)
        if not switch.planner.under_way:
            return landed
    raise AssertionError("transfers do not end")


def fill(cache: Any, table: Any, value: float) -> None:
    cache[table] = value + np.arange(len(table))[:, None, None]


def holds(cache: Any, table: Any, value: float) -> bool:
    return bool((cache[table] == value + np.arange(len(table))[:, None, None]).all())


@pytest.fixture
def tools() -> SimpleNamespace:
    """What several test modules use."""
    return SimpleNamespace(
        Memories=Memories,
        snapshot=snapshot,
        UnrulyBackend=UnrulyBackend,
        Puppet=Puppet,
        settle=settle,
        fill=fill,
        holds=holds,
    )

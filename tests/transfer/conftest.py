"""A backend that tests can pause, delay, break and kill, and a world of blocks to move about."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvswitch.messages import Direction, Runs, Transfer
from kvswitch.transfer import (
    Backend,
    Copies,
    CpuBackend,
    DeadQueue,
    Event,
    Ticket,
    TransferEngine,
    coalesce,
    layout_of,
)

PATIENCE = 20.0  # seconds after which a test gives up on something that should happen


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.0005)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Wait until a condition holds."""
    return _until


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """Whatever a test opens, it closes."""
    yield
    left = [t.name for t in threading.enumerate() if t.name.startswith(("kvswitch", "chaos"))]
    assert not left


class ChaosEvent:
    """An event of `ChaosQueue`, with the semantics of CUDA's."""

    def __init__(self) -> None:
        self._points: list[ChaosPoint] = []

    def attach(self, point: ChaosPoint) -> None:
        self._points.append(point)

    @property
    def point(self) -> ChaosPoint | None:
        return self._points[-1] if self._points else None

    @property
    def error(self) -> Exception | None:
        return self.point.error if self.point else None

    @property
    def time(self) -> float:
        return self.point.time if self.point else 0.0

    def done(self) -> bool:
        return self.point is None or self.point.reached.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self.point is None or self.point.reached.wait(timeout)


@dataclass
class ChaosPoint:
    reached: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    time: float = 0.0


class ChaosQueue:
    """Copies late: each window waits for `go`, and then for as long as `delay` says."""

    def __init__(self, name: str, delay: Callable[[], float]) -> None:
        self.go = threading.Event()
        self.go.set()
        self.given: list[int] = []  # bytes of each window dispatched
        self.moved: list[int] = []  # bytes of each window that has been copied
        self.refuse: list[BaseException | None] = []  # raised by the next calls of copy()
        self.before: dict[int, Callable[[], object]] = {}  # done before the k-th window is copied
        self.waits: list[Event] = []
        self._delay = delay
        self._work: deque[Callable[[], None] | None] = deque()
        self._ready = threading.Semaphore(0)
        self._failure: Exception | None = None
        self._dead: DeadQueue | None = None
        self._points: list[ChaosPoint] = []
        self._thread = threading.Thread(target=self._serve, name=f"chaos-{name}", daemon=True)
        self._thread.start()

    def run(self, kernel: Callable[[], None]) -> None:
        """Compute something."""

        def work() -> None:
            self.go.wait()
            kernel()

        self._give(work)

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        if self.refuse and (error := self.refuse.pop(0)) is not None:
            raise error
        number = len(self.given)
        pieces = [a[start:stop].tolist() for a in (copies.dst, copies.src, copies.nbytes)]

        def move() -> None:
            self.go.wait()
            self.before.get(number, bool)()
            for dst, src, nbytes in zip(*pieces, strict=True):
                ctypes.memmove(dst, src, nbytes)
            self.moved.append(sum(pieces[2]))

        self._give(move)
        self.given.append(sum(pieces[2]))

    def fail(self, window: int, error: BaseException) -> None:
        """Let the k-th window fail, or the thread die if that is no `Exception`."""

        def fail() -> None:
            raise error

        self.before[window] = fail

    def record(self, event: Event | None = None) -> Event:
        marked = event if isinstance(event, ChaosEvent) else ChaosEvent()
        point = ChaosPoint()

        def reach() -> None:
            point.error, self._failure = self._failure, None
            point.time = time.perf_counter()
            point.reached.set()

        self._points.append(point)
        self._give(reach)
        marked.attach(point)
        return marked

    def wait(self, event: Event) -> None:
        assert isinstance(event, ChaosEvent)
        self.waits.append(event)
        if event.point is not None:
            self._give(lambda reached=event.point.reached: reached.wait())  # type: ignore[misc]

    def close(self) -> None:
        self._dead = self._dead or DeadQueue("closed")
        self._work.append(None)
        self._ready.release()
        self._thread.join()

    def _give(self, work: Callable[[], None]) -> None:
        if self._dead is not None:
            raise self._dead
        self._work.append(work)
        self._ready.release()

    def _serve(self) -> None:
        while True:
            self._ready.acquire()
            work = self._work.popleft()
            if work is None:
                return
            time.sleep(self._delay())
            try:
                work()
            except Exception as error:
                self._failure = self._failure or error
            except BaseException as error:
                self._dead = DeadQueue(f"chaos: {error!r}")
                for point in self._points:
                    if not point.reached.is_set():
                        point.error = self._dead
                        point.reached.set()
                return


class ChaosBackend(Backend):
    """A backend under the control of a test: see `ChaosQueue`."""

    def __init__(
        self, seed: int | None = None, *, coalesce: bool = True, has_streams: bool = False
    ) -> None:
        """With a `seed`, queues take random breaks between what they do."""
        self.coalesce = coalesce
        self.has_streams = has_streams
        self.closed = 0
        self.queues: dict[Direction, ChaosQueue] = {}
        self._streams: list[ChaosQueue] = []
        self._random = None if seed is None else random.Random(seed)

    def open_queue(self, direction: Direction) -> ChaosQueue:
        self.queues[direction] = ChaosQueue(direction.name.lower(), self._delay)
        return self.queues[direction]

    def event(self) -> Event:
        return ChaosEvent()

    def fence(self, stream: object | None) -> Event | None:
        return stream.record() if isinstance(stream, ChaosQueue) else None

    def hold(self, stream: object | None, event: Event) -> None:
        assert isinstance(stream, ChaosQueue)
        stream.wait(event)

    def stream(self) -> ChaosQueue:
        """What the inference engine computes on."""
        self._streams.append(ChaosQueue("stream", self._delay))
        return self._streams[-1]

    def pause(self, direction: Direction) -> None:
        self.queues[direction].go.clear()

    def resume(self) -> None:
        for queue in (*self.queues.values(), *self._streams):
            queue.go.set()

    def close(self) -> None:
        self.closed += 1
        for queue in (*self.queues.values(), *self._streams):
            queue.close()

    def _delay(self) -> float:
        if self._random is None or self._random.random() < 0.5:
            return 0.0
        return self._random.random() * 0.001


class World:
    """Device and host memory, an engine between them, and what the bytes should be.

    The expected bytes are those of doing everything one after the other, in the order of
    submission. Every write gives a block a value of its own; a failed or cancelled transfer leaves
    its destination unknown.
    """

    device_blocks, host_blocks = 24, 40

    def __init__(
        self,
        backend: ChaosBackend | CpuBackend,
        *,
        regions: int = 2,
        block_bytes: int = 48,
        window_bytes: int = 128,
    ) -> None:
        self.backend = backend
        self.device = [
            np.full((self.device_blocks, block_bytes), 0xFF, np.uint8) for _ in range(regions)
        ]
        self.host = [
            np.full((self.host_blocks, block_bytes), 0xFF, np.uint8) for _ in range(regions)
        ]
        self.engine = TransferEngine(
            backend, layout_of(self.device), layout_of(self.host), window_bytes=window_bytes
        )
        self.tickets: dict[int, Ticket] = {}
        self._log: list[Transfer | tuple[int, int]] = []  # in order: transfers, (block, value)
        self._values = 0
        for block in range(self.device_blocks):
            self.write(block)

    def write(self, block: int) -> None:
        """Compute something: fill a device block with a value never used before."""
        blocks = np.array([block], np.int32)
        self.engine.wait(self.engine.conflicts(blocks), PATIENCE)
        self._values += 1
        for region in self.device:
            region[block] = self._bytes(self._values, region.shape[1])
        self._log.append((block, self._values))

    def submit(
        self,
        direction: Direction,
        src: list[int],
        dst: list[int],
        *,
        after: tuple[int, ...] = (),
        fence: Event | None = None,
    ) -> Ticket:
        runs = coalesce(np.array(src, np.int32), np.array(dst, np.int32))
        return self.submit_runs(direction, runs, after=after, fence=fence)

    def submit_runs(
        self,
        direction: Direction,
        runs: Runs,
        *,
        after: tuple[int, ...] = (),
        fence: Event | None = None,
    ) -> Ticket:
        transfer = Transfer(len(self.tickets), direction, runs, after)
        ticket = self.engine.submit(transfer, fence=fence)
        self.tickets[ticket.id] = ticket
        self._log.append(transfer)
        self.engine.check_integrity()
        return ticket

    def out(self, src: list[int], dst: list[int]) -> Ticket:
        return self.submit(Direction.OUT, src, dst)

    def back(self, src: list[int], dst: list[int]) -> Ticket:
        return self.submit(Direction.IN, src, dst)

    def wrong(self) -> list[str]:
        """Let everything end; name all blocks whose bytes are not what they should be."""
        self.engine.drain(PATIENCE)
        self.engine.check_integrity()
        device: list[int | None] = [0] * self.device_blocks
        host: list[int | None] = [0] * self.host_blocks
        for entry in self._log:
            if isinstance(entry, tuple):
                device[entry[0]] = entry[1]
                continue
            sides = (device, host) if entry.direction is Direction.OUT else (host, device)
            for first_src, first_dst, count in entry.runs.tolist():
                for i in range(count):
                    failed = self.tickets[entry.id].error is not None
                    sides[1][first_dst + i] = None if failed else sides[0][first_src + i]
        return [
            f"{name} block {block}, region {i}"
            for name, values, memory in (("device", device, self.device), ("host", host, self.host))
            for block, value in enumerate(values)
            if value is not None
            for i, region in enumerate(memory)
            if (region[block] != self._bytes(value, region.shape[1])).any()
        ]

    def close(self) -> None:
        if isinstance(self.backend, ChaosBackend):
            self.backend.resume()
        self.engine.close()

    @staticmethod
    def _bytes(value: int, n: int) -> np.ndarray:
        """Bytes that tell values, and places in a block, apart; value 0 is poison."""
        if value == 0:
            return np.full(n, 0xFF, np.uint8)
        return ((np.arange(n) * 7 + value * 31) % 251).astype(np.uint8)


@pytest.fixture
def chaos() -> Iterator[Callable[..., ChaosBackend]]:
    """Make a `ChaosBackend`; all are closed at the end."""
    made: list[ChaosBackend] = []

    def make(seed: int | None = None, **traits: bool) -> ChaosBackend:
        made.append(ChaosBackend(seed, **traits))
        return made[-1]

    yield make
    for backend in made:
        backend.resume()
        backend.close()


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    """Make a `World`; all are closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(backend: ChaosBackend | CpuBackend | None = None, **shape: int) -> World:
            world = World(ChaosBackend() if backend is None else backend, **shape)
            stack.callback(world.close)
            return world

        yield make

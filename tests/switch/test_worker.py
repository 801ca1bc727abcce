"""The worker's half of a step on a device with streams: the forward waits on the device."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Direction, SwapOrders, Transfer
from kvswitch.switch import SwapWorker
from kvswitch.transfer import CpuBackend, Event, Queue, TransferEngine, layout_of

OUT, IN = Direction
PATIENCE = 20.0


class StreamBackend(CpuBackend):
    """The CPU backend with a stream that only remembers what it would wait for."""

    has_streams = True

    def __init__(self) -> None:
        super().__init__()
        self.queues: dict[Direction, Queue] = {}
        self.held: list[tuple[object, Event]] = []

    def open_queue(self, direction: Direction) -> Queue:
        self.queues[direction] = super().open_queue(direction)
        return self.queues[direction]

    def hold(self, stream: object | None, event: Event) -> None:
        self.held.append((stream, event))

    def block(self, direction: Direction) -> threading.Event:
        """Stop that queue until the event that is returned has been set."""
        gate = threading.Event()
        self.queues[direction]._give(gate)  # type: ignore[attr-defined]
        return gate


@pytest.fixture
def backend() -> StreamBackend:
    return StreamBackend()


@pytest.fixture
def engine(backend: StreamBackend) -> Iterator[TransferEngine]:
    device, host = np.zeros((2, 8, 64), np.uint8)
    with TransferEngine(backend, layout_of(device), layout_of(host)) as engine:
        yield engine


@pytest.fixture
def worker(engine: TransferEngine, backend: StreamBackend) -> SwapWorker:
    return SwapWorker(engine, backend)


def orders(number: int, direction: Direction, *wait: int) -> SwapOrders:
    runs = np.array([[number, number, 1]], np.int32)
    return SwapOrders(1, (Transfer(number, direction, runs),), wait=wait)


def test_what_the_stream_waits_for_is_complete_at_once_and_measured_when_it_is(
    worker: SwapWorker, engine: TransferEngine, backend: StreamBackend
) -> None:
    gate = backend.block(IN)
    worker.submit(orders(0, IN, 0), "stream")
    assert worker.wait() > 0
    assert [stream for stream, _ in backend.held] == ["stream"]
    assert worker.wait() == 0
    early = worker.report()
    assert (early.completed, early.measurements) == ((0,), ())
    assert worker.report().completed == ()
    gate.set()
    engine.drain(PATIENCE)
    late = worker.report()
    assert (late.completed, late.failed) == ((), ())
    assert [m.nbytes for m in late.measurements] == [64]


def test_what_has_ended_before_it_is_reported_is_reported_once(
    worker: SwapWorker, engine: TransferEngine, backend: StreamBackend
) -> None:
    gate = backend.block(OUT)
    worker.submit(orders(0, OUT, 0), "stream")
    worker.wait()
    gate.set()
    engine.drain(PATIENCE)
    report = worker.report()
    assert report.completed == (0,)
    assert len(report.measurements) == 1
    assert worker.report().completed == ()


def test_a_transfer_that_fails_under_a_stream_that_relies_on_it_is_no_small_matter(
    worker: SwapWorker,
    engine: TransferEngine,
    backend: StreamBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def move(*_: object, **__: object) -> None:
        raise OSError("lost")

    monkeypatch.setattr("kvswitch.transfer.pieces.Pieces.move", move)
    gate = backend.block(IN)
    worker.submit(orders(0, IN, 0), "stream")
    worker.wait()
    assert worker.report().completed == (0,)
    gate.set()
    engine.drain(PATIENCE)
    with pytest.raises(TransferError, match="lost"):
        worker.report()
    assert worker.report().failed == ()


def test_a_stream_that_cannot_be_told_to_wait_makes_the_caller_wait(
    worker: SwapWorker,
    engine: TransferEngine,
    backend: StreamBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hold(*_: object) -> None:
        raise TransferError("no")

    monkeypatch.setattr(backend, "hold", hold)
    worker.submit(orders(0, IN, 0), "stream")
    assert worker.wait() > 0
    assert worker.report().completed == (0,)


@pytest.mark.parametrize(("error", "told"), [(TransferError, False), (ConfigError, True)])
def test_without_a_fence_nothing_is_copied_and_everything_reported(
    error: type[Exception],
    told: bool,
    worker: SwapWorker,
    engine: TransferEngine,
    backend: StreamBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fence(stream: object) -> None:
        raise error("no")

    monkeypatch.setattr(backend, "fence", fence)
    with pytest.raises(error) if told else contextlib.nullcontext():
        worker.submit(orders(0, OUT), "stream")
    assert worker.report().failed == (0,)
    assert engine.poll() == []


def test_one_that_fails_before_it_is_reported_has_failed(
    worker: SwapWorker,
    engine: TransferEngine,
    backend: StreamBackend,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def move(*_: object, **__: object) -> None:
        raise OSError("lost")

    monkeypatch.setattr("kvswitch.transfer.pieces.Pieces.move", move)
    gate = backend.block(IN)
    worker.submit(orders(0, IN, 0), "stream")
    worker.wait()
    gate.set()
    engine.drain(PATIENCE)
    report = worker.report()
    assert (report.completed, report.failed) == ((), (0,))

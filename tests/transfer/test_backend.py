"""What every backend must do. To run another one through it, add it to `BACKENDS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Backend, Copies, CpuBackend, DeadQueue, Queue

# Makers of backends, each taking the `chaos` fixture's maker.
BACKENDS: dict[str, Callable[[Callable[..., Backend]], Backend]] = {
    "cpu": lambda chaos: CpuBackend(),
    "cpu-throttled": lambda chaos: CpuBackend(bandwidth=200e6),
    "chaos": lambda chaos: chaos(seed=1),
}

PATIENCE = 20.0
SLOW = 8 << 20  # bytes that take any backend a moment


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, chaos: Any) -> Iterator[Backend]:
    backend = BACKENDS[request.param](chaos)
    yield backend
    backend.close()


@pytest.fixture
def queue(backend: Backend) -> Queue:
    return backend.open_queue(Direction.OUT)


@pytest.fixture
def other(backend: Backend) -> Queue:
    return backend.open_queue(Direction.IN)


def memory(n: int, value: int = 0) -> np.ndarray:
    return np.full(n, value, np.uint8)


def copies(*pieces: tuple[np.ndarray, np.ndarray]) -> Copies:
    """Copies from the first to the second of each pair, in one window."""
    src, dst, nbytes = (
        np.array(column, np.uint64)
        for column in zip(
            *((s.ctypes.data, d.ctypes.data, s.nbytes) for s, d in pieces), strict=True
        )
    )
    return Copies(src, dst, nbytes, np.array([0, len(src)], np.int64), len(src))


SLOW_MEMORY = memory(SLOW), memory(SLOW)
SLOW_COPY = copies(SLOW_MEMORY)  # keeps a queue busy


def test_bytes_have_arrived_when_the_event_behind_them_is_reached(queue: Queue) -> None:
    src, dst = np.arange(200, dtype=np.uint8), memory(200)
    queue.copy(copies((src[:50], dst[100:150]), (src[50:150], dst[:100])), 0, 2)
    event = queue.record()
    assert event.wait(PATIENCE)
    assert event.done()
    assert event.error is None
    assert (dst[100:150] == src[:50]).all()
    assert (dst[:100] == src[50:150]).all()
    assert (dst[150:] == 0).all()


def test_only_the_window_asked_for_is_copied(queue: Queue) -> None:
    src, dst = memory(40, 7), memory(40)
    pieces = copies(*((src[i : i + 10], dst[i : i + 10]) for i in range(0, 40, 10)))
    queue.copy(pieces, 1, 3)
    assert queue.record().wait(PATIENCE)
    assert dst.tolist() == [0] * 10 + [7] * 20 + [0] * 10


def test_copies_of_a_queue_run_in_order(queue: Queue) -> None:
    values = [memory(5000, value) for value in range(50)]
    dst, back = memory(5000), memory(5000)
    for value in values:
        queue.copy(copies((value, dst)), 0, 1)
        queue.copy(copies((dst, back)), 0, 1)
    assert queue.record().wait(PATIENCE)
    assert (dst == 49).all()
    assert (back == 49).all()


def test_events_are_reached_in_order_and_tell_when(queue: Queue) -> None:
    before = time.perf_counter()
    first = queue.record()
    queue.copy(SLOW_COPY, 0, 1)
    second = queue.record()
    assert second.wait(PATIENCE)
    assert first.done()
    assert before <= first.time <= second.time <= time.perf_counter()


def test_waiting_for_an_event_gives_up_in_time(queue: Queue) -> None:
    queue.copy(SLOW_COPY, 0, 1)
    event = queue.record()
    assert event.wait(0) == event.done() or event.done()
    assert event.wait(PATIENCE)


def test_a_queue_waits_for_what_has_been_recorded_on_another(queue: Queue, other: Queue) -> None:
    src, middle, dst = memory(SLOW, 9), memory(SLOW), memory(SLOW)
    for _ in range(5):
        queue.copy(SLOW_COPY, 0, 1)
    queue.copy(copies((src, middle)), 0, 1)
    event = queue.record()
    other.wait(event)
    other.copy(copies((middle, dst)), 0, 1)
    assert other.record().wait(PATIENCE)
    assert (dst == 9).all()


def test_a_wait_on_an_event_not_yet_recorded_does_not_wait(
    backend: Backend, queue: Queue, other: Queue
) -> None:
    event = backend.event()
    assert event.done()
    assert event.wait(0)
    assert event.error is None
    other.wait(event)
    passed = other.record()
    queue.wait(passed)  # the event is recorded behind what would have waited for it
    queue.record(event)
    assert passed.wait(PATIENCE)
    assert event.wait(PATIENCE)


def test_a_wait_is_for_the_recording_at_the_time_of_the_call(
    backend: Backend, queue: Queue, other: Queue
) -> None:
    event = queue.record(backend.event())
    assert event.wait(PATIENCE)
    other.wait(event)  # reached already: nothing to wait for
    queue.copy(SLOW_COPY, 0, 1)
    assert queue.record(event) is event
    assert other.record().wait(PATIENCE)
    assert event.wait(PATIENCE)


def test_recording_again_moves_an_event(backend: Backend, queue: Queue) -> None:
    event = backend.event()
    queue.record(event)
    assert event.wait(PATIENCE)
    src, dst = memory(SLOW, 3), memory(SLOW)
    queue.copy(copies((src, dst)), 0, 1)
    queue.record(event)
    assert event.wait(PATIENCE)
    assert (dst == 3).all()


def test_a_wait_for_its_own_event_passes(queue: Queue) -> None:
    queue.copy(SLOW_COPY, 0, 1)
    queue.wait(queue.record())
    assert queue.record().wait(PATIENCE)


def test_closing_finishes_what_was_given_and_takes_nothing_more(
    backend: Backend, queue: Queue
) -> None:
    src, dst = memory(SLOW, 4), memory(SLOW)
    queue.copy(copies((src, dst)), 0, 1)
    event = queue.record()
    backend.close()
    assert event.done()
    assert (dst == 4).all()
    backend.close()
    with pytest.raises(DeadQueue):
        queue.copy(copies((src, dst)), 0, 1)
    with pytest.raises(TransferError):
        queue.record()


def test_there_is_a_fence_or_nothing_to_wait_for(backend: Backend, queue: Queue) -> None:
    fence = backend.fence(None)
    if fence is not None:
        queue.wait(fence)
    assert queue.record().wait(PATIENCE)


def test_backends_say_whether_they_coalesce(backend: Backend) -> None:
    assert backend.coalesce in (True, False)

"""What every backend must do: on the CPU, above the fake CUDA driver, and on a real GPU.

To run another one through it, add it to `BACKENDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Backend, Copies, CpuBackend, DeadQueue, Queue

PATIENCE = 20.0
SLOW = 8 << 20  # bytes that take any backend a moment

Maker = Callable[[pytest.FixtureRequest], Backend]


def cuda(**settings: Any) -> Maker:
    def make(request: pytest.FixtureRequest) -> Backend:
        from kvswitch_cuda import CudaBackend

        return CudaBackend(0, **settings)

    return make


def cuda_in_python(request: pytest.FixtureRequest) -> Backend:
    """As where numba is missing."""
    from kvswitch_cuda import dispatch

    patch = request.getfixturevalue("monkeypatch")
    patch.setattr("kvswitch_cuda.queue.make_dispatch", dispatch._python_dispatch)
    return cuda(copies="batch")(request)


ON_HOST: dict[str, Maker] = {
    "cpu": lambda request: CpuBackend(),
    "cpu-throttled": lambda request: CpuBackend(bandwidth=200e6),
    "chaos": lambda request: request.getfixturevalue("chaos")(seed=1),
}
ON_CUDA: dict[str, Maker] = {
    "batch": cuda(copies="batch"),
    "batch-paced-by-host": cuda(copies="batch", pacing="host"),
    "batch-in-python": cuda_in_python,
    "loop": cuda(copies="loop"),
    "kernel": cuda(copies="kernel"),
    "auto": cuda(copies="auto"),
}
# Maker, and the fixture that makes memory for it.
BACKENDS = {
    **{name: (make, "host_memory") for name, make in ON_HOST.items()},
    **{f"fake-{name}": (make, "fake_cuda") for name, make in ON_CUDA.items()},
    **{f"gpu-{name}": (make, "real_cuda") for name, make in ON_CUDA.items()},
}
PARAMETERS = [
    pytest.param(value, id=name, marks=pytest.mark.gpu if name.startswith("gpu") else ())
    for name, value in BACKENDS.items()
]


@pytest.fixture(params=PARAMETERS)
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Backend, Any]]:
    """A backend, and where its memory comes from."""
    make, memory = request.param
    place = request.getfixturevalue(memory)
    backend = make(request)
    yield backend, place
    backend.close()


@pytest.fixture
def backend(made: tuple[Backend, Any]) -> Backend:
    return made[0]


@pytest.fixture
def place(made: tuple[Backend, Any]) -> Any:
    return made[1]


@pytest.fixture
def queue(backend: Backend) -> Queue:
    """From the device to the host."""
    return backend.open_queue(Direction.OUT)


@pytest.fixture
def other(backend: Backend) -> Queue:
    """From the host to the device."""
    return backend.open_queue(Direction.IN)


def copies(*pieces: tuple[Any, Any], windows: tuple[int, ...] = ()) -> Copies:
    """Copies from the first to the second of each pair, in one window unless cut."""
    src, dst, nbytes = (
        np.array(column, np.uint64)
        for column in zip(*((s.address, d.address, s.nbytes) for s, d in pieces), strict=True)
    )
    edges = windows or (0, len(src))
    return Copies(src, dst, nbytes, np.array(edges, np.int64), len(src))


def filled(memory: Any, value: int) -> Any:
    memory.write(np.full(memory.nbytes, value, np.uint8))
    return memory


@pytest.fixture
def slow(place: Any) -> Copies:
    """What keeps a queue busy, from the device to the host."""
    return copies((place.device(SLOW), place.host(SLOW)))


def test_bytes_have_arrived_when_the_event_behind_them_is_reached(place: Any, queue: Queue) -> None:
    src, dst = place.device(200), place.host(200)
    values = np.arange(200, dtype=np.uint8)
    src.write(values)
    pieces = (src.part(0, 50), dst.part(100, 150)), (src.part(50, 150), dst.part(0, 100))
    queue.copy(copies(*pieces), 0, 2)
    event = queue.record()
    assert event.wait(PATIENCE)
    assert event.done()
    assert event.error is None
    landed = dst.read()
    assert (landed[100:150] == values[:50]).all()
    assert (landed[:100] == values[50:150]).all()
    assert (landed[150:] == 0).all()


def test_only_what_was_asked_for_is_copied(place: Any, queue: Queue) -> None:
    src, dst = filled(place.device(40), 7), place.host(40)
    pieces = copies(*((src.part(i, i + 10), dst.part(i, i + 10)) for i in range(0, 40, 10)))
    queue.copy(pieces, 1, 3)
    assert queue.record().wait(PATIENCE)
    assert dst.read().tolist() == [0] * 10 + [7] * 20 + [0] * 10


@pytest.mark.parametrize("direction", Direction)
def test_a_span_of_windows_is_copied_whole(
    direction: Direction, place: Any, backend: Backend
) -> None:
    rng = np.random.default_rng(0)
    src, dst = place.device(1 << 20), place.host(1 << 20)
    if direction is Direction.IN:
        src, dst = place.host(1 << 20), place.device(1 << 20)
    values = rng.integers(0, 256, 1 << 20, np.uint8)
    src.write(values)
    edges = np.unique(rng.integers(1, 1 << 20, 3000)).tolist()
    spans = list(zip([0, *edges], [*edges, 1 << 20], strict=True))
    order = rng.permutation(len(spans)).tolist()
    pieces = [(src.part(*spans[i]), dst.part(*spans[i])) for i in order]
    windows = (*range(0, len(spans), 97), len(spans))
    queue = backend.open_queue(direction)
    every = copies(*pieces, windows=windows)
    third = windows[len(windows) // 3]
    queue.copy(every, 0, third)
    queue.copy(every, third, len(spans))
    assert queue.record().wait(PATIENCE)
    assert (dst.read() == values).all()


def test_copies_of_a_queue_run_in_order(place: Any, queue: Queue) -> None:
    values = [filled(place.device(5000), value) for value in range(20)]
    dst = place.host(5000)
    for value in values:
        queue.copy(copies((value, dst)), 0, 1)
    assert queue.record().wait(PATIENCE)
    assert (dst.read() == 19).all()


def test_events_are_reached_in_order_and_tell_when(slow: Copies, queue: Queue) -> None:
    before = time.perf_counter()
    first = queue.record()
    queue.copy(slow, 0, 1)
    second = queue.record()
    assert second.wait(PATIENCE)
    assert first.done()
    assert first.time <= second.time
    # A device's clock is read through the host's, which somebody else may keep busy.
    assert before - 1.0 <= first.time <= second.time <= time.perf_counter() + 1.0


def test_waiting_for_an_event_gives_up_in_time(slow: Copies, queue: Queue) -> None:
    queue.copy(slow, 0, 1)
    event = queue.record()
    assert event.wait(0) == event.done() or event.done()
    assert event.wait(PATIENCE)


def test_a_queue_waits_for_what_has_been_recorded_on_another(
    place: Any, slow: Copies, queue: Queue, other: Queue
) -> None:
    src, middle = filled(place.device(SLOW), 9), place.host(SLOW)
    dst = place.device(SLOW)
    for _ in range(5):
        queue.copy(slow, 0, 1)
    queue.copy(copies((src, middle)), 0, 1)
    event = queue.record()
    other.wait(event)
    other.copy(copies((middle, dst)), 0, 1)
    assert other.record().wait(PATIENCE)
    assert (dst.read() == 9).all()


def test_what_comes_behind_a_wait_waits_in_every_window(
    place: Any, slow: Copies, queue: Queue, other: Queue
) -> None:
    # Also where windows alternate between streams.
    src, middle, dst = filled(place.device(64), 9), place.host(64), place.device(64)
    parts = [(middle.part(i, i + 8), dst.part(i, i + 8)) for i in range(0, 64, 8)]
    for _ in range(3):
        queue.copy(slow, 0, 1)
    queue.copy(copies((src, middle)), 0, 1)
    other.wait(queue.record())
    other.copy(copies(*parts, windows=tuple(range(9))), 0, 8)
    assert other.record().wait(PATIENCE)
    assert (dst.read() == 9).all()


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
    backend: Backend, slow: Copies, queue: Queue, other: Queue
) -> None:
    event = queue.record(backend.event())
    assert event.wait(PATIENCE)
    other.wait(event)  # reached already: nothing to wait for
    queue.copy(slow, 0, 1)
    assert queue.record(event) is event
    assert other.record().wait(PATIENCE)
    assert event.wait(PATIENCE)


def test_recording_again_moves_an_event(place: Any, backend: Backend, queue: Queue) -> None:
    event = backend.event()
    queue.record(event)
    assert event.wait(PATIENCE)
    src, dst = filled(place.device(SLOW), 3), place.host(SLOW)
    queue.copy(copies((src, dst)), 0, 1)
    queue.record(event)
    assert event.wait(PATIENCE)
    assert (dst.read() == 3).all()


def test_a_wait_for_its_own_event_passes(slow: Copies, queue: Queue) -> None:
    queue.copy(slow, 0, 1)
    queue.wait(queue.record())
    assert queue.record().wait(PATIENCE)


def test_closing_finishes_what_was_given_and_takes_nothing_more(
    place: Any, backend: Backend, queue: Queue
) -> None:
    src, dst = filled(place.device(SLOW), 4), place.host(SLOW)
    queue.copy(copies((src, dst)), 0, 1)
    event = queue.record()
    backend.close()
    assert event.done()
    assert (dst.read() == 4).all()
    backend.close()
    with pytest.raises(DeadQueue):
        queue.copy(copies((src, dst)), 0, 1)
    with pytest.raises(TransferError):
        queue.record()


def test_there_is_a_fence_or_nothing_to_wait_for(backend: Backend, queue: Queue) -> None:
    fence = backend.fence(None)
    assert fence is not None or not backend.has_streams
    if fence is not None:
        queue.wait(fence)
    assert queue.record().wait(PATIENCE)


def test_events_of_another_backend_are_refused(backend: Backend, queue: Queue) -> None:
    if type(queue).__name__ == "ChaosQueue":
        pytest.skip("it trusts the tests that use it")
    stranger: Any = object()
    with pytest.raises(TransferError, match="no event of the"):
        queue.wait(stranger)
    with pytest.raises(TransferError, match="no event of the"):
        queue.record(stranger)


def test_its_arena_holds_what_was_asked_for(backend: Backend) -> None:
    arena = backend.host_arena(100_000)
    assert arena.nbytes == arena.view().nbytes == 100_000
    assert arena.view().ctypes.data == arena.address
    arena.close()
    arena.close()


def test_backends_say_what_suits_them(backend: Backend) -> None:
    assert backend.coalesce in (True, False)
    assert backend.window_bytes >= 4096
    assert backend.span_bytes >= 0

"""The CPU backend beyond what all backends do: lateness, bandwidth, failures and death."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Copies, CpuBackend, DeadQueue, pieces
from kvswitch.transfer.pieces import Pieces

PATIENCE = 20.0


def copies(src: np.ndarray, dst: np.ndarray, *pieces: tuple[int, int, int]) -> Copies:
    """Copies of `nbytes` from an offset in `src` to one in `dst`."""
    at, to, nbytes = np.array(pieces, np.uint64).reshape(-1, 3).T.copy()
    at += np.uint64(src.ctypes.data)
    to += np.uint64(dst.ctypes.data)
    return Copies(at, to, nbytes, np.array([0, len(at)], np.int64), len(at))


@pytest.fixture
def backend() -> Iterator[CpuBackend]:
    backend = CpuBackend()
    yield backend
    backend.close()


def test_bytes_land_when_their_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr("kvswitch.transfer.cpu.time.sleep", lambda _: over.wait(PATIENCE))
    backend = CpuBackend(bandwidth=10.0)
    queue = backend.open_queue(Direction.OUT)
    src, dst = np.ones((2, 100), np.uint8)
    queue.copy(copies(src, dst, (0, 0, 100)), 0, 1)
    event = queue.record()
    assert not event.wait(0.02)
    src[:] = 3  # too early: the copy has not read it yet
    assert (dst == 1).all()
    over.set()
    assert event.wait(PATIENCE)
    assert (dst == 3).all()
    backend.close()


def test_bandwidth_bounds_each_direction_by_itself() -> None:
    bandwidth, nbytes, windows = 4e6, 100_000, 20
    backend = CpuBackend(bandwidth=bandwidth)
    src, dst = np.zeros((2, nbytes * windows), np.uint8)
    window = [(i * nbytes, i * nbytes, nbytes) for i in range(windows)]
    marks = []
    for queue in [backend.open_queue(direction) for direction in Direction]:
        begin = queue.record()
        every = copies(src, dst, *window)
        for i in range(windows):
            queue.copy(every, i, i + 1)
        marks.append((begin, queue.record()))
    for begin, end in marks:
        assert end.wait(PATIENCE)
        assert nbytes * windows / (end.time - begin.time) <= bandwidth
    (one, one_end), (other, other_end) = marks
    assert max(one.time, other.time) < min(one_end.time, other_end.time)  # side by side
    backend.close()


def test_the_throttle_makes_up_for_sleeping_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = 100.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds + 0.004 if seconds else 0.0

    backend = CpuBackend(bandwidth=1000.0)
    queue = backend.open_queue(Direction.OUT)
    monkeypatch.setattr("kvswitch.transfer.cpu.time.sleep", sleep)
    monkeypatch.setattr("kvswitch.transfer.cpu.time.perf_counter", lambda: now)
    src, dst = np.zeros((2, 100), np.uint8)
    every = copies(src, dst, *((i * 10, i * 10, 10) for i in range(10)))
    for i in range(10):
        queue.copy(every, i, i + 1)
    assert queue.record().wait(PATIENCE)
    assert slept == pytest.approx([0.010] + [0.006] * 9)
    backend.close()


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan")])
def test_bandwidth_is_positive(bandwidth: float) -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        CpuBackend(bandwidth=bandwidth)


def test_a_failure_is_told_by_the_next_event_only(backend: CpuBackend) -> None:
    queue = backend.open_queue(Direction.OUT)
    src, dst = np.ones((2, 100), np.uint8)
    nowhere = copies(src, np.empty(0, np.uint8), (0, 0, 10), (10, 10, 10))
    nowhere.dst[:] = 8
    before = queue.record()
    queue.copy(nowhere, 0, 2)
    failed = queue.record()
    queue.copy(copies(src, dst, (0, 0, 100)), 0, 1)
    after = queue.record()
    assert after.wait(PATIENCE)
    assert (before.error, after.error) == (None, None)
    assert isinstance(failed.error, TransferError)
    assert "Bad address" in str(failed.error)


def test_events_of_other_backends_are_refused(backend: CpuBackend) -> None:
    queue = backend.open_queue(Direction.OUT)
    for use in (queue.wait, queue.record):
        with pytest.raises(TransferError, match="no event of the CPU backend"):
            use(object())  # type: ignore[arg-type]


def test_a_thread_that_dies_takes_its_events_with_it(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, other = (backend.open_queue(direction) for direction in Direction)
    gate = threading.Event()

    def move(self: Pieces, *, one_by_one: bool) -> bool:
        gate.wait(PATIENCE)
        raise SystemExit("killed")

    monkeypatch.setattr(Pieces, "move", move)
    src, dst = np.ones((2, 100), np.uint8)
    early = queue.record()
    queue.copy(copies(src, dst, (0, 0, 100)), 0, 1)
    event, later = queue.record(), queue.record()
    other.wait(later)
    passed = other.record()
    gate.set()
    for lost in (event, later):
        assert lost.wait(PATIENCE)
        assert isinstance(lost.error, DeadQueue)
        assert "killed" in str(lost.error)
    assert early.error is None
    assert passed.wait(PATIENCE)  # nobody waits for the dead
    with pytest.raises(DeadQueue, match="killed"):
        queue.copy(copies(src, dst, (0, 0, 100)), 0, 1)
    with pytest.raises(DeadQueue, match="killed"):
        queue.record()
    assert other.record().wait(PATIENCE)


# Pieces


@pytest.fixture(params=["readv", "memmove"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with and without process_vm_readv."""
    if request.param == "memmove":
        monkeypatch.setattr(pieces, "_readv", None)
    elif pieces._readv is None:
        pytest.skip("process_vm_readv is refused here")
    return request.param


def scattered(
    n: int, rng: np.random.Generator, most: int = 40
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Copies]:
    """Source, destination, what the latter must become, and copies of n pieces of some bytes."""
    sizes = rng.integers(1, most, n)
    src = rng.integers(0, 256, int(sizes.sum()) + n, np.uint8)
    dst = np.full(len(src), 0xFF, np.uint8)
    expected = dst.copy()
    order = rng.permutation(n)
    starts = np.cumsum(sizes + 1) - sizes - 1
    to = np.zeros(n, int)
    to[order] = np.cumsum(sizes[order] + 1) - sizes[order] - 1
    for a, b, size in zip(starts, to, sizes, strict=True):
        expected[b : b + size] = src[a : a + size]
    return src, dst, expected, copies(src, dst, *zip(starts, to, sizes, strict=True))


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 3000])
def test_any_number_of_pieces_is_copied(way: str, n: int) -> None:
    _, dst, expected, every = scattered(n, np.random.default_rng(n))
    assert Pieces(every, 0, n).move()
    assert (dst == expected).all()


@pytest.mark.parametrize("seed", range(10))
def test_calls_that_stop_early_are_continued(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    _, dst, expected, every = scattered(1500, rng)
    calls = []

    def short(pid: int, to: int, n: int, at: int, m: int, flags: int) -> int:
        """Copy some of what is asked for, and stop even inside a piece."""
        assert n == m <= 1024
        local, remote = (
            np.ctypeslib.as_array((ctypes.c_uint64 * (2 * n)).from_address(address)).reshape(n, 2)
            for address in (to, at)
        )
        assert (local[:, 1] == remote[:, 1]).all()
        left = moved = int(rng.integers(1, 1 + local[:, 1].sum()))
        for (a, size), (b, _) in zip(local.tolist(), remote.tolist(), strict=True):
            ctypes.memmove(a, b, min(size, left))
            left -= min(size, left)
        calls.append(moved)
        return moved

    monkeypatch.setattr(pieces, "_readv", short)
    assert Pieces(every, 0, 1500).move()
    assert (dst == expected).all()
    assert sum(calls) == every.nbytes.sum()
    assert len(calls) > 2


@pytest.mark.parametrize("result", [0, -1])
def test_a_call_that_copies_nothing_fails(result: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_readv", lambda *_: result)
    _, _, _, every = scattered(5, np.random.default_rng(0))
    with pytest.raises(TransferError, match="copying 5 pieces"):
        Pieces(every, 0, 5).move()


def test_large_pieces_go_one_by_one_until_the_gil_is_slow_to_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size, n = 256 << 10, 8
    src = np.random.default_rng(0).integers(0, 256, n * size, np.uint8)
    one_by_one: list[int] = []
    now = 0.0

    def memmove(to: int, at: int, nbytes: int) -> None:
        nonlocal now
        now += 0.005 if len(one_by_one) == slow_at else 0.0
        one_by_one.append(nbytes)
        np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(to))[:] = (
            np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(at))
        )

    monkeypatch.setattr("kvswitch.transfer.pieces.ctypes.memmove", memmove)
    monkeypatch.setattr("kvswitch.transfer.pieces.time.perf_counter", lambda: now)
    for slow_at, allowed, expected in ((None, True, n), (2, True, 3), (None, False, 0)):
        one_by_one.clear()
        dst = np.zeros(n * size, np.uint8)
        every = copies(src, dst, *((i * size, (n - 1 - i) * size, size) for i in range(n)))
        prompt = Pieces(every, 0, n).move(one_by_one=allowed)
        assert len(one_by_one) == expected
        assert prompt == (slow_at is None)
        assert (dst.reshape(n, size) == src.reshape(n, size)[::-1]).all()


def test_a_backend_told_so_leaves_single_copies_for_a_while(
    backend: CpuBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def move(self: Pieces, *, one_by_one: bool) -> bool:
        asked.append(one_by_one)
        return len(asked) != 2

    monkeypatch.setattr(Pieces, "move", move)
    now = 100.0
    monkeypatch.setattr("kvswitch.transfer.cpu.time.perf_counter", lambda: now)
    queue = backend.open_queue(Direction.OUT)
    src, dst = np.ones((2, 100), np.uint8)
    for i in range(4):
        queue.copy(copies(src, dst, (0, 0, 100)), 0, 1)
        if i == 2:
            assert queue.record().wait(PATIENCE)
            now += 1
    assert queue.record().wait(PATIENCE)
    assert asked == [True, True, False, True]


def test_readv_is_looked_for_once_and_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, readv: Callable[..., int] | None) -> None:
            if readv is not None:
                self.process_vm_readv = type("f", (), {"__call__": lambda self, *a: readv(*a)})()

    for readv in (None, lambda *_: -1):  # not Linux; refused by a sandbox
        monkeypatch.setattr("ctypes.CDLL", lambda *_, readv=readv, **__: Library(readv))
        assert pieces._find_readv() is None

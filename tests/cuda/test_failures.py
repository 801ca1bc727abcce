"""Every call of the driver fails once: named errors, nothing hangs, nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError, KVSwitchError, TransferError
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import DeadQueue, Layout, Region, TransferEngine

OUT, IN = Direction
PATIENCE = 20.0
OUT_OF_MEMORY, INVALID_VALUE, ILLEGAL_ADDRESS = 2, 1, 700
BLOCK, BLOCKS = 256, 32


def layout(memory: Any, regions: int = 1) -> Layout:
    size = BLOCKS * BLOCK
    return Layout(
        tuple(Region(memory.address + i * size, BLOCK, BLOCK) for i in range(regions)), BLOCKS
    )


def make_engine(cuda: Any, window_bytes: int = 1024, **settings: Any) -> TransferEngine:
    from kvswitch_cuda import CudaBackend

    device, host = cuda.device(BLOCKS * BLOCK), cuda.host(BLOCKS * BLOCK)
    backend = CudaBackend(0, **{"copies": "batch", **settings})
    return TransferEngine(backend, layout(device), layout(host), window_bytes=window_bytes)


def transfer(number: int, direction: Direction = OUT, blocks: int = BLOCKS) -> Transfer:
    return Transfer(number, direction, np.array([[0, 0, blocks]], np.int32))


# While things are made


CALLS_AT_START = [
    ("cuDeviceGetCount", 1),
    ("cuDeviceGet", 1),
    ("cuDeviceGet", 2),  # for the arena
    ("cuDevicePrimaryCtxRetain", 1),
    ("cuDevicePrimaryCtxRetain", 2),
    ("cuCtxPushCurrent_v2", 1),
    ("cuCtxPushCurrent_v2", 3),
    ("cuMemHostRegister_v2", 1),
    ("cuCtxGetStreamPriorityRange", 1),
    *(("cuStreamCreateWithPriority", nth) for nth in range(1, 5)),
    *(("cuEventCreate", nth) for nth in range(1, 6)),
    ("cuEventRecord", 1),
]


@pytest.mark.parametrize(("function", "nth"), CALLS_AT_START)
def test_a_call_that_fails_while_a_backend_is_made_is_named(
    function: str, nth: int, fake_cuda: Any
) -> None:
    from kvswitch_cuda import CudaBackend

    backends = []

    def start() -> None:
        backends.append(CudaBackend(0, copies="batch"))
        backends[0].host_arena(10_000).close()
        for direction in Direction:
            backends[0].open_queue(direction)
        backends[0].fence(1)

    calls = fake_cuda.calls(function)
    fake_cuda.fail(function, OUT_OF_MEMORY, nth)
    try:
        with pytest.raises(KVSwitchError, match="OUT_OF_MEMORY"):
            start()
        assert fake_cuda.calls(function) == calls + nth
    finally:
        for backend in backends:
            backend.close()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": 7}, "no CUDA device 7: this process sees 2"),
        ({"device": -1}, "no CUDA device -1"),
        ({"copies": "dma"}, "'batch', 'loop' or 'kernel', not 'dma'"),
        ({"pacing": "none"}, "'device' or 'host'"),
        ({"thread_blocks": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    settings: dict[str, Any], reason: str, fake_cuda: Any
) -> None:
    from kvswitch_cuda import CudaBackend

    with pytest.raises(ConfigError, match=reason):
        CudaBackend(**settings)


def test_pinned_memory_that_is_not_to_be_had_is_given_back_whole(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import PinnedArena, arena

    monkeypatch.setattr(arena, "_STEP", 1 << 20)
    fake_cuda.set("pinnable", 5 << 19)
    with pytest.raises(ConfigError, match=r"pins no more than 0\.00 of 0\.01 GiB.*OUT_OF_MEMORY"):
        PinnedArena(10 << 20)
    assert fake_cuda.left("ranges") == 0


def test_the_limit_on_locked_memory_is_named(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import PinnedArena

    monkeypatch.setattr("resource.getrlimit", lambda _: (65536, 65536))
    fake_cuda.fail("cuMemHostRegister_v2", OUT_OF_MEMORY)
    with pytest.raises(ConfigError, match=r"limited to 64 KiB \(ulimit -l"):
        PinnedArena(1 << 20)


def test_more_host_memory_than_there_is_is_refused_before_anything_is_pinned(
    fake_cuda: Any,
) -> None:
    from kvswitch_cuda import PinnedArena

    with pytest.raises(ConfigError, match="free memory"):
        PinnedArena(1 << 50)
    assert fake_cuda.calls("cuMemHostRegister_v2") == 0


# Under way


@pytest.mark.parametrize("copies", ["batch", "loop", "kernel"])
def test_a_refused_copy_fails_that_transfer_only(copies: str, fake_cuda: Any) -> None:
    function = {
        "batch": "cuMemcpyBatchAsync",
        "loop": "cuMemcpyAsync",
        "kernel": "cuLaunchKernel",
    }[copies]
    with make_engine(fake_cuda, copies=copies) as engine:
        fake_cuda.fail(function, INVALID_VALUE, 3)
        broken, sound = engine.submit(transfer(0)), engine.submit(transfer(1, IN))
        with pytest.raises(TransferError, match="INVALID_VALUE"):
            broken.wait(PATIENCE)
        sound.wait(PATIENCE)
        engine.submit(transfer(2)).wait(PATIENCE)


ASYNCHRONOUS = ["cuEventRecord", "cuStreamWaitEvent", "cuEventSynchronize"]


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("function", ASYNCHRONOUS)
def test_whatever_call_fails_everybody_is_told(function: str, nth: int, fake_cuda: Any) -> None:
    with make_engine(fake_cuda) as engine:
        fake_cuda.fail(function, INVALID_VALUE, nth)
        tickets = [engine.submit(transfer(i, Direction(i % 2))) for i in range(8)]
        engine.drain(PATIENCE)
        failed = [t for t in tickets if t.error is not None]
        assert failed or fake_cuda.calls(function) < nth
        assert all("INVALID_VALUE" in str(t.error) for t in failed)
        engine.check_integrity()


@pytest.mark.parametrize("copies", ["batch", "loop", "kernel"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_lost_context_is_told_to_everybody(copies: str, at: int, fake_cuda: Any) -> None:
    with make_engine(fake_cuda, copies=copies) as engine:
        fake_cuda.set("break_in", at)
        tickets = [engine.submit(transfer(i, Direction(i % 2))) for i in range(6)]
        engine.drain(PATIENCE)
        with pytest.raises(TransferError, match=r"ILLEGAL_ADDRESS.*restart the process"):
            tickets[-1].wait(0)
        with pytest.raises(TransferError, match="has died"):
            engine.submit(transfer(100))
        engine.check_integrity()
    fake_cuda.reset()


def test_what_compute_asks_of_a_lost_context_is_named(fake_cuda: Any) -> None:
    from kvswitch_cuda import CudaBackend

    backend = CudaBackend(0, copies="batch")
    event = backend.fence(1)
    fake_cuda.fail("cuEventRecord", ILLEGAL_ADDRESS)
    with pytest.raises(DeadQueue, match="context is lost"):
        backend.fence(1)
    fake_cuda.fail("cuStreamWaitEvent", ILLEGAL_ADDRESS)
    with pytest.raises(DeadQueue, match="context is lost"):
        backend.hold(1, event)
    fake_cuda.fail("cuEventQuery", ILLEGAL_ADDRESS)
    assert event.done()
    assert isinstance(event.error, DeadQueue)
    backend.close()


def test_memory_that_is_not_pinned_is_refused(fake_cuda: Any) -> None:
    from kvswitch_cuda import CudaBackend

    device, host = fake_cuda.device(BLOCKS * BLOCK), np.zeros(BLOCKS * BLOCK, np.uint8)
    pageable = Layout((Region(host.ctypes.data, BLOCK, BLOCK),), BLOCKS)
    with TransferEngine(CudaBackend(0, copies="batch"), layout(device), pageable) as engine:
        ticket = engine.submit(transfer(0))
        with pytest.raises(TransferError, match="INVALID_VALUE"):
            ticket.wait(PATIENCE)


# Beside graph captures


def test_dispatchers_do_not_spoil_a_graph_capture_elsewhere(fake_cuda: Any) -> None:
    with make_engine(fake_cuda) as engine:
        engine.submit(transfer(0)).wait(PATIENCE)
        fake_cuda.set("capturing", 1)
        tickets = [engine.submit(transfer(i, Direction(i % 2))) for i in range(1, 9)]
        engine.drain(PATIENCE)
        assert [t.error for t in tickets] == [None] * 8
        assert not fake_cuda.left("spoiled")
        fake_cuda.set("capturing", 0)


def test_a_thread_that_is_not_relaxed_would_spoil_it(fake_cuda: Any) -> None:
    # The control of the test before: the capture mode belongs to the thread.
    from kvswitch_cuda import CudaBackend

    backend = CudaBackend(0, copies="batch")
    event = backend.fence(1)
    fake_cuda.set("capturing", 1)
    thread = threading.Thread(target=event.done)
    thread.start()
    thread.join()
    assert fake_cuda.left("spoiled")
    fake_cuda.set("capturing", 0)
    backend.close()


# The engine's own thread


@pytest.mark.parametrize("copies", ["batch", "auto"])
def test_the_callers_context_stays_what_it_was(
    copies: str, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvswitch_cuda import CudaBackend
    from kvswitch_cuda.driver import Driver

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing has been measured
    driver = Driver.load()
    outside = int(driver("cuCtxGetCurrent"))
    one, other = (CudaBackend(i, copies=copies) for i in range(2))
    assert int(driver("cuCtxGetCurrent")) == outside
    with one.context:
        before = int(driver("cuCtxGetCurrent"))
        other.hold(1, other.fence(1))
        assert int(driver("cuCtxGetCurrent")) == before
    assert int(driver("cuCtxGetCurrent")) == outside
    one.close()
    other.close()


def test_submitting_does_not_wait_for_a_busy_device(fake_cuda: Any) -> None:
    with make_engine(fake_cuda) as engine:
        fake_cuda.reset(pause_us=200_000)
        begin = time.monotonic()
        tickets = [engine.submit(transfer(i)) for i in range(3)]
        assert not tickets[-1].done
        assert time.monotonic() - begin < 10  # a hundred windows of up to 0.2 s are under way
        fake_cuda.reset(pause_us=0)
        engine.drain(PATIENCE)


def finally_done(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_a_transfer_is_cancelled_between_spans(fake_cuda: Any) -> None:
    with make_engine(fake_cuda, window_bytes=BLOCK, pacing="host") as engine:
        fake_cuda.reset(pause_us=200_000)
        ticket = engine.submit(transfer(0))
        assert finally_done(lambda: fake_cuda.calls("cuMemcpyBatchAsync") >= 2)
        engine.cancel(0)
        with pytest.raises(TransferError, match="cancelled"):
            ticket.wait(PATIENCE)
        assert fake_cuda.calls("cuMemcpyBatchAsync") < BLOCKS
        fake_cuda.reset()

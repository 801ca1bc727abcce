"""The engine's own small copies beside a swap, on copy engines that know no priorities.

The fake driver's copy engines are what others have found real ones to be: one a direction, which
stays with a stream as long as that has copies ready. Time is counted in windows here.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import Layout, Region, TransferEngine

OUT, IN = Direction
PATIENCE = 30.0
WINDOW, WINDOWS = 64 << 10, 32


class Scene:
    """A swap of many windows, and a stream of the engine's own."""

    def __init__(self, cuda: Any, direction: Direction, window: int, **settings: Any) -> None:
        from kvswitch_cuda import CudaBackend

        nbytes = WINDOW * WINDOWS
        device, host = cuda.device(nbytes), cuda.host(nbytes)
        self._small = cuda.device(4096), cuda.host(4096)
        self._direction = direction
        cuda.reset(pause_us=0, bandwidth=3_200_000)  # a window takes 20 ms: long, for busy machines
        self.backend = CudaBackend(0, **{"copies": "batch", **settings})
        layouts = [Layout((Region(m.address, 4096, 4096),), nbytes // 4096) for m in (device, host)]
        self.engine = TransferEngine(self.backend, *layouts, window_bytes=window)
        self.stream = self.backend.context.open_stream()

    def probe(self) -> float:
        """Begin a swap, then a small copy the same way: how many windows long that waits."""
        runs = np.array([[0, 0, WINDOW * WINDOWS // 4096]], np.int32)
        ticket = self.engine.submit(Transfer(0, self._direction, runs))
        time.sleep(0.005)
        src, dst = self._small[:: 1 - 2 * self._direction]
        begin, end = (self.backend.event() for _ in range(2))
        with self.backend.context as context:
            driver = context.driver
            assert driver.record(begin.handle, self.stream) == 0  # type: ignore[attr-defined]
            assert driver.copy(dst.address, src.address, 4096, self.stream) == 0
            assert driver.record(end.handle, self.stream) == 0  # type: ignore[attr-defined]
            began = time.perf_counter()
            assert driver.synchronize(end.handle) == 0  # type: ignore[attr-defined]
            waited = time.perf_counter() - began
        ticket.wait(PATIENCE)
        return waited / (ticket.seconds / WINDOWS)

    def close(self) -> None:
        self.backend.context.close_stream(self.stream)
        self.engine.close()


@pytest.mark.parametrize("direction", Direction)
def test_a_small_copy_gets_in_between_windows(direction: Direction, fake_cuda: Any) -> None:
    scene = Scene(fake_cuda, direction, WINDOW)
    assert scene.probe() < 8  # one or two, on a machine that has nothing else to do
    scene.close()


def test_other_ways_of_giving_windows_keep_it_waiting(fake_cuda: Any) -> None:
    # The control: all windows on one stream, as if they were one.
    scene = Scene(fake_cuda, OUT, WINDOW)
    queue = scene.backend._queues[OUT]
    from kvswitch_cuda.dispatch import Slot

    queue._words[Slot.PACED] = 0
    assert scene.probe() > 16
    scene.close()
    unbounded = Scene(fake_cuda, OUT, WINDOW * WINDOWS)
    assert unbounded.probe() > 16
    unbounded.close()


def test_the_other_direction_is_not_in_its_way(fake_cuda: Any) -> None:
    scene = Scene(fake_cuda, OUT, WINDOW * WINDOWS)
    scene._direction, swap = IN, scene.engine.submit
    scene.engine.submit = lambda t: swap(Transfer(t.id, OUT, t.runs))  # type: ignore[method-assign]
    assert scene.probe() < 8
    scene.close()


def test_a_transfer_is_dispatched_before_the_compute_that_it_waits_for_has_ended(
    fake_cuda: Any,
) -> None:
    scene = Scene(fake_cuda, OUT, WINDOW)
    source, target = scene._small[1], scene._small[0]
    with scene.backend.context as context:
        for _ in range(600):  # each takes more than a millisecond
            assert context.driver.copy(target.address, source.address, 4096, scene.stream) == 0
    fence = scene.backend.fence(scene.stream)
    before = fake_cuda.calls("cuMemcpyBatchAsync")
    ticket = scene.engine.submit(Transfer(0, OUT, np.array([[0, 0, 1]], np.int32)), fence=fence)
    end = time.monotonic() + PATIENCE
    while fake_cuda.calls("cuMemcpyBatchAsync") == before:
        assert time.monotonic() < end
        time.sleep(0.001)
    assert not fence.done()
    ticket.wait(PATIENCE)
    assert fence.done()
    scene.close()

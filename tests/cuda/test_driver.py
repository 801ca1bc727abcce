"""Finding the driver, devices and streams; and a `KVSwitch` on the GPU that its cache lies on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswitch import ConfigError, KVSwitch, KVSwitchError
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import Layout, Region, TransferEngine

PATIENCE = 20.0


class Tensor:
    """What kvswitch looks at of a torch tensor."""

    is_cuda = True

    def __init__(self, memory: Any, *shape: int) -> None:
        self.memory, self.shape = memory, shape

    def data_ptr(self) -> int:
        return int(self.memory.address)

    def element_size(self) -> int:
        return 1

    def stride(self) -> tuple[int, ...]:
        return tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))


# The driver


def test_an_old_driver_is_refused(fake_cuda: Any) -> None:
    from kvswitch_cuda.driver import CudaUnavailable, Driver

    fake_cuda.set("version", 11080)
    with pytest.raises(CudaUnavailable, match=r"speaks CUDA 11\.8, 12\.0 is needed"):
        Driver()


def test_no_device_is_named(fake_cuda: Any) -> None:
    from kvswitch_cuda.driver import CudaUnavailable, Driver

    fake_cuda.set("devices", 0)
    with pytest.raises(CudaUnavailable, match=r"NO_DEVICE.*CUDA_VISIBLE_DEVICES"):
        Driver()


def test_a_driver_without_batches_copies_in_a_loop(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import CudaBackend, backend, dispatch
    from kvswitch_cuda.driver import CudaUnavailable, Driver

    fake_cuda.set("version", 12040)
    old = Driver()
    assert not old.has_batch
    monkeypatch.setattr(Driver, "load", lambda: old)
    monkeypatch.setattr(backend, "make_dispatch", dispatch._python_dispatch)
    monkeypatch.setattr("kvswitch_cuda.queue.make_dispatch", dispatch._python_dispatch)
    with pytest.raises(CudaUnavailable, match=r"CUDA 12\.8"):
        CudaBackend(0, copies="batch")
    fake_cuda.reset(pause_us=0)
    fake_cuda.set("version", 12040)
    fake_cuda.set("device_memory", 1 << 16)  # too little to measure
    made = CudaBackend(0)
    device, host = fake_cuda.device(4096), fake_cuda.host(4096)
    layouts = [Layout((Region(m.address, 64, 64),), 64) for m in (device, host)]
    with TransferEngine(made, *layouts) as engine:
        runs = np.array([[0, 3, 20], [30, 40, 2]], np.int32)
        engine.submit(Transfer(0, Direction.OUT, runs)).wait(PATIENCE)
    assert fake_cuda.calls("cuMemcpyAsync") == 2


def test_without_numba_windows_are_dispatched_in_python(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from kvswitch_cuda import dispatch
    from kvswitch_cuda.driver import Driver

    monkeypatch.setitem(sys.modules, "numba", None)
    made = dispatch.make_dispatch.__wrapped__(Driver.load())
    assert made.__name__ == "dispatch"
    assert "kvswitch[cuda]" in caplog.text


def test_without_a_driver_a_gpu_backend_says_so() -> None:
    script = """
import numpy as np
from kvswitch import ConfigError, KVSwitch
try:
    KVSwitch(np.zeros((4, 16)), {"backend": "cuda", "host_memory": 4096}, block_tokens=16)
except ConfigError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True
    )
    assert "no CUDA driver here" in run.stdout or "not in GPU memory" in run.stdout


def test_the_folder_of_this_name_does_not_hide_cuda_python() -> None:
    root = Path(__file__).parents[2]
    assert (root / "cuda").is_dir()
    script = "import cuda.bindings.driver, kvswitch_cuda"
    subprocess.run([sys.executable, "-c", script], cwd=root, timeout=240, check=True)


# Streams


def test_streams_of_all_kinds_are_taken_as_they_are(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda.driver import stream_handle

    class New:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 77

    class Old:
        cuda_stream = 78

    class Torch:
        class cuda:  # noqa: N801
            @staticmethod
            def is_initialized() -> bool:
                return True

            @staticmethod
            def current_stream(device: int) -> Any:
                stream = Old()
                stream.cuda_stream = 80 + device
                return stream

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert stream_handle(None, 1) == 0
    monkeypatch.setitem(sys.modules, "torch", Torch)  # type: ignore[arg-type]
    assert stream_handle(None, 1) == 81
    assert stream_handle(5, 0) == 5
    assert stream_handle(New(), 0) == 77
    assert stream_handle(Old(), 0) == 78
    with pytest.raises(ConfigError, match="no CUDA stream"):
        stream_handle("main", 0)


# Devices


def test_a_cache_tells_its_device(fake_cuda: Any) -> None:
    from kvswitch_cuda.driver import device_of

    assert [device_of(fake_cuda.device(64, device=d).address) for d in (1, 0)] == [1, 0]
    host = np.zeros(64, np.uint8)
    for address in (host.ctypes.data, fake_cuda.host(64).address):
        with pytest.raises(ConfigError, match="not in GPU memory"):
            device_of(address)


def test_engines_on_several_devices_at_once(fake_cuda: Any) -> None:
    from kvswitch_cuda import CudaBackend

    block, blocks, engines = 512, 64, []
    for number in range(2):
        device = fake_cuda.device(block * blocks, device=number)
        device.write(np.full(block * blocks, 1 + number, np.uint8))
        backend = CudaBackend(number, copies="batch")
        layout = Layout((Region(device.address, block, block),), blocks)
        arena = backend.host_arena(block * blocks)
        engines.append((TransferEngine(backend, layout, arena.layout(layout)), backend, arena))
    runs = np.array([[0, 0, blocks]], np.int32)
    tickets = [
        engine.submit(Transfer(i, Direction.OUT, runs), fence=backend.fence(None))
        for i in range(20)
        for engine, backend, _ in engines
    ]
    for ticket in tickets:
        ticket.wait(PATIENCE)
    for number, (engine, _, arena) in enumerate(engines):
        assert (arena.view() == 1 + number).all()
        engine.close()
        arena.close()


# KVSwitch


@pytest.mark.parametrize("backend", ["auto", "cuda-batch", "cuda-loop", "cuda-kernel"])
@pytest.mark.parametrize("device", [0, 1])
def test_a_sequence_leaves_a_gpu_and_comes_back(
    backend: str, device: int, fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.reset(pause_us=0)
    cache = [Tensor(fake_cuda.device(24 * 256, device=device), 24, 16, 16) for _ in range(2)]
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    config = {"host_memory": 24 * 512, "backend": backend, "strategy": "sync", "headroom": 0.0}
    with KVSwitch(cache, config, block_tokens=16) as switch:
        assert switch._worker._backend.context.device == device
        table = switch.allocate("a", 200)
        rng = np.random.default_rng(0)
        written = rng.integers(0, 256, (2, 24, 256), np.uint8)
        for layer, values in zip(cache, written, strict=True):
            layer.memory.write(values)
        switch.preempt("a")
        fake_cuda.reset(pause_us=2000)
        switch.step()
        switch.allocate("b", 24 * 16 - 200)  # and what "a" has left
        switch.step()
        switch._worker._engine.drain(PATIENCE)
        for layer in cache:
            layer.memory.write(np.zeros(24 * 256, np.uint8))
        switch.step()
        switch.free("b")
        switch.step()
        back = switch.resume("a")
        assert back.tokens == 200
        landed = switch.step().landed  # the stream comes after it; no thread has waited
        assert landed == {"a": 200}
        with switch._worker._backend.context as context:
            context.driver("cuStreamSynchronize", context.driver.api.CUstream(0))
        moved = switch.allocate("a", 200)
        for layer, values in zip(cache, written, strict=True):
            found = layer.memory.read().reshape(24, 256)
            assert (found[moved] == values[table]).all()
        switch.check_integrity()


def test_nothing_is_left_of_a_switch_that_cannot_be_made(fake_cuda: Any) -> None:
    cache = Tensor(fake_cuda.device(24 * 256), 24, 16, 16)
    fake_cuda.set("pinnable", 100)
    with pytest.raises(ConfigError, match="CUDA pins no more"):
        KVSwitch(cache, {"host_memory": 24 * 256, "backend": "cuda-batch"}, block_tokens=16)
    fake_cuda.reset()
    for nth in range(1, 8):
        fake_cuda.fail("cuEventCreate", 2, nth)
        try:
            KVSwitch(
                cache, {"host_memory": 24 * 256, "backend": "cuda-batch"}, block_tokens=16
            ).close()
        except KVSwitchError as error:
            assert "OUT_OF_MEMORY" in str(error)  # noqa: PT017


@pytest.mark.parametrize("place", ["fake_cuda", pytest.param("real_cuda", marks=pytest.mark.gpu)])
def test_an_event_recorded_anew_elsewhere_is_not_held_up_by_its_first_recording(
    request: pytest.FixtureRequest, place: str
) -> None:
    from kvswitch_cuda import CudaBackend

    cuda = request.getfixturevalue(place)
    if place == "fake_cuda":
        cuda.reset(pause_us=50_000)
    backend = CudaBackend(0, copies="loop")
    context, nbytes = backend.context, 1 << 20
    driver = context.driver
    source, target = cuda.device(nbytes), cuda.host(nbytes)
    slow, quick = context.open_stream(), context.open_stream()
    event = context.take_event()
    with context:
        assert driver.copy(target.address, source.address, nbytes, slow) == 0
        assert driver.record(event, slow) == 0
        assert driver.record(event, quick) == 0
        assert driver.synchronize(event) == 0
        driver("cuStreamSynchronize", driver.api.CUstream(slow))
        assert driver.query(event) == 0
    context.return_event(event)
    for stream in (slow, quick):
        context.close_stream(stream)
    backend.close()

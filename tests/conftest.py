"""A CUDA driver without a GPU, and a real one: see tests/cuda/fake_driver.c."""

from __future__ import annotations

import ctypes
import gc
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FAKE = Path(__file__).parent / "cuda" / "fake_driver.c"


class Memory:
    """Some memory, on the device or the host."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes

    def write(self, values: Any, offset: int = 0) -> None:
        array = np.ascontiguousarray(values, np.uint8)
        ctypes.memmove(self.address + offset, array.ctypes.data, array.nbytes)

    def read(self) -> np.ndarray:
        array = np.empty(self.nbytes, np.uint8)
        ctypes.memmove(array.ctypes.data, self.address, self.nbytes)
        return array

    def part(self, start: int, stop: int) -> Memory:
        part = type(self)(self.address + start, stop - start)
        part.__dict__ = {**self.__dict__, **part.__dict__}
        return part


class DeviceMemory(Memory):
    """Memory of a GPU, written and read by calls that have ended when they return."""

    context: Any

    def write(self, values: Any, offset: int = 0) -> None:
        array = np.ascontiguousarray(values, np.uint8)
        with self.context as context:
            context.driver("cuMemcpyHtoD", self.address + offset, array.ctypes.data, array.nbytes)

    def read(self) -> np.ndarray:
        array = np.empty(self.nbytes, np.uint8)
        with self.context as context:
            context.driver("cuMemcpyDtoH", array.ctypes.data, self.address, self.nbytes)
        return array


class HostMemory:
    """Memory for backends that copy between two places on the host."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []

    def host(self, nbytes: int) -> Memory:
        self._kept.append(np.zeros(nbytes, np.uint8))
        return Memory(self._kept[-1].ctypes.data, nbytes)

    device = host


@pytest.fixture
def host_memory() -> HostMemory:
    return HostMemory()


class Cuda:
    """A driver with devices, and memory on them; everything is given back at the end."""

    real = True

    def __init__(self) -> None:
        self._contexts: dict[int, Any] = {}
        self._device: list[tuple[Any, int]] = []
        self._host: list[Any] = []

    def context(self, device: int = 0) -> Any:
        from kvswitch_cuda.context import Context

        if device not in self._contexts:
            self._contexts[device] = Context(device)
        return self._contexts[device]

    def device(self, nbytes: int, device: int = 0) -> DeviceMemory:
        context = self.context(device)
        with context:
            address = int(context.driver("cuMemAlloc", nbytes))
        self._device.append((context, address))
        memory = DeviceMemory(address, nbytes)
        memory.context = context
        memory.write(np.zeros(nbytes, np.uint8))
        return memory

    def host(self, nbytes: int, device: int = 0) -> Memory:
        from kvswitch_cuda import PinnedArena

        self._host.append(PinnedArena(nbytes, device))
        return Memory(self._host[-1].address, nbytes)

    def close(self) -> None:
        for arena in self._host:
            arena.close()
        for context, address in self._device:
            with context:
                context.driver("cuMemFree", address)
        for context in self._contexts.values():
            context.close()


class FakeCuda(Cuda):
    """The fake driver."""

    real = False

    def __init__(self, library: Any) -> None:
        super().__init__()
        self._library = library

    def reset(self, *, seed: int = 0, pause_us: int = 100, bandwidth: int = 0) -> None:
        """Everything as at first; work takes up to that long, and as long as its bytes need."""
        self._library.fake_reset(seed, pause_us, bandwidth)

    def set(self, what: str, value: int) -> None:
        self._library.fake_set(what.encode(), value)

    def fail(self, function: str, code: int, nth: int = 1) -> None:
        """Let the nth call of that function from now fail."""
        self._library.fake_fail(function.encode(), nth, code)

    def calls(self, function: str) -> int:
        return int(self._library.fake_calls(function.encode()))

    def left(self, what: str) -> int:
        return int(self._library.fake_left(what.encode()))


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The fake libcuda.so.1, which whoever asks for that name from now on gets."""
    pytest.importorskip("cuda.bindings")
    folder = tmp_path_factory.mktemp("driver")
    path = folder / "libcuda.so.1"
    flags = ["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    soname = f"-Wl,-soname,{path.name}"
    try:
        subprocess.run(["cc", *flags, soname, "-o", path, FAKE], check=True)
    except FileNotFoundError:
        pytest.skip("the fake driver needs a C compiler")
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    library.fake_reset.argtypes = [ctypes.c_uint64] * 3
    library.fake_set.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    library.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_int]
    library.fake_calls.argtypes = library.fake_left.argtypes = [ctypes.c_char_p]
    library.fake_calls.restype = library.fake_left.restype = ctypes.c_long
    library.fake_reset(0, 0, 0)
    from kvswitch_cuda.driver import Driver

    driver = Driver.load()
    if driver("cuDeviceGetName", 256, 0).split(b"\0")[0] != b"Fake GPU 0":
        pytest.skip("a real CUDA driver is loaded in this process: run these without -m gpu")
    return library


@pytest.fixture(scope="session")
def cuda_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def fake_cuda(
    fake_library: Any, cuda_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeCuda]:
    """The fake driver with two devices; nothing may be left of what a test has made."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cuda_cache))
    monkeypatch.setattr("kvswitch_cuda.measuring._QUICK", (1 << 20, 1))
    cuda = FakeCuda(fake_library)
    cuda.reset()

    def left() -> dict[str, int]:
        gc.collect()  # events return themselves
        return {what: cuda.left(what) for what in ("handles", "ranges", "references", "modules")}

    before = left()
    yield cuda
    cuda.reset()
    gc.collect()  # before the context goes that errors' tracebacks may have kept events of
    cuda.close()
    assert left() == before


@pytest.fixture
def real_cuda(
    request: pytest.FixtureRequest, cuda_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cuda]:
    """A real GPU; for tests marked `gpu`."""
    from kvswitch_cuda import CudaUnavailable
    from kvswitch_cuda.driver import Driver

    monkeypatch.setenv("XDG_CACHE_HOME", str(cuda_cache))
    try:
        driver = Driver.load()
    except CudaUnavailable as error:
        pytest.skip(str(error))
    if driver("cuDeviceGetName", 256, 0).startswith(b"Fake"):
        pytest.skip("the fake driver is loaded in this process: run with -m gpu")
    cuda = Cuda()
    yield cuda
    cuda.close()

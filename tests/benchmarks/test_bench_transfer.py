"""Hot paths of transfers: planning, the caller's share of submitting, and bandwidth.

Bandwidth is measured in pairs with one memcpy of as many bytes; the median ratio is in the
`extra_info` of the report (``--benchmark-json``).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from itertools import count, product
from statistics import median

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kvswitch.messages import Direction, Runs, Transfer
from kvswitch.transfer import (
    CpuBackend,
    HostArena,
    Layout,
    Region,
    TransferEngine,
    coalesce,
    layout_of,
    lower,
)

OUT, IN = Direction
BLOCKS = 10_000
MIB = 1 << 20

rng = np.random.default_rng(0)


def groups(blocks: int, per_group: int, pool: int) -> np.ndarray:
    """Ids of that many blocks, in groups scattered over a pool."""
    first = rng.permutation(pool // per_group)[: blocks // per_group] * per_group
    return (first[:, None] + np.arange(per_group)).ravel().astype(np.int32)


def pairs(pattern: str) -> tuple[np.ndarray, np.ndarray]:
    per_group = {"contiguous": BLOCKS, "groups of 20": 20, "random": 1}[pattern]
    return groups(BLOCKS, per_group, 20_000), groups(BLOCKS, per_group, 40_000)


def fake_layout(regions: int, blocks: int, start: int) -> Layout:
    size = 32 << 10
    return Layout(
        tuple(Region(start + i * size * blocks, size, size) for i in range(regions)), blocks
    )


patterns = pytest.mark.parametrize("pattern", ["contiguous", "groups of 20", "random"])


@patterns
def test_bench_coalesce(pattern: str, benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"coalesce {BLOCKS} blocks"
    src, dst = pairs(pattern)
    assert len(benchmark(coalesce, src, dst)) <= BLOCKS


@patterns
@pytest.mark.parametrize("regions", [1, 32])
def test_bench_lower(regions: int, pattern: str, benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"coalesce and lower {BLOCKS} blocks x {regions} regions"
    src, dst = pairs(pattern)
    device, host = fake_layout(regions, 20_000, 1 << 40), fake_layout(regions, 40_000, 1 << 44)

    def plan() -> int:
        return lower(coalesce(src, dst), device, host, window_bytes=8 * MIB).num_copies

    assert benchmark(plan) >= regions


@pytest.mark.parametrize(
    "busy", [False, True], ids=["other direction idle", "other direction busy"]
)
@patterns
def test_bench_submit(pattern: str, busy: bool, benchmark: BenchmarkFixture) -> None:
    benchmark.group = f"submit {BLOCKS} blocks"
    src, dst = pairs(pattern)
    out, back = coalesce(src, dst), coalesce(dst, src)
    ids = count()
    device, host = np.zeros((20_000, 1), np.uint8), np.zeros((40_000, 1), np.uint8)
    with TransferEngine(CpuBackend(), layout_of(device), layout_of(host)) as engine:

        def setup() -> tuple[tuple[Transfer], dict[str, object]]:
            engine.drain()
            engine.poll()
            if busy:
                engine.submit(Transfer(next(ids), IN, back))
            return (Transfer(next(ids), OUT, out),), {}

        ticket = benchmark.pedantic(engine.submit, setup=setup, rounds=200)
        ticket.wait()


class Memory:
    """Device and host memory of the size of one transfer (host: twice), and a plain copy of it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.device, self.host = HostArena(nbytes), HostArena(2 * nbytes)
        self.source, self.target = np.ones(nbytes, np.uint8), np.ones(nbytes, np.uint8)

    def memcpy(self) -> None:
        ctypes.memmove(self.target.ctypes.data, self.source.ctypes.data, self.nbytes)

    def close(self) -> None:
        self.device.close()
        self.host.close()


@pytest.fixture(scope="module")
def memory(request: pytest.FixtureRequest) -> Iterator[Memory]:
    measured = request.config.getoption("benchmark_enable")
    memory = Memory(256 * MIB if measured else 32 * MIB)
    yield memory
    memory.close()


SIZES = {"64 KB": MIB // 16, "256 KB": MIB // 4, "1 MB": MIB, "4 MB": 4 * MIB, "16 MB": 16 * MIB}


def scene(memory: Memory, regions: int, group_bytes: int) -> tuple[Layout, Layout, Runs, Runs]:
    """All of the device's blocks in groups of that many bytes per region, and their way back."""
    block = 16 << 10
    blocks = memory.nbytes // regions // block
    group_bytes = min(group_bytes, blocks * block)
    cache = memory.device.view().reshape(regions, blocks, block)
    device = layout_of(list(cache))
    per_group = group_bytes // block
    src, dst = groups(blocks, per_group, blocks), groups(blocks, per_group, 2 * blocks)
    return device, memory.host.layout(device), coalesce(src, dst), coalesce(dst, src)


class Paired:
    """Bandwidth beside that of one memcpy of as many bytes, done right before each round."""

    def __init__(self, benchmark: BenchmarkFixture, memory: Memory) -> None:
        self._benchmark = benchmark
        self._memory = memory
        self._memcpy: list[float] = []

    def run(self, move: Callable[[], None], rounds: int) -> None:
        move()  # warm up
        self._benchmark.pedantic(move, setup=self._measure_memcpy, rounds=rounds)
        if self._benchmark.stats is not None:
            moved = self._benchmark.stats.stats.data
            ratios = [one / other for one, other in zip(self._memcpy, moved, strict=True)]
            self._benchmark.extra_info["GB/s"] = self._memory.nbytes / median(moved) / 1e9
            self._benchmark.extra_info["of one memcpy"] = median(ratios)

    def _measure_memcpy(self) -> None:
        begin = time.perf_counter()
        self._memory.memcpy()
        self._memcpy.append(time.perf_counter() - begin)


@pytest.mark.parametrize("way", ["out", "in"])
@pytest.mark.parametrize(("regions", "size"), [*product([1], SIZES), *product([32], [*SIZES][:-1])])
def test_bench_bandwidth(
    regions: int, size: str, way: str, memory: Memory, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = f"bandwidth, {regions} region{'s'[: regions > 1]}, groups of {size}"
    device, host, out, back = scene(memory, regions, SIZES[size])
    direction, runs = (OUT, out) if way == "out" else (IN, back)
    ids = count()
    with TransferEngine(CpuBackend(), device, host) as engine:

        def move() -> None:
            engine.submit(Transfer(next(ids), direction, runs)).wait()

        Paired(benchmark, memory).run(move, rounds=15)


@pytest.mark.parametrize("window_bytes", [8 * MIB, 64 * MIB])
@pytest.mark.parametrize("size", ["64 KB", "1 MB"])
def test_bench_bandwidth_beside_a_spinning_main_thread(
    size: str, window_bytes: int, memory: Memory, benchmark: BenchmarkFixture
) -> None:
    benchmark.group = f"bandwidth beside a spinning main thread, groups of {size}"
    device, host, out, _ = scene(memory, 1, SIZES[size])
    ids = count()
    with TransferEngine(CpuBackend(), device, host, window_bytes=window_bytes) as engine:

        def move() -> None:
            ticket = engine.submit(Transfer(next(ids), OUT, out))
            while not ticket.done:
                pass
            ticket.wait()

        Paired(benchmark, memory).run(move, rounds=5)

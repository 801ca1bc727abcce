"""Measuring how fast each way of copying is on the GPU at hand (docs: law 6)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

import numpy as np

from kvswitch.errors import TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Copies, DeadQueue
from kvswitch_cuda.arena import PinnedArena
from kvswitch_cuda.context import Context
from kvswitch_cuda.dispatch import Way
from kvswitch_cuda.driver import CudaUnavailable
from kvswitch_cuda.kernel import CopyKernel
from kvswitch_cuda.queue import CudaQueue
from kvswitch_cuda.table import CopyTable, Sample

__all__ = ["COUNTS", "SIZES", "calibrate", "gpu_of", "measure_quickly"]

_KIB: Final = 1 << 10
SIZES: Final = tuple(n * _KIB for n in (4, 8, 16, 24, 28, 32, 64, 128, 256, 1024, 4096))
COUNTS: Final = (1, 8, 64, 512)
_QUICK: Final = 64 << 20, 2  # bytes of memory on either side, repetitions
_THOROUGH: Final = 512 << 20, 7

_log = logging.getLogger("kvswitch")


def measure_quickly(context: Context) -> CopyTable:
    """The table that has been kept for this GPU; or one measured now, in a second or two.

    Raises
    ------
    TransferError, ConfigError
        There is no memory left for measuring.
    """
    kept = CopyTable.load(gpu_of(context), context.driver.version)
    if kept is not None:
        return kept
    table = _measure(context, *_QUICK, lambda sample: None)
    if any(sample.way == Way.KERNEL for sample in table.samples):
        table.save()  # else what was missing may be there next time
    return table


def calibrate(
    device: int = 0,
    *,
    thread_blocks: int = 8,
    on_sample: Callable[[Sample], object] = lambda sample: None,
) -> CopyTable:
    """Measure all ways of copying, thoroughly; the GPU and the link should have nothing else to do.

    Parameters
    ----------
    device : int
    thread_blocks : int
        Quota of the copy kernel (see `CudaBackend`).
    on_sample : callable
        Told of each measurement.

    Raises
    ------
    CudaUnavailable
        There is no such device.
    TransferError, ConfigError
        There is not enough memory on it or on the host.
    """
    context = Context(device)
    try:
        return _measure(context, *_THOROUGH, on_sample, thread_blocks)
    finally:
        context.close()


def gpu_of(context: Context) -> str:
    """Model and unique id of a GPU."""
    uuid = context.driver("cuDeviceGetUuid", context.driver("cuDeviceGet", context.device))
    return f"{context.name} {bytes(uuid.bytes).hex()}"


def _measure(
    context: Context,
    nbytes: int,
    repetitions: int,
    on_sample: Callable[[Sample], object],
    thread_blocks: int = 8,
) -> CopyTable:
    # In a thread that ends: a queue changes the context and the capture mode of who uses it.
    with ThreadPoolExecutor(1, "kvswitch-measure") as thread:
        samples = thread.submit(
            _samples, context, nbytes, repetitions, on_sample, thread_blocks
        ).result()
    return CopyTable(gpu_of(context), context.driver.version, samples)


def _samples(
    context: Context,
    nbytes: int,
    repetitions: int,
    on_sample: Callable[[Sample], object],
    thread_blocks: int,
) -> list[Sample]:
    samples: list[Sample] = []
    rng = np.random.default_rng(0)
    with _memory(context, nbytes) as (device, host):
        for way, kernel in _ways(context):
            for direction in Direction:
                queue = CudaQueue(
                    context,
                    way=way,
                    choices=None,
                    paced=False,
                    kernel=kernel,
                    thread_blocks=thread_blocks,
                )
                try:
                    for size in SIZES:
                        for count in COUNTS:
                            if size * count > nbytes:
                                continue
                            places = [
                                (base + rng.permutation(nbytes // size)[:count] * size)
                                for base in (device, host)
                            ]
                            src, dst = (p.astype(np.uint64) for p in places[:: 1 - 2 * direction])
                            lengths = np.full(count, size, np.uint64)
                            pieces = Copies(src, dst, lengths, np.array([0, count]), count)
                            seconds = min(_time(queue, pieces) for _ in range(1 + repetitions))
                            sample = Sample(int(direction), int(way), size, count, seconds)
                            samples.append(sample)
                            on_sample(sample)
                finally:
                    queue.close()
    return samples


def _time(queue: CudaQueue, pieces: Copies) -> float:
    """Seconds from an idle queue to the end of the copies, the call to the driver included."""
    begin = queue.record()
    begin.wait()
    begin = queue.record()
    queue.copy(pieces, 0, len(pieces.src))
    end = queue.record()
    end.wait()
    if end.error is not None:
        raise end.error
    return max(end.time - begin.time, 1e-7)


def _ways(context: Context) -> Iterator[tuple[Way, CopyKernel | None]]:
    """What this driver and GPU can do."""
    if context.driver.has_batch:
        yield Way.BATCH, None
    yield Way.LOOP, None
    try:
        kernel = CopyKernel(context)
    except CudaUnavailable as error:
        _log.warning("copies are measured without the kernel: %s", error)
        return
    try:
        yield Way.KERNEL, kernel
    finally:
        kernel.close()


@contextmanager
def _memory(context: Context, nbytes: int) -> Iterator[tuple[int, int]]:
    """Addresses of that much memory on the device, and pinned on the host."""
    with context:
        device = int(context.driver("cuMemAlloc", nbytes))
    try:
        host = PinnedArena(nbytes, context.device)
        try:
            yield device, host.address
        finally:
            host.close()
    finally:
        try:
            with context:
                context.driver("cuMemFree", device)
        except TransferError as error:
            if isinstance(error, DeadQueue):
                raise

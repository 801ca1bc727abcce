"""The CUDA backend: windows of copies on two streams a direction, and events between them."""

from __future__ import annotations

import logging
from typing import Final, Literal, TypeAlias

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Backend, DeadQueue, Event
from kvswitch_cuda.arena import PinnedArena
from kvswitch_cuda.context import Context, CudaEvent
from kvswitch_cuda.dispatch import Way, make_dispatch
from kvswitch_cuda.driver import CudaUnavailable, Driver, stream_handle
from kvswitch_cuda.kernel import CopyKernel
from kvswitch_cuda.measuring import measure_quickly
from kvswitch_cuda.queue import CudaQueue, own_event
from kvswitch_cuda.table import CopyTable

__all__ = ["CopiesName", "CudaBackend"]

CopiesName: TypeAlias = Literal["auto", "batch", "loop", "kernel"]
"""How copies are made: the fastest way by measurement, or one of them always."""

_WINDOW: Final = 4 << 20  # bytes, where nothing has been measured: about 80 us on PCIe 5.0 x16
_SPAN: Final = 512 << 20  # bytes of windows dispatched at once: some 10 ms, a few GIL switches

_log = logging.getLogger("kvswitch")


class CudaBackend(Backend):
    """Copies between one GPU and pinned host memory.

    Parameters
    ----------
    device : int
        Number of the GPU.
    copies : {"auto", "batch", "loop", "kernel"}
        "batch": one cuMemcpyBatchAsync a window (CUDA 12.8). "loop": one cuMemcpyAsync a piece.
        "kernel": the GPU's own threads, on `thread_blocks` of its multiprocessors. "auto": for each
        window what was fastest for its pieces when `kvswitch calibrate` measured it here; where it
        has not, a short measurement is made now and kept.
    pacing : {"device", "host"}
        Who lets the engine's own small copies in between windows: the device, by events, or the
        host, which dispatches a window when one has been copied.
    thread_blocks : int
        Quota of the kernel: multiprocessors that it takes from the model at most.
    coalesce : bool
        False: one copy for every block and region, the baseline of the paper.

    Raises
    ------
    CudaUnavailable
        There is no such device, or its driver does not know that way of copying.
    """

    has_streams = True

    def __init__(
        self,
        device: int = 0,
        *,
        copies: CopiesName = "auto",
        pacing: Literal["device", "host"] = "device",
        thread_blocks: int = 8,
        coalesce: bool = True,
    ) -> None:
        if thread_blocks < 1:
            raise ConfigError(f"thread_blocks must be at least 1, not {thread_blocks}")
        if pacing not in ("device", "host"):
            raise ConfigError(f"pacing is by 'device' or 'host', not {pacing!r}")
        driver = Driver.load()
        self.coalesce = coalesce
        self.window_bytes = _WINDOW
        self.span_bytes = _SPAN if pacing == "device" else 0
        self.context: Final = Context(device)
        self._paced: Final = pacing == "device"
        self._thread_blocks: Final = thread_blocks
        self._queues: Final[list[CudaQueue]] = []
        self._table: CopyTable | None = None
        self._kernel: CopyKernel | None = None
        try:
            make_dispatch(driver)
            if copies == "auto":
                self._choose()
            else:
                self._way: Way = self._forced(copies)
        except BaseException:
            self.context.close()
            raise

    def _forced(self, copies: str) -> Way:
        if copies not in ("batch", "loop", "kernel"):
            raise ConfigError(f"copies are 'auto', 'batch', 'loop' or 'kernel', not {copies!r}")
        if copies == "batch" and not self.context.driver.has_batch:
            raise CudaUnavailable(
                "batches of copies need a driver for CUDA 12.8: upgrade it, or set copies to 'loop'"
            )
        if copies == "kernel":
            self._kernel = CopyKernel(self.context)
        return Way[copies.upper()]

    def _choose(self) -> None:
        """Take the way of copying from measurements."""
        self._way = Way.BATCH if self.context.driver.has_batch else Way.LOOP
        try:
            self._table = measure_quickly(self.context)
        except DeadQueue:
            raise
        except (TransferError, ConfigError) as error:
            _log.warning(
                "copies between GPU and host could not be measured (%s): all go the way %r. "
                "Run `kvswitch calibrate` when the GPU is free",
                error,
                self._way.name.lower(),
            )
            return
        self.window_bytes = self._table.window_bytes
        if any((self._table.choices(d).best == Way.KERNEL).any() for d in Direction):
            try:
                self._kernel = CopyKernel(self.context)
            except CudaUnavailable as error:
                _log.warning("small pieces are copied without the kernel: %s", error)
                usable = [s for s in self._table.samples if s.way != Way.KERNEL]
                self._table = CopyTable(self._table.gpu, self._table.driver, usable)

    def open_queue(self, direction: Direction) -> CudaQueue:
        """See `Backend.open_queue`."""
        choices = None if self._table is None else self._table.choices(direction)
        queue = CudaQueue(
            self.context,
            way=self._way,
            choices=choices,
            paced=self._paced,
            kernel=self._kernel,
            thread_blocks=self._thread_blocks,
        )
        self._queues.append(queue)
        return queue

    def event(self) -> Event:
        """See `Backend.event`."""
        return CudaEvent(self.context)

    def fence(self, stream: object | None) -> Event:
        """See `Backend.fence`. `stream`: see `kvswitch_cuda.driver.stream_handle`."""
        handle = stream_handle(stream, self.context.device)
        event = CudaEvent(self.context)
        with self.context:
            code = self.context.driver.record(event.handle, handle)
        if code:
            raise self.context.driver.error("marking what compute has been given", code)
        event.recorded()
        return event

    def hold(self, stream: object | None, event: Event) -> None:
        """See `Backend.hold`."""
        handle = stream_handle(stream, self.context.device)
        with self.context:
            code = self.context.driver.wait(handle, own_event(event).handle, 0)
        if code:
            raise self.context.driver.error("letting compute wait for a copy", code)

    def host_arena(self, nbytes: int) -> PinnedArena:
        """See `Backend.host_arena`."""
        return PinnedArena(nbytes, self.context.device)

    def close(self) -> None:
        """See `Backend.close`."""
        for queue in self._queues:
            queue.close()
        if self._kernel is not None:
            kernel, self._kernel = self._kernel, None
            kernel.close()
        self.context.close()

"""A device's primary context, which torch uses too, and the events recorded in it."""

from __future__ import annotations

import ctypes
import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Final

from kvswitch.errors import TransferError
from kvswitch.transfer import DeadQueue
from kvswitch_cuda.driver import NOT_READY, CudaUnavailable, Driver

__all__ = ["Clock", "Context", "CudaEvent"]


class Context:
    """The primary context of one device; several devices in a process have one each.

    As a context manager it is the calling thread's current one, and what was so before is again
    afterwards: the engine's own thread is left as it was.

    Parameters
    ----------
    device : int
        Number of the GPU.

    Raises
    ------
    CudaUnavailable
        There is no such device.
    """

    def __init__(self, device: int) -> None:
        self.driver: Final = Driver.load()
        self.device: Final = device
        count = self.driver("cuDeviceGetCount")
        if not 0 <= device < count:
            raise CudaUnavailable(f"there is no CUDA device {device}: this process sees {count}")
        self._handle: Final = self.driver("cuDeviceGet", device)
        self._context: Final = self.driver("cuDevicePrimaryCtxRetain", self._handle)
        self._idle: list[int] | None = []  # events to be used again; None: closed
        self._adopted: Final = threading.local()

    def __enter__(self) -> Context:
        if not hasattr(self._adopted, "yes"):
            self.driver("cuCtxPushCurrent", self._context)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not hasattr(self._adopted, "yes"):
            self.driver("cuCtxPopCurrent")

    def adopt_thread(self) -> None:
        """Make it the current one of this thread for good, and let graph captures elsewhere be.

        For threads of our own. Each call saved there is a chance less to wait for the GIL.

        While some thread captures a CUDA graph in PyTorch's default mode, querying an event in any
        other thread would be an error and spoil the capture, unless that thread is *relaxed*.
        """
        self.driver("cuCtxSetCurrent", self._context)
        relaxed = self.driver.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        self.driver("cuThreadExchangeStreamCaptureMode", relaxed)
        self._adopted.yes = True

    def attribute(self, name: str) -> int:
        """A device attribute, by the end of its name."""
        attribute = getattr(self.driver.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.driver("cuDeviceGetAttribute", attribute, self._handle))

    @property
    def name(self) -> str:
        """The GPU's model."""
        name: bytes = self.driver("cuDeviceGetName", 256, self._handle)
        return name.split(b"\0")[0].decode()

    @property
    def arch(self) -> str:
        """E.g. sm_90."""
        return (
            f"sm_{self.attribute('COMPUTE_CAPABILITY_MAJOR')}"
            f"{self.attribute('COMPUTE_CAPABILITY_MINOR')}"
        )

    def open_stream(self) -> int:
        """A stream that waits for no other by itself, of the lowest priority."""
        flags = self.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        with self:
            lowest, _ = self.driver("cuCtxGetStreamPriorityRange")
            return int(self.driver("cuStreamCreateWithPriority", flags, lowest))

    def close_stream(self, handle: int) -> None:
        """Let a stream finish, and free it. A lost context has nothing to free."""
        with suppress(TransferError), self:
            stream = self.driver.api.CUstream(handle)
            try:
                self.driver("cuStreamSynchronize", stream)
            finally:
                self.driver("cuStreamDestroy", stream)

    def open_mark(self) -> int:
        """An event that only streams wait for: neither timed nor looked at, which costs less."""
        with self:
            flags = self.driver.api.CUevent_flags.CU_EVENT_DISABLE_TIMING
            return int(self.driver("cuEventCreate", flags))

    def close_mark(self, handle: int) -> None:
        """Free what `open_mark` has made."""
        self._destroy(handle)

    def take_event(self) -> int:
        """An event that is timed, and that a thread can wait for without spinning."""
        if self._idle:
            with suppress(IndexError):
                return self._idle.pop()
        flags = self.driver.api.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        with self:
            return int(self.driver("cuEventCreate", flags))

    def return_event(self, handle: int) -> None:
        """Give an event back. What waits for it goes on waiting for what it was then."""
        if self._idle is not None:
            self._idle.append(handle)
        else:
            self._destroy(handle)

    def close(self) -> None:
        """Free events and give the context back; the last user's call ends it."""
        if self._idle is not None:
            idle, self._idle = self._idle, None
            for handle in idle:
                self._destroy(handle)
            with suppress(TransferError):
                self.driver("cuDevicePrimaryCtxRelease", self._handle)

    def _destroy(self, handle: int) -> None:
        with suppress(TransferError), self:
            self.driver("cuEventDestroy", self.driver.api.CUevent(handle))


class Clock:
    """Translates a queue's points into `time.perf_counter` seconds.

    The device's clock is read as the time from one reference event, in float32 milliseconds: exact
    to microseconds for a minute or so, so that the reference is renewed when the queue is idle.
    """

    _RENEW: Final = 10.0  # seconds

    def __init__(self, context: Context, stream: int) -> None:
        self._context: Final = context
        driver = context.driver
        self.reference: Final = context.take_event()
        for _ in range(3):  # whoever was interrupted meanwhile tries again
            begin = time.perf_counter()
            code = driver.record(self.reference, stream) or driver.synchronize(self.reference)
            if code:
                raise driver.error("reading the device's clock", code)
            end = time.perf_counter()
            self.time = (begin + end) / 2
            if end - begin < 1e-4:
                break

    @property
    def old(self) -> bool:
        """Whether it should be renewed."""
        return time.perf_counter() - self.time > self._RENEW

    def __del__(self) -> None:
        if hasattr(self, "reference"):
            self._context.return_event(self.reference)


class CudaEvent:
    """See `kvswitch.transfer.Event`."""

    def __init__(self, context: Context) -> None:
        self._context: Final = context
        self.handle: Final = context.take_event()
        self._clock: Clock | None = None
        self._reached = True
        self._time = 0.0
        self._error: TransferError | None = None

    def recorded(self, clock: Clock | None = None) -> None:
        """Note that it has been recorded anew; on a queue, with the queue's clock."""
        self._clock = clock
        self._reached = False
        self._time, self._error = 0.0, None

    @property
    def error(self) -> Exception | None:
        """See `Event.error`."""
        return self._error if self.done() else None

    @property
    def time(self) -> float:
        """See `Event.time`."""
        if self.done() and not self._time and self._clock is not None and self._error is None:
            passed = ctypes.c_float()
            with self._context:
                code = self._context.driver.elapsed(
                    ctypes.addressof(passed), self._clock.reference, self.handle
                )
            self._time = self._clock.time + passed.value * 1e-3 if code == 0 else 0.0
        return self._time

    def done(self) -> bool:
        """See `Event.done`."""
        return self._reached or self._look(self._context.driver.query)

    def wait(self, timeout: float | None = None) -> bool:
        """See `Event.wait`."""
        if self._reached:
            return True
        if timeout is None:
            return self._look(self._context.driver.synchronize)
        end = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() >= end:
                return False
            time.sleep(1e-4)
        return True

    def _look(self, how: Any) -> bool:
        try:
            with self._context:
                code = how(self.handle)
        except DeadQueue as error:
            self._error, self._reached = error, True
            return True
        if code == NOT_READY:
            return False
        if code:
            # Whether the queue will ever come here cannot be told any more.
            failure = self._context.driver.error("waiting for copies", code)
            self._error = failure if isinstance(failure, DeadQueue) else DeadQueue(str(failure))
        self._reached = True
        return True

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._context.return_event(self.handle)

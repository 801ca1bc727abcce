"""One direction's queue: windows on one or two streams, and points in them."""

from __future__ import annotations

import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from kvswitch.errors import TransferError
from kvswitch.transfer import Copies, DeadQueue, Event
from kvswitch_cuda.context import Clock, Context, CudaEvent
from kvswitch_cuda.dispatch import Slot, Way, attributes_of_stream_order, make_dispatch
from kvswitch_cuda.kernel import CopyKernel
from kvswitch_cuda.table import Choices

__all__ = ["CudaQueue", "own_event"]


class CudaQueue:
    """See `kvswitch.transfer.Queue`.

    Parameters
    ----------
    context : Context
    way : Way
        How windows are copied, unless there are `choices`.
    choices : Choices, optional
    paced : bool
        Whether windows alternate between two streams.
    kernel : CopyKernel, optional
        For windows copied by it.
    thread_blocks : int
        Its quota.
    """

    def __init__(
        self,
        context: Context,
        *,
        way: Way,
        choices: Choices | None,
        paced: bool,
        kernel: CopyKernel | None,
        thread_blocks: int,
    ) -> None:
        self._context: Final = context
        self._driver: Final = context.driver
        self._dispatch: Final = make_dispatch(context.driver)
        self._way: Final = way
        self._choices: Final = choices
        self._streams: Final[list[int]] = []
        self._paces: Final[list[int]] = []
        try:
            for _ in range(1 + paced):
                self._streams.append(context.open_stream())
                self._paces.append(context.open_mark())
        except BaseException:
            self._release()
            raise
        self._thread = 0
        self._closed = False
        self._clock: Clock | None = None
        self._last: CudaEvent | None = None
        self._waits = False  # something that was not recorded by this queue is waited for
        # What the driver reads by address.
        self._attributes: Final = attributes_of_stream_order()
        self._indices: Final = np.zeros(2, np.int64)
        self._parameters: Final = (
            np.zeros(1, np.int64) if kernel is None else kernel.new_parameters()
        )
        self._arguments: Final = np.array([self._parameters.ctypes.data], np.int64)
        words = np.zeros(len(Slot) + 2, np.int64)
        words[Slot.PACED] = paced
        words[Slot.STREAM : Slot.STREAM + 1 + paced] = self._streams
        words[Slot.PACE : Slot.PACE + 1 + paced] = self._paces
        words[Slot.ATTRIBUTES] = self._attributes.ctypes.data
        words[Slot.FIRST], words[Slot.FAILED] = self._indices.ctypes.data + np.arange(2) * 8
        words[Slot.FUNCTION] = 0 if kernel is None else kernel.function
        words[Slot.GRID], words[Slot.BLOCK] = thread_blocks, 512
        words[Slot.ARGUMENTS] = self._arguments.ctypes.data
        self._words: Final = words

    @property
    def _tail(self) -> int:
        """The stream that holds what was given last; all before comes before it."""
        return self._streams[int(self._words[Slot.TAIL])]

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        """See `Queue.copy`."""
        self._enter()
        windows = copies.windows
        inside = windows[(windows > start) & (windows < stop)]
        edges = np.concatenate([[start], inside, [stop]], dtype=np.int64)
        ways: npt.NDArray[np.int64]
        if self._choices is None:
            ways = np.full(len(edges) - 1, self._way, np.int64)
        else:
            ways = self._choices.ways(copies.nbytes, edges)
        code = self._dispatch(
            self._words,
            self._parameters,
            copies.dst.view(np.int64),
            copies.src.view(np.int64),
            copies.nbytes.view(np.int64),
            edges,
            ways,
        )
        if code:
            raise self._driver.error(f"dispatching {stop - start} copies", code)

    def record(self, event: Event | None = None) -> Event:
        """See `Queue.record`."""
        self._enter()
        marked = CudaEvent(self._context) if event is None else own_event(event)
        clock = self._tick()
        self._check(self._driver.record(marked.handle, self._tail), "recording an event")
        marked.recorded(clock)
        self._last, self._waits = marked, False
        return marked

    def wait(self, event: Event) -> None:
        """See `Queue.wait`."""
        self._enter()
        self._tick()
        code = self._driver.wait(self._tail, own_event(event).handle, 0)
        self._check(code, "waiting for an event")
        self._waits = True

    def close(self) -> None:
        """Finish what was given, and free the streams. May be called again."""
        if not self._closed:
            self._closed = True
            self._release()
            self._clock = self._last = None

    def _tick(self) -> Clock:
        """Return a clock that is exact; an old one is renewed if that waits for nobody."""
        if self._clock is None or (
            self._clock.old and not self._waits and (self._last is None or self._last.done())
        ):
            self._clock = Clock(self._context, self._tail)
        return self._clock

    def _release(self) -> None:
        for stream in self._streams:
            self._context.close_stream(stream)
        for pace in self._paces:
            self._context.close_mark(pace)

    def _enter(self) -> None:
        """Prepare the calling thread, once."""
        if self._closed:
            raise DeadQueue("the backend has been closed")
        if self._thread != (thread := threading.get_ident()):
            self._context.adopt_thread()
            self._thread = thread

    def _check(self, code: int, what: str) -> None:
        if code:
            raise self._driver.error(what, code)


def own_event(event: Event) -> CudaEvent:
    """The event, if it is one of this backend's; TransferError if not."""
    if not isinstance(event, CudaEvent):
        raise TransferError(
            f"{event!r} is no event of the CUDA backend: use its event() or fence()"
        )
    return event

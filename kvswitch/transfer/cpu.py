"""The CPU backend: one thread per queue, which copies without the GIL.

It behaves like a copy engine, so that code with a wrong order of things fails here, too: copies
take effect late, in order per queue and in no order between queues, and what waits for an event
waits only if it has been recorded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Final, NamedTuple

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Direction
from kvswitch.transfer.backend import Backend, DeadQueue, Event
from kvswitch.transfer.pieces import Pieces
from kvswitch.transfer.plan import Copies

__all__ = ["CpuBackend"]

_BACK_OFF: Final = 0.1  # seconds without copies one by one after the GIL was slow to come


class _Point:
    """One recording of an event."""

    __slots__ = ("error", "reached", "time")

    def __init__(self) -> None:
        self.reached: Final = threading.Event()
        self.error: Exception | None = None
        self.time = 0.0

    def reach(self, error: Exception | None) -> None:
        self.error = error
        self.time = time.perf_counter()
        self.reached.set()


class _CpuEvent:
    """See `Event`."""

    def __init__(self) -> None:
        self.point: _Point | None = None

    @property
    def error(self) -> Exception | None:
        return self.point.error if self.point else None

    @property
    def time(self) -> float:
        return self.point.time if self.point else 0.0

    def done(self) -> bool:
        return self.point is None or self.point.reached.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self.point is None or self.point.reached.wait(timeout)


def _sleep_until(moment: float) -> None:
    if (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


def _own(event: Event) -> _CpuEvent:
    if not isinstance(event, _CpuEvent):
        raise TransferError(f"{event!r} is no event of the CPU backend: use its event() or fence()")
    return event


class _Window(NamedTuple):
    pieces: Pieces
    first: bool  # of its transfer


class _CpuQueue:
    """See `Queue`. Its thread ends when closed, or by anything that is not an `Exception`."""

    def __init__(self, name: str, bandwidth: float | None) -> None:
        self._bandwidth: Final = bandwidth
        self._clock = 0.0  # when the link has moved all it was given, at `bandwidth`
        self._speed = 0.0  # bytes per second of the last window's own copying
        self._gil_busy_until = 0.0
        self._work: Final[deque[_Window | _Point | threading.Event | None]] = deque()
        self._changed: Final = threading.Condition()
        self._dead: DeadQueue | None = None
        self._thread: Final = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        self._give(_Window(Pieces(copies, start, stop), start == 0))

    def record(self, event: Event | None = None) -> Event:
        marked = _CpuEvent() if event is None else _own(event)
        point = _Point()
        self._give(point)
        marked.point = point
        return marked

    def wait(self, event: Event) -> None:
        point = _own(event).point
        if point is not None:
            self._give(point.reached)

    def close(self) -> None:
        with self._changed:
            if self._dead is None:
                self._dead = DeadQueue("the backend has been closed")
                self._work.append(None)
                self._changed.notify()
        self._thread.join()

    def _give(self, work: _Window | _Point | threading.Event) -> None:
        with self._changed:
            if self._dead is not None:
                raise self._dead
            self._work.append(work)
            self._changed.notify()

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            dead = DeadQueue(f"the copy thread {self._thread.name} died: {error!r}")
            dead.__cause__ = error
            with self._changed:
                self._dead = dead
            for work in self._work:  # nothing is added any more
                if isinstance(work, _Point):
                    work.reach(dead)

    def _serve(self) -> None:
        failure: Exception | None = None
        while True:
            with self._changed:
                while not self._work:
                    self._changed.wait()
                work = self._work[0]  # stays until done, to be found if the thread dies
            match work:
                case None:
                    return
                case _Point():
                    work.reach(failure)
                    failure = None
                case threading.Event():
                    work.wait()
                case _Window():
                    try:
                        self._copy(work)
                    except Exception as error:
                        failure = failure or error
            self._work.popleft()

    def _copy(self, window: _Window) -> None:
        if self._bandwidth is None:
            self._move(window.pieces)
            return
        # A transfer's first window starts the clock; later ones go on from where it stands, so
        # that a sleep that takes too long is made up for.
        if window.first:
            self._clock = time.perf_counter()
        self._clock += window.pieces.nbytes / self._bandwidth
        # Bytes land at the end of their time, not before: who reads too early finds the old ones.
        # The copying itself is a part of that time, as long as it took when last measured.
        copying = window.pieces.nbytes / self._speed if self._speed else 0.0
        _sleep_until(self._clock - copying)
        begun = time.perf_counter()
        self._move(window.pieces)
        self._speed = window.pieces.nbytes / max(time.perf_counter() - begun, 1e-9)
        _sleep_until(self._clock)

    def _move(self, pieces: Pieces) -> None:
        if not pieces.move(one_by_one=time.perf_counter() > self._gil_busy_until):
            self._gil_busy_until = time.perf_counter() + _BACK_OFF


class CpuBackend(Backend):
    """Copies between two places in host memory, in the place of a GPU.

    One window takes the GIL once; windows of large pieces (256 KiB and more) once for each piece,
    as long as no other thread makes that slow.

    Parameters
    ----------
    bandwidth : float or None
        Bytes per second in each direction, at most; None for as fast as the machine can.

    Raises
    ------
    ConfigError
        If `bandwidth` is not positive.
    """

    def __init__(self, *, bandwidth: float | None = None) -> None:
        if bandwidth is not None and not bandwidth > 0:
            raise ConfigError(f"bandwidth must be positive bytes/s or None, not {bandwidth}")
        self._bandwidth: Final = bandwidth
        self._queues: Final[list[_CpuQueue]] = []

    def open_queue(self, direction: Direction) -> _CpuQueue:
        """See `Backend.open_queue`."""
        queue = _CpuQueue(f"kvswitch-copy-{direction.name.lower()}", self._bandwidth)
        self._queues.append(queue)
        return queue

    def event(self) -> Event:
        """See `Backend.event`."""
        return _CpuEvent()

    def fence(self, stream: object | None) -> Event | None:
        """Return None: compute on the CPU is over when the call returns."""
        return None

    def close(self) -> None:
        """See `Backend.close`."""
        for queue in self._queues:
            queue.close()

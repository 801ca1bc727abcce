"""The transfer engine: carries out planned transfers, off the caller's thread, in bounded windows.

One lane per direction: a dispatcher thread and the backend's queue. Transfers of one direction run,
and end, in the order of submission. Between directions, order matters only where both touch a
block: a transfer is not dispatched before every older one of the other direction that shares a
device block or a host block with it has ended. What one direction reads the other writes, on both
sides, so sharing a block is always a conflict; within a direction the queue's order is enough.

These waits happen on the host, before dispatch, and never as a wait of one queue for another's
event: with asynchronous dispatch that event might not have been recorded yet, and a wait on such an
event does not wait.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Final

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError, IntegrityError, TransferError
from kvswitch.messages import BlockIds, Direction, Runs, Transfer
from kvswitch.transfer.backend import Backend, DeadQueue, Event, Queue
from kvswitch.transfer.layout import Layout
from kvswitch.transfer.plan import check_runs, lower

__all__ = ["Ticket", "TransferEngine"]

_WINDOWS_IN_FLIGHT: Final = 2  # one being copied, one behind it so that the queue never runs dry


class Ticket:
    """What has become of a transfer.

    Attributes
    ----------
    id : int
    direction : Direction
    num_blocks, nbytes : int
        What the transfer moves.
    num_runs : int
        Block-level copies: ``num_blocks / num_runs`` is the granularity, in blocks per copy. Equal
        to `num_blocks` on a backend that does not coalesce.
    num_copies : int
        Contiguous byte ranges these make over all regions, before cutting into windows; 0 until
        dispatch has begun.
    started, ended : float
        When its queue came to the first window and finished the last one dispatched, in
        `time.perf_counter` seconds; 0 if nothing was dispatched.
    """

    def __init__(self, transfer: Transfer, runs: int, nbytes: int, ended: threading.Condition):
        self.id: Final = transfer.id
        self.direction: Final = transfer.direction
        self.num_blocks: Final = transfer.num_blocks
        self.num_runs: Final = runs
        self.nbytes: Final = nbytes
        self.num_copies = 0
        self.started = 0.0
        self.ended = 0.0
        self._ended: Final = ended
        self._done = False
        self._error: TransferError | None = None

    @property
    def seconds(self) -> float:
        """Time its queue was busy with it."""
        return self.ended - self.started

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not: nothing of it touches memory any more."""
        return self._done

    @property
    def error(self) -> TransferError | None:
        """Why it failed; None while under way and if all bytes have arrived."""
        return self._error if self._done else None

    def wait(self, timeout: float | None = None) -> None:
        """Block until it has ended.

        Raises
        ------
        TransferError
            If it failed or was cancelled.
        TimeoutError
            If it has not ended after `timeout` seconds.
        """
        with self._ended:
            if not self._ended.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"transfer {self.id} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error

    def __repr__(self) -> str:
        state = "under way" if not self._done else f"failed: {self._error}" if self._error else "ok"
        return f"<Ticket {self.id} {self.direction.name} {self.num_blocks} blocks, {state}>"


class _Job:
    """A transfer under way, as its dispatcher sees it."""

    __slots__ = (
        "after_other", "begin", "cancelled", "complete", "end", "failure", "fence", "mark", "runs",
        "ticket",
    )  # fmt: skip

    def __init__(self, ticket: Ticket, runs: Runs, fence: Event | None, after_other: int) -> None:
        self.ticket: Final = ticket
        self.mark: Final = ticket.id + 1
        self.runs: Final = runs
        self.fence: Final = fence
        self.after_other: Final = after_other  # mark the other lane must have come to
        self.cancelled = False
        self.complete = False  # every window has been dispatched
        self.failure: BaseException | None = None
        self.begin: Event | None = None
        self.end: Event | None = None


class _Lane:
    """One direction: its queue, its jobs, and which blocks they touch."""

    def __init__(
        self, direction: Direction, queue: Queue, src: Layout, dst: Layout, lock: threading.Lock
    ) -> None:
        self.direction: Final = direction
        self.queue: Final = queue
        self.src: Final = src
        self.dst: Final = dst
        # Mark (id + 1) of the newest job touching each source and destination block. Jobs end in
        # order, so a mark above `done` is under way, and marks of ended jobs need no clearing.
        self.newest: Final = (
            np.zeros(src.num_blocks, np.int64),
            np.zeros(dst.num_blocks, np.int64),
        )
        self.last = 0
        self.done = 0
        self.wake: Final = threading.Condition(lock)
        self.under_way: Final[deque[_Job]] = deque()  # all that have not ended
        self.waiting: Final[deque[_Job]] = deque()  # those of them not yet begun
        # Dispatcher's own: windows given to the queue, and None behind the last one of a job.
        self.flying: Final[deque[tuple[_Job, Event | None]]] = deque()
        self.windows = 0


class TransferEngine:
    """Moves blocks between device and host in the background.

    Parameters
    ----------
    backend : Backend
        The engine takes it over, and closes it when it is closed itself.
    device, host : Layout
        Their memory must stay where it is until the engine is closed.
    window_bytes : int
        Most bytes in one window. Two windows are in flight per direction, so a small copy of the
        inference engine waits for twice this at most.

    Raises
    ------
    ConfigError
        If the layouts do not mirror each other, or `window_bytes` < 1.
    """

    def __init__(
        self, backend: Backend, device: Layout, host: Layout, *, window_bytes: int = 8 << 20
    ) -> None:
        if not device.mirrors(host):
            raise ConfigError(
                "device and host layout must have the same bytes per block in the same regions: "
                "take the host's from HostArena.layout(device)"
            )
        if window_bytes < 1:
            raise ConfigError(f"window_bytes must be at least 1, not {window_bytes}")
        self._backend: Final = backend
        self._window_bytes: Final = window_bytes
        self._lock: Final = threading.Lock()
        self._ended: Final = threading.Condition(self._lock)
        self._tickets: Final[dict[int, Ticket]] = {}  # under way
        self._polled: Final[deque[Ticket]] = deque()  # ended, not yet returned by poll()
        self._last = -1
        self._closed = False
        self._dead: BaseException | None = None
        self._lanes: Final = tuple(
            _Lane(direction, backend.open_queue(direction), *sides, self._lock)
            for direction, sides in zip(Direction, ((device, host), (host, device)), strict=True)
        )
        self._threads: Final = [
            threading.Thread(
                target=self._run,
                args=(lane,),
                name=f"kvswitch-dispatch-{lane.direction.name.lower()}",
                daemon=True,
            )
            for lane in self._lanes
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # no copy may run while the interpreter frees its memory

    def submit(self, transfer: Transfer, *, fence: Event | None = None) -> Ticket:
        """Take on a transfer, and return at once.

        It is dispatched when the transfers in `after` have ended (well or not), and all older ones
        of the other direction that touch any of its blocks.

        Parameters
        ----------
        transfer : Transfer
            Ids must increase from call to call. Its runs must not change any more.
        fence : Event or None
            From `Backend.fence`: work its first window must wait for.

        Raises
        ------
        TransferError
            If the id does not increase, `after` names no lower id, a block does not exist, the
            engine is closed, or a thread of it has died. Nothing has changed then.
        """
        lane = self._lanes[transfer.direction]
        other = self._lanes[1 - transfer.direction]
        runs = transfer.runs
        check_runs(runs, lane.src, lane.dst)
        with self._lock:
            self._check_open()
            if transfer.id <= self._last:
                raise TransferError(
                    f"transfer ids must increase: {transfer.id} comes after {self._last}"
                )
            if any(earlier >= transfer.id for earlier in transfer.after):
                raise TransferError(
                    f"transfer {transfer.id} may wait for lower ids only, not {transfer.after}"
                )
            mark = transfer.id + 1
            marks = [
                earlier + 1
                for earlier in transfer.after
                if earlier in self._tickets and self._tickets[earlier].direction is other.direction
            ]
            for side in (0, 1):
                blocks = _blocks(runs, side)
                if other.under_way:
                    # Our source is the other direction's destination.
                    marks.append(int(other.newest[1 - side][blocks].max(initial=0)))
                lane.newest[side][blocks] = mark
            num_runs = len(runs) if self._backend.coalesce else transfer.num_blocks
            nbytes = transfer.num_blocks * lane.src.block_bytes
            ticket = Ticket(transfer, num_runs, nbytes, self._ended)
            job = _Job(ticket, runs, fence, max(marks, default=0))
            self._last = transfer.id
            self._tickets[transfer.id] = ticket
            lane.under_way.append(job)
            lane.waiting.append(job)
            lane.wake.notify()
        return ticket

    def poll(self) -> list[Ticket]:
        """Tickets that have ended since the last call, failed and cancelled ones included."""
        if not self._polled:
            return []
        with self._lock:
            ended = list(self._polled)
            self._polled.clear()
        return ended

    def cancel(self, id: int) -> None:  # noqa: A002 - the field's word
        """Drop what has not been dispatched of a transfer; unknown and ended ids are ignored.

        It still ends in its turn, after what was dispatched of it and after all older ones of its
        direction: with TransferError, unless all of it had been dispatched already.
        """
        with self._lock:
            if id not in self._tickets:
                return
            lane = self._lanes[self._tickets[id].direction]
            for job in lane.under_way:
                if job.ticket.id == id:
                    job.cancelled = True
            lane.wake.notify()

    def conflicts(self, device_blocks: BlockIds) -> tuple[int, ...]:
        """Find what must have ended before these blocks are written or given away.

        Returns
        -------
        tuple of int
            The newest transfer under way in each direction that touches any of them. Transfers of
            a direction end in order, so older ones have ended when it has.

        Raises
        ------
        TransferError
            If a block does not exist.
        """
        if not self._tickets or not len(device_blocks):
            return ()
        device = self._lanes[Direction.OUT].src
        if device_blocks.min() < 0 or device_blocks.max() >= device.num_blocks:
            raise TransferError(f"device blocks are 0 to {device.num_blocks - 1}")
        with self._lock:
            newest = (
                (lane, int(lane.newest[side][device_blocks].max()))
                for lane, side in zip(self._lanes, (0, 1), strict=True)
            )
            return tuple(mark - 1 for lane, mark in newest if mark > lane.done)

    def wait(self, ids: Iterable[int], timeout: float | None = None) -> None:
        """Block until all these transfers have ended, well or not; unknown ids count as ended.

        Raises
        ------
        TimeoutError
            If some have not ended after `timeout` seconds.
        """
        with self._ended:
            left = {id for id in ids if id in self._tickets}  # noqa: A001
            if not self._ended.wait_for(lambda: left.isdisjoint(self._tickets), timeout):
                left &= self._tickets.keys()
                raise TimeoutError(f"transfers {sorted(left)} have not ended within {timeout} s")

    def drain(self, timeout: float | None = None) -> None:
        """`wait` for everything submitted so far."""
        with self._lock:
            ids = list(self._tickets)
        self.wait(ids, timeout)

    def close(self) -> None:
        """Cancel what has not been dispatched, wait for the rest, end all threads.

        Tickets can still be polled. May be called again; called at exit if forgotten.
        """
        with self._lock:
            self._closed = True
            for lane in self._lanes:
                for job in lane.under_way:
                    job.cancelled = True
                lane.wake.notify()
        for thread in self._threads:
            thread.join()
        self._backend.close()
        atexit.unregister(self.close)

    def __enter__(self) -> TransferEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself."""
        with self._lock:
            ids = {job.ticket.id for lane in self._lanes for job in lane.under_way}
            if ids != self._tickets.keys():
                raise IntegrityError(f"tickets {sorted(self._tickets)}, but jobs {sorted(ids)}")
            for lane in self._lanes:
                marks = [lane.done, *(job.mark for job in lane.under_way)]
                if sorted(set(marks)) != marks:
                    raise IntegrityError(f"{lane.direction.name}: jobs out of order: {marks}")
                waiting = list(lane.waiting)
                if waiting != list(lane.under_way)[len(marks) - 1 - len(waiting) :]:
                    raise IntegrityError(f"{lane.direction.name}: waiting jobs are not the last")
                if not 0 <= lane.windows <= _WINDOWS_IN_FLIGHT:
                    raise IntegrityError(f"{lane.direction.name}: {lane.windows} windows in flight")
                for newest in lane.newest:
                    if newest.max() > self._last + 1:
                        raise IntegrityError(f"{lane.direction.name}: a block of the future")

    def _check_open(self) -> None:
        if self._dead is not None:
            raise TransferError(_obituary(self._dead)) from self._dead
        if self._closed:
            raise TransferError("the transfer engine is closed")

    # What follows runs in the dispatcher threads.

    def _run(self, lane: _Lane) -> None:
        try:
            self._serve(lane)
        except BaseException as error:
            with self._lock:
                self._dead = self._dead or error
                for each in self._lanes:
                    each.wake.notify()
        # Nothing is left here unless the engine has died. Then what this queue still moves is
        # awaited, as far as it can be, before anybody is told that the blocks are at rest.
        for _, event in lane.flying:
            if event is not None:
                with suppress(BaseException):
                    event.wait()
        for job in list(lane.under_way):
            job.failure = job.failure or self._dead
            self._end(lane, job)

    def _serve(self, lane: _Lane) -> None:
        while True:
            with self._lock:
                while (job := self._next(lane)) is None and not lane.flying:
                    if self._dead is not None or (self._closed and not lane.waiting):
                        return
                    lane.wake.wait()
            if self._dead is not None:
                return
            if job is not None:
                self._dispatch(lane, job)
            else:
                self._reap(lane)

    def _next(self, lane: _Lane) -> _Job | None:
        """Take the oldest waiting job if it may begin."""
        if not lane.waiting:
            return None
        job = lane.waiting[0]
        if not job.cancelled and self._lanes[1 - lane.direction].done < job.after_other:
            return None
        return lane.waiting.popleft()

    def _dispatch(self, lane: _Lane, job: _Job) -> None:
        """Give a job's windows to the queue, as far as it is still wanted."""
        queue = lane.queue
        try:
            if not self._dropped(job):
                copies = lower(
                    job.runs,
                    lane.src,
                    lane.dst,
                    window_bytes=self._window_bytes,
                    coalesce=self._backend.coalesce,
                )
                job.ticket.num_copies = copies.num_copies
                edges = copies.windows.tolist()
                if job.fence is not None:
                    queue.wait(job.fence)
                job.begin = queue.record()
                for start, stop in zip(edges, edges[1:], strict=False):
                    while lane.windows >= _WINDOWS_IN_FLIGHT:
                        self._reap(lane)
                    if self._dropped(job):
                        break
                    try:
                        queue.copy(copies, start, stop)
                    finally:  # part of the window may be under way even if the call has failed
                        job.end = queue.record()
                        lane.flying.append((job, job.end))
                        lane.windows += 1
                else:
                    job.complete = True
        except DeadQueue:
            raise
        except Exception as error:
            job.failure = job.failure or error
        lane.flying.append((job, None))
        self._end_flown(lane)

    def _dropped(self, job: _Job) -> bool:
        return job.cancelled or job.failure is not None or self._dead is not None

    def _reap(self, lane: _Lane) -> None:
        """Wait for the oldest window in flight."""
        job, event = lane.flying[0]
        assert event is not None
        event.wait()
        lane.flying.popleft()
        lane.windows -= 1
        if isinstance(event.error, DeadQueue):
            raise event.error
        job.failure = job.failure or event.error
        self._end_flown(lane)

    def _end_flown(self, lane: _Lane) -> None:
        """End the jobs none of whose windows is in flight any more."""
        while lane.flying and lane.flying[0][1] is None:
            job, _ = lane.flying.popleft()
            self._end(lane, job)

    def _end(self, lane: _Lane, job: _Job) -> None:
        ticket = job.ticket
        if job.begin is not None and job.end is not None:
            ticket.started, ticket.ended = job.begin.time, job.end.time
        if job.failure is not None:
            what = _obituary(job.failure) if job.failure is self._dead else repr(job.failure)
            ticket._error = TransferError(f"transfer {ticket.id} failed: {what}")
            ticket._error.__cause__ = job.failure
        elif not job.complete:
            ticket._error = TransferError(f"transfer {ticket.id} was cancelled")
        with self._lock:
            lane.under_way.popleft()
            lane.done = job.mark
            ticket._done = True
            del self._tickets[ticket.id]
            self._polled.append(ticket)
            self._ended.notify_all()
            self._lanes[1 - lane.direction].wake.notify()


def _obituary(error: BaseException) -> str:
    return f"a thread of the transfer engine has died ({error!r}): close it and make a new one"


def _blocks(runs: Runs, side: int) -> slice | npt.NDArray[np.int64]:
    """Index of all source (side 0) or destination (side 1) blocks."""
    if len(runs) == 1:
        first = int(runs[0, side])
        return slice(first, first + int(runs[0, 2]))
    count = runs[:, 2]
    before = np.cumsum(count) - count
    blocks = np.arange(count.sum())
    blocks += np.repeat(runs[:, side] - before, count)
    return blocks

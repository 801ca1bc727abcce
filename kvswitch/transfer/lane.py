"""One direction of the transfer engine: its queue, and the thread that feeds it span by span.

    submit -> waiting -> place -> [may it begin?] -> lower ->  span, span, ...  -> end
              (FIFO)    (blocks)  `after`, conflicts       at most two in flight  (FIFO)

A span is one window; or many, for a queue that lets others in between windows by itself, but no
more copies than a driver takes without making whoever else calls it wait.

Jobs of a lane begin in order, run in order (the queue's) and end in order. So one number says which
have ended, and waiting for the newest of some jobs is waiting for all of them.

With nothing to dispatch, the dispatcher sleeps until the oldest span in flight has been copied. A
job submitted during the very last window is therefore dispatched after it. Spans of many windows
take too long for that: while such a one is in flight the dispatcher looks every now and then.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from kvswitch.errors import IntegrityError, TransferError
from kvswitch.messages import BlockIds, Direction, Runs
from kvswitch.transfer.backend import Backend, DeadQueue, Event
from kvswitch.transfer.layout import Layout
from kvswitch.transfer.plan import Copies, lower
from kvswitch.transfer.ticket import Ticket

__all__ = ["Job", "Lane", "Ledger"]

_LOOK: Final = 5e-4  # seconds between two looks at a long span
_BRIEF: Final = 4  # windows that have been copied before it is worth a look
_COPIES: Final = 8192  # of a span, if it has several windows
_SPANS_IN_FLIGHT: Final = 2  # one being copied, one behind it so that the queue never runs dry

BlockIndex = slice | npt.NDArray[np.intp] | BlockIds


class Ledger:
    """What both lanes and the engine share, guarded by `lock` but for what `placing` guards.

    What takes longer for more blocks is not done under `lock`, nor by who submits.
    """

    def __init__(self) -> None:
        self.lock: Final = threading.Lock()
        self.placing: Final = threading.Lock()  # guards the blocks of both lanes
        self.unplaced: Final[deque[tuple[Lane, Job]]] = deque()  # oldest first
        self.changed: Final = threading.Condition(
            self.lock
        )  # some transfer was dispatched or ended
        self.under_way: Final[dict[int, Ticket]] = {}
        self.ended: Final[deque[Ticket]] = deque()  # not yet polled
        self.closed = False
        self.dead: BaseException | None = None  # what a thread died of

    def place(self) -> None:
        """Note which blocks new jobs touch, and what these have to come after, oldest first."""
        if self.unplaced:
            with self.placing:
                while self.unplaced:
                    lane, job = self.unplaced[0]
                    lane.place(job)
                    self.unplaced.popleft()  # not before: who finds none relies on it

    def obituary(self) -> str:
        """What to tell those who still want something from a dead engine."""
        return (
            f"a thread of the transfer engine has died ({self.dead!r}); "
            "close the engine and make a new one"
        )


class Job:
    """A transfer under way.

    Attributes
    ----------
    mark : int
        Its id + 1, so that 0 is older than all.
    after_other : int
        The mark to which the other lane must have come before this job may begin; final when it
        has been `placed`.
    """

    __slots__ = (
        "after_other", "begin", "cancelled", "complete", "end", "failure", "fence", "mark",
        "placed", "runs", "ticket",
    )  # fmt: skip

    def __init__(self, ticket: Ticket, runs: Runs, fence: Event | None, after_other: int) -> None:
        self.ticket: Final = ticket
        self.mark: Final = ticket.id + 1
        self.runs: Final = runs
        self.fence: Final = fence
        self.after_other = after_other
        self.placed = False
        self.cancelled = False
        self.complete = False  # every window has been dispatched
        self.failure: BaseException | None = None
        self.begin: Event | None = None
        self.end: Event | None = None  # behind the newest span dispatched


class Lane:
    """Transfers from `src` to `dst`."""

    other: Lane

    def __init__(
        self,
        direction: Direction,
        backend: Backend,
        src: Layout,
        dst: Layout,
        *,
        window_bytes: int,
        ledger: Ledger,
    ) -> None:
        self.src: Final = src
        self.dst: Final = dst
        # Marks of the newest jobs touching each source and each destination block. Those up to
        # `done` have ended, and need no clearing. Numbers never written occupy no memory.
        self.newest: Final = (
            np.zeros(src.num_blocks, np.int64),
            np.zeros(dst.num_blocks, np.int64),
        )
        self.done = 0
        self.jobs: Final[deque[Job]] = deque()  # all that have not ended
        self._direction: Final = direction
        self._coalesce: Final = backend.coalesce
        self._queue: Final = backend.open_queue(direction)
        self._window_bytes: Final = window_bytes
        self._span: Final = max(1, backend.span_bytes // window_bytes)  # windows
        self._ledger: Final = ledger
        self._wake: Final = threading.Condition(ledger.lock)
        self._waiting: Final[deque[Job]] = deque()  # those of `jobs` that have not begun
        # Only the dispatcher uses these: spans in the queue and their bytes, and None behind a
        # job's last one.
        self._flying: Final[deque[tuple[Job, Event | None, int]]] = deque()
        self._spans = 0
        self._thread: Final = threading.Thread(
            target=self._run, name=f"kvswitch-dispatch-{direction.name.lower()}", daemon=True
        )

    def start(self, other: Lane) -> None:
        """Begin to work, beside the `other` lane."""
        self.other = other
        self._thread.start()

    def join(self) -> None:
        """Wait until the dispatcher has ended."""
        self._thread.join()

    # These are called with the ledger's `placing` held.

    def conflict(self, side: int, blocks: BlockIndex) -> int:
        """Mark of the newest job under way touching blocks of `side` (0: source), or 0."""
        newest = int(self.newest[side][blocks].max()) if self.jobs else 0
        return newest if newest > self.done else 0

    def place(self, job: Job) -> None:
        """Note the blocks of a job, and which jobs of the other lane touch them."""
        num_blocks = job.ticket.num_blocks
        for side, blocks in enumerate(_blocks(job.runs, num_blocks) if num_blocks else ()):
            # Our source is the other lane's destination.
            job.after_other = max(job.after_other, self.other.conflict(1 - side, blocks))
            self.newest[side][blocks] = job.mark
        job.placed = True

    # These are called with the ledger's `lock` held.

    def add(self, job: Job) -> None:
        """Take a job on."""
        self.jobs.append(job)
        self._waiting.append(job)
        self._ledger.unplaced.append((self, job))
        self._wake.notify()

    def cancel(self, mark: int | None = None) -> None:
        """Let the job with this mark, or every one, be dispatched no further."""
        for job in self.jobs:
            if mark is None or job.mark == mark:
                job.cancelled = True
        self._wake.notify()

    def find(self, mark: int) -> Job | None:
        """The job with this mark, unless it has ended."""
        return next((job for job in self.jobs if job.mark == mark), None)

    def check_integrity(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself."""
        marks = [self.done, *(job.mark for job in self.jobs)]
        if any(one >= next_ for one, next_ in pairwise(marks)):
            raise IntegrityError(f"{self._direction.name}: jobs out of order: {marks}")
        waiting = len(self._waiting)
        if waiting and list(self._waiting) != list(self.jobs)[-waiting:]:
            raise IntegrityError(f"{self._direction.name}: waiting jobs are not the last ones")
        if not 0 <= self._spans <= _SPANS_IN_FLIGHT:
            raise IntegrityError(f"{self._direction.name}: {self._spans} spans in flight")
        if max(int(newest.max()) for newest in self.newest) > marks[-1]:
            raise IntegrityError(f"{self._direction.name}: a block is touched by an unknown job")

    # The rest runs in the dispatcher.

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as error:
            with self._ledger.lock:
                self._ledger.dead = self._ledger.dead or error
                self._wake_both()
        # Something is left only if a thread has died. What the queue still moves is awaited, as far
        # as that is possible, before anybody is told that those blocks are at rest.
        for _, event, _ in self._flying:
            if event is not None:
                with suppress(BaseException):
                    event.wait()
        self._waiting.clear()
        for job in list(self.jobs):
            self._end(job, self._ledger.dead)

    def _serve(self) -> None:
        ledger = self._ledger
        while ledger.dead is None:
            ledger.place()
            with ledger.lock:
                job = None
                # In this order: what is placed meanwhile is no longer unplaced, but may begin.
                while not ledger.unplaced and (job := self._next()) is None and not self._flying:
                    if ledger.dead is not None or (ledger.closed and not self._waiting):
                        return
                    self._wake.wait()
            if job is not None:
                self._dispatch(job)
            elif self._flying and not ledger.unplaced and self._landed():
                self._reap()

    def _landed(self) -> bool:
        """Whether the oldest span has been, or is to be, waited for; not while a job may begin."""
        job, event, nbytes = self._flying[0]
        assert event is not None
        assert job.begin is not None
        if self._span == 1:
            return True
        brief = nbytes <= _BRIEF * self._window_bytes
        while not event.done():
            if brief and job.begin.done():
                return True
            with self._ledger.lock:
                if self._ledger.unplaced or self._may_begin() or self._ledger.dead is not None:
                    return False
                self._wake.wait(_LOOK)
        return True

    def _may_begin(self) -> bool:
        """Whether the oldest waiting job may begin."""
        if not self._waiting:
            return False
        job = self._waiting[0]
        return job.cancelled or (job.placed and self.other.done >= job.after_other)

    def _next(self) -> Job | None:
        """Take the oldest waiting job if it may begin."""
        return self._waiting.popleft() if self._may_begin() else None

    def _dispatch(self, job: Job) -> None:
        if not self._dropped(job):
            try:
                copies = self._prepare(job)
            except DeadQueue:
                raise
            except Exception as error:
                job.failure = error
            else:
                self._send(job, copies)
        self._flying.append((job, None, 0))
        self._end_flown()

    def _prepare(self, job: Job) -> Copies:
        copies = lower(
            job.runs,
            self.src,
            self.dst,
            window_bytes=self._window_bytes,
            coalesce=self._coalesce,
        )
        job.ticket.num_copies = copies.num_copies
        if job.fence is not None:
            self._queue.wait(job.fence)
        job.begin = self._queue.record()
        return copies

    def _send(self, job: Job, copies: Copies) -> None:
        """Give the windows to the queue, as long as they are wanted."""
        for start, stop in pairwise(_spans(copies.windows, self._span)):
            while self._spans >= _SPANS_IN_FLIGHT:
                self._reap()
            if self._dropped(job):
                return
            try:
                self._queue.copy(copies, start, stop)
            except DeadQueue:
                raise
            except Exception as error:
                job.failure = error
            # Also if it failed: a part of the span may be under way.
            job.end = self._queue.record()
            nbytes = int(copies.nbytes[start:stop].sum())
            self._flying.append((job, job.end, nbytes))
            self._spans += 1
        if job.failure is None:
            with self._ledger.lock:
                job.complete = True
                self._ledger.changed.notify_all()

    def _dropped(self, job: Job) -> bool:
        return job.cancelled or job.failure is not None or self._ledger.dead is not None

    def _reap(self) -> None:
        """Wait for the oldest span in flight."""
        job, event, nbytes = self._flying[0]
        assert event is not None
        assert job.begin is not None
        event.wait()
        self._flying.popleft()
        self._spans -= 1
        if isinstance(event.error, DeadQueue):
            raise event.error
        job.failure = job.failure or event.error
        job.ticket.started, job.ticket.ended = job.begin.time, event.time
        if job.failure is None:
            with self._ledger.lock:
                job.ticket.arrived += nbytes
                self._ledger.changed.notify_all()
        self._end_flown()

    def _end_flown(self) -> None:
        """End the jobs of which nothing is in flight any more."""
        while self._flying and self._flying[0][1] is None:
            job, _, _ = self._flying.popleft()
            self._end(job, job.failure)

    def _end(self, job: Job, failure: BaseException | None) -> None:
        ticket, ledger = job.ticket, self._ledger
        error = None
        if failure is None and not job.complete:
            failure = ledger.dead
        if failure is not None:
            what = ledger.obituary() if failure is ledger.dead else f"{failure!r}"
            error = TransferError(f"transfer {ticket.id} failed: {what}")
            error.__cause__ = failure
        elif not job.complete:
            error = TransferError(f"transfer {ticket.id} was cancelled")
        with ledger.lock:
            self.jobs.popleft()
            self.done = job.mark
            del ledger.under_way[ticket.id]
            ledger.ended.append(ticket)
            ticket.end(error)
            self._wake_both()

    def _wake_both(self) -> None:
        for lane in (self, self.other):
            lane._wake.notify()


def _spans(windows: npt.NDArray[np.int64], most: int) -> list[int]:
    """Edges of spans of up to `most` windows."""
    edges = [0]
    window, last = 0, len(windows) - 1
    while window < last:
        few = int(np.searchsorted(windows, edges[-1] + _COPIES, "right")) - 1
        window = min(max(few, window + 1), window + most, last)
        edges.append(int(windows[window]))
    return edges


def _blocks(runs: Runs, num_blocks: int) -> tuple[BlockIndex, BlockIndex]:
    """Index of all source blocks, and of all destination blocks."""
    src, dst, count = runs.T
    if len(runs) == 1:
        one, other = int(src[0]), int(dst[0])
        return slice(one, one + num_blocks), slice(other, other + num_blocks)
    if len(runs) == num_blocks:
        return src.astype(np.intp), dst.astype(np.intp)
    position = np.arange(num_blocks)
    before = np.cumsum(count) - count
    return position + np.repeat(src - before, count), position + np.repeat(dst - before, count)

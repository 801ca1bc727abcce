"""The transfer engine: carries out planned transfers, off the caller's thread, in bounded windows.

There is one lane per direction. Inside a lane the queue's order is enough. Between lanes, order
matters where both touch a block, and then always: what one direction reads the other one writes, on
the device and on the host (two reads, which would not conflict, can only meet inside a lane). So a
transfer is not dispatched before every older one of the other direction that shares a device block
or a host block with it has ended.

These waits happen on the host, before dispatch, and never as one queue's wait for the other one's
event: dispatch is asynchronous, so that event might not have been recorded yet, and a wait on such
an event does not wait. They point to older transfers only, so there is no cycle.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable
from itertools import accumulate
from types import TracebackType
from typing import Final

from kvswitch.errors import ConfigError, IntegrityError, TransferError
from kvswitch.messages import BlockIds, Direction, Transfer
from kvswitch.transfer.arena import HostArena
from kvswitch.transfer.backend import Backend, Event
from kvswitch.transfer.lane import Job, Lane, Ledger
from kvswitch.transfer.layout import Layout
from kvswitch.transfer.plan import count_blocks
from kvswitch.transfer.ticket import Ticket

__all__ = ["TransferEngine"]


class TransferEngine:
    """Moves blocks between device and host in the background.

    Nothing is done in Python for each block or copy: the dispatchers take the GIL a few times for
    each transfer and once for each window. What takes longer for more blocks is done by them, too.

    Parameters
    ----------
    backend : Backend
        The engine takes it over, and closes it when it is closed itself.
    device, host : Layout
        The memory behind them must stay where it is until the engine is closed.
    window_bytes : int, optional
        Most bytes in one window; the backend knows how many suit its link. Where the host paces
        windows two are in flight per direction, so that a small copy of the inference engine waits
        for twice this at most; where the device does, for one [3.2].
    arena : HostArena, optional
        Memory behind `host` that `close` is to give back.

    Raises
    ------
    ConfigError
        If the layouts do not mirror each other, or `window_bytes` < 1.
    """

    def __init__(
        self,
        backend: Backend,
        device: Layout,
        host: Layout,
        *,
        window_bytes: int | None = None,
        arena: HostArena | None = None,
    ) -> None:
        if not device.mirrors(host):
            raise ConfigError(
                "device and host layout must have the same bytes per block in the same regions; "
                "HostArena.layout(device) makes such a one"
            )
        if window_bytes is None:
            window_bytes = backend.window_bytes
        if window_bytes < 1:
            raise ConfigError(f"window_bytes must be at least 1, not {window_bytes}")
        self.arena: Final = arena
        self._backend: Final = backend
        self._ledger: Final = Ledger()
        self._last = -1
        ledger = self._ledger
        out = Lane(Direction.OUT, backend, device, host, window_bytes=window_bytes, ledger=ledger)
        back = Lane(Direction.IN, backend, host, device, window_bytes=window_bytes, ledger=ledger)
        self._lanes: Final = (out, back)
        sizes = [region.nbytes for region in device.regions]
        self._before: Final = [0, *accumulate(sizes)]  # bytes of a block in the first n regions
        out.start(back)
        back.start(out)
        atexit.register(self.close)  # no copy may run while the interpreter frees its memory

    @classmethod
    def open(
        cls,
        backend: Backend,
        device: Layout,
        host_blocks: int,
        *,
        window_bytes: int | None = None,
    ) -> TransferEngine:
        """Make an engine with host memory of its own, in which there is room for `host_blocks`.

        Raises
        ------
        ConfigError
            The memory is not to be had, or `window_bytes` < 1. `backend` is closed then.
        """
        arena = None
        try:
            arena = backend.host_arena(host_blocks * device.block_bytes)
            host = arena.layout(device)
            return cls(backend, device, host, window_bytes=window_bytes, arena=arena)
        except BaseException:
            backend.close()
            if arena is not None:
                arena.close()
            raise

    def submit(self, transfer: Transfer, *, fence: Event | None = None) -> Ticket:
        """Take on a transfer, and return at once.

        It is dispatched when the transfers in `after` have ended (well or not), and all older ones
        of the other direction that touch any of its blocks.

        Parameters
        ----------
        transfer : Transfer
            Ids must increase from call to call. Its runs must not change any more.
        fence : Event or None
            Its first window waits for this work of the inference engine; from `Backend.fence`.

        Raises
        ------
        TransferError
            If the id does not increase, `after` names an id that is not lower, a block does not
            exist, the engine is closed, or a thread of it has died. Nothing has changed then.
        """
        lane = self._lanes[transfer.direction]
        runs = transfer.runs
        num_blocks = count_blocks(runs, lane.src, lane.dst)
        if transfer.id < 0 or any(earlier >= transfer.id for earlier in transfer.after):
            raise TransferError(
                f"transfer {transfer.id} (after {transfer.after}): ids start at 0, and a transfer "
                "waits for lower ids only"
            )
        ticket = Ticket(
            transfer.id,
            transfer.direction,
            num_blocks=num_blocks,
            num_runs=len(runs) if self._backend.coalesce else num_blocks,
            nbytes=num_blocks * lane.src.block_bytes,
            changed=self._ledger.changed,
        )
        with self._ledger.lock:
            if self._ledger.dead is not None:
                raise TransferError(self._ledger.obituary()) from self._ledger.dead
            if self._ledger.closed:
                raise TransferError("the transfer engine is closed")
            if transfer.id <= self._last:
                raise TransferError(
                    f"transfer ids must increase: {transfer.id} comes after {self._last}"
                )
            after_other = 0
            for earlier in transfer.after:
                found = self._ledger.under_way.get(earlier)
                if found is not None and found.direction != transfer.direction:
                    after_other = max(after_other, earlier + 1)
            self._last = transfer.id
            self._ledger.under_way[transfer.id] = ticket
            lane.add(Job(ticket, runs, fence, after_other))
        return ticket

    def poll(self) -> list[Ticket]:
        """Tickets that have ended since the last call, failed and cancelled ones included.

        If a thread has died, so have all tickets. Ended tickets are kept until they are polled.
        """
        ended = self._ledger.ended
        if not ended:
            return []
        with self._ledger.lock:
            tickets = list(ended)
            ended.clear()
        return tickets

    def cancel(self, id: int) -> None:  # noqa: A002 - the field's word
        """Drop what has not been dispatched of a transfer; unknown and ended ids are ignored.

        It still ends in its turn, after what was dispatched of it and after all older ones of its
        direction: with TransferError, unless all of it had been dispatched already.
        """
        with self._ledger.lock:
            ticket = self._ledger.under_way.get(id)
            if ticket is not None:
                self._lanes[ticket.direction].cancel(id + 1)

    def conflicts(self, device_blocks: BlockIds) -> tuple[int, ...]:
        """Find what must have ended before these blocks are written or given away.

        Parameters
        ----------
        device_blocks : BlockIds
            Shape [n].

        Returns
        -------
        tuple of int
            Of each direction the newest transfer under way that touches any of them. `wait` for
            these is enough: transfers of a direction end in order.

        Raises
        ------
        TransferError
            If a block does not exist.
        """
        if not self._ledger.under_way or not len(device_blocks):
            return ()
        out, back = self._lanes
        if device_blocks.min() < 0 or device_blocks.max() >= out.src.num_blocks:
            raise TransferError(f"device blocks are numbered 0 to {out.src.num_blocks - 1}")
        self._ledger.place()
        with self._ledger.placing:
            marks = (out.conflict(0, device_blocks), back.conflict(1, device_blocks))
        return tuple(mark - 1 for mark in marks if mark)

    def wait(self, ids: Iterable[int], timeout: float | None = None) -> None:
        """Block until all these transfers have ended, well or not; unknown ids count as ended.

        Raises
        ------
        TimeoutError
            If some have not ended after `timeout` seconds.
        """
        under_way = self._ledger.under_way
        with self._ledger.changed:
            left = under_way.keys() & set(ids)
            if not self._ledger.changed.wait_for(lambda: left.isdisjoint(under_way), timeout):
                left &= under_way.keys()
                raise TimeoutError(f"transfers {sorted(left)} have not ended within {timeout} s")

    def hold(self, ids: Iterable[int], stream: object | None = None) -> frozenset[int]:
        """Let compute come after these transfers, on the device if it has streams.

        Blocks until each of them has been dispatched whole, since a wait for an event that is not
        recorded yet would not wait; the bytes may still be under way. Where there are no streams,
        this is `wait`.

        Parameters
        ----------
        stream : optional
            The compute stream: what it is given from now on runs when their bytes have landed.

        Returns
        -------
        frozenset of int
            Those under way, which the stream waits for. All others have ended, well or not.
        """
        wanted = frozenset(ids)
        if not self._backend.has_streams:
            self.wait(wanted)
            return frozenset()
        ledger = self._ledger

        def dispatched() -> bool:
            return all(job.complete for job in self._jobs(wanted))

        with ledger.changed:
            ledger.changed.wait_for(dispatched)
            jobs = self._jobs(wanted)
        # A direction's queue runs in order: its newest job is enough.
        newest = {job.ticket.direction: job.end for job in jobs if job.end is not None}
        for event in newest.values():
            self._backend.hold(stream, event)
        return frozenset(job.ticket.id for job in jobs)

    def _jobs(self, ids: Iterable[int]) -> list[Job]:
        """Jobs of these transfers as far as they are under way, oldest first."""
        marks = [id_ + 1 for id_ in sorted(ids) if id_ in self._ledger.under_way]
        found = [self._lanes[self._ledger.under_way[m - 1].direction].find(m) for m in marks]
        return [job for job in found if job is not None]

    def wait_regions(self, ids: Iterable[int], regions: int) -> None:
        """Block until the first `regions` regions of all these transfers have arrived.

        Regions arrive in the layout's order, window by window: with a region for each layer, a
        forward that waits for its layers one by one runs while the others are still under way.
        A transfer that fails is waited for until it has ended; unknown ids count as ended.
        """
        under_way = self._ledger.under_way
        with self._ledger.changed:
            left = {id: under_way[id] for id in ids if id in under_way}  # noqa: A001

            def there() -> bool:
                return all(
                    ticket.done or ticket.arrived >= ticket.num_blocks * self._before[regions]
                    for ticket in left.values()
                )

            self._ledger.changed.wait_for(there)

    def drain(self, timeout: float | None = None) -> None:
        """`wait` for everything submitted so far."""
        with self._ledger.lock:
            ids = list(self._ledger.under_way)
        self.wait(ids, timeout)

    def close(self) -> None:
        """Cancel what has not been dispatched, wait for the rest, end all threads, free the arena.

        Tickets can still be polled. May be called again, and is called at exit if forgotten.
        """
        with self._ledger.lock:
            self._ledger.closed = True
            for lane in self._lanes:
                lane.cancel()
        for lane in self._lanes:
            lane.join()
        self._backend.close()
        if self.arena is not None:
            self.arena.close()
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
        with self._ledger.lock:
            jobs = {job.ticket.id for lane in self._lanes for job in lane.jobs}
            tickets = self._ledger.under_way.keys()
            if jobs != tickets:
                raise IntegrityError(f"jobs {sorted(jobs)}, but tickets {sorted(tickets)}")
            for lane in self._lanes:
                lane.check_integrity()

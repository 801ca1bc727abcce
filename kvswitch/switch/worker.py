"""The worker's half of a step: carry out orders, report what has ended."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from time import perf_counter

from kvswitch.errors import TransferError
from kvswitch.messages import Measurement, Observations, SwapOrders, Transfer
from kvswitch.transfer import Backend, Ticket, TransferEngine

__all__ = ["SwapWorker"]

_log = logging.getLogger("kvswitch")


class SwapWorker:
    """Drives a worker's transfer engine by the planner's orders.

    Every transfer that it is given is reported once, whatever becomes of it: one that the engine
    refuses (it is closed, or one of its threads has died) as failed. What the forward has to come
    after is awaited on the device where it has streams, and reported as completed when the stream
    has been told so: whatever the engine does next comes after it.

    Parameters
    ----------
    engine : TransferEngine
    backend : Backend
        The engine's: makes the fences.
    on_started, on_ended : callable, optional
        Called with each transfer that the engine has taken, and each ticket that is reported.
    """

    def __init__(
        self,
        engine: TransferEngine,
        backend: Backend,
        *,
        on_started: Callable[[Transfer], object] | None = None,
        on_ended: Callable[[Ticket], object] | None = None,
    ) -> None:
        self._engine = engine
        self._backend = backend
        self._on_started = on_started
        self._on_ended = on_ended
        self._refused: list[int] = []
        self._warned = False
        self._wait: set[int] = set()
        self._stream: object | None = None
        self._held: set[int] = set()  # the stream waits for them; not reported yet
        self._early: set[int] = set()  # reported before they have ended

    def submit(
        self, orders: SwapOrders, stream: object | None = None, *, also: int | None = None
    ) -> None:
        """Begin what `orders` say; `wait` is to follow before the forward.

        Parameters
        ----------
        stream : optional
            The engine's compute stream (CUDA): transfers wait for what it has been given so far.
        also : int, optional
            A transfer to `wait` for beside those in the orders.

        Raises
        ------
        ConfigError
            That is no stream. The transfers are reported as failed.
        """
        self._stream = stream
        self._wait.update(orders.wait)
        if also is not None:
            self._wait.add(also)
        if orders.transfers:
            self._submit(orders.transfers, stream)
        for transfer_id in orders.cancel:
            self._engine.cancel(transfer_id)

    def _submit(self, transfers: Sequence[Transfer], stream: object | None) -> None:
        try:
            fence = self._backend.fence(stream)
        except BaseException as error:  # without it nothing may be copied
            self._refused += [transfer.id for transfer in transfers]
            if not isinstance(error, TransferError):
                raise
            self._warn(error)
            return
        for transfer in transfers:
            try:
                self._engine.submit(transfer, fence=fence)
            except TransferError as error:
                self._refused.append(transfer.id)
                self._warn(error)
            else:
                if self._on_started is not None:
                    self._on_started(transfer)

    def _warn(self, error: TransferError) -> None:
        if not self._warned:  # a dead engine refuses everything from now on
            _log.warning("what cannot be swapped is recomputed: %s", error)
        self._warned = True

    def wait(self) -> float:
        """Block until the forward may run; for how many seconds that took (0: nothing to wait for).

        Where the device has streams, the forward may be given to the one that `submit` was told of
        as soon as what it has to come after has been dispatched.

        What was to be waited for stays so if this is interrupted.
        """
        if not self._wait:
            return 0.0
        started = perf_counter()
        try:
            self._held |= self._engine.hold(self._wait, self._stream) - self._early
        except TransferError:  # then the caller waits, not the stream
            self._engine.wait(self._wait)
        self._wait.clear()
        return perf_counter() - started

    def wait_regions(self, ids: Collection[int], regions: int) -> float:
        """Block until the first `regions` regions of these transfers are there; as `wait` else."""
        if not ids:
            return 0.0
        started = perf_counter()
        self._engine.wait_regions(ids, regions)
        return perf_counter() - started

    def report(self, *, step_seconds: float | None = None) -> Observations:
        """What has ended since the last report; `step_seconds` as in `Observations`.

        Raises
        ------
        TransferError
            If one failed that the stream had been told to wait for: the device has been lost, and
            with it what the stream has computed since.
        """
        ended = self._engine.poll()
        if not ended and not self._refused and not self._held:
            return Observations(step_seconds=step_seconds)
        completed: list[int] = []
        measurements: list[Measurement] = []
        failed, self._refused = self._refused, []
        lost: TransferError | None = None
        for ticket in ended:
            early = ticket.id in self._early
            self._early.discard(ticket.id)
            if ticket.error is None:
                if not early:
                    completed.append(ticket.id)
                measurements.append(Measurement(ticket.direction, ticket.nbytes, ticket.seconds))
            elif early:
                lost = ticket.error
            else:
                failed.append(ticket.id)
            if self._on_ended is not None:
                self._on_ended(ticket)
        early_now = self._held.difference(completed, failed)
        self._held.clear()
        completed += sorted(early_now)
        self._early |= early_now
        if lost is not None:
            raise lost
        return Observations(tuple(completed), tuple(failed), tuple(measurements), step_seconds)

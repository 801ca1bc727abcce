"""What the submitter of a transfer holds."""

from __future__ import annotations

import threading
from typing import Final

from kvswitch.errors import TransferError
from kvswitch.messages import Direction

__all__ = ["Ticket"]


class Ticket:
    """What has become of a transfer.

    Attributes
    ----------
    id : int
    direction : Direction
    num_blocks, nbytes : int
        What the transfer moves.
    num_runs : int
        Copies counted in blocks: ``num_blocks / num_runs`` is the granularity of the transfer, in
        blocks per copy [2.2, 5]. Equal to `num_blocks` on a backend that does not coalesce.
    num_copies : int
        Contiguous byte ranges these make over all regions, before any is cut at the edge of a
        window. 0 until dispatch has begun.
    arrived : int
        Bytes of it known to have arrived, region by region in the layout's order.
    started, ended : float
        When its queue came to its first window and when it was done with the last one dispatched,
        in `time.perf_counter` seconds. 0 if nothing was dispatched.
    """

    def __init__(
        self,
        id: int,  # noqa: A002 - the field's word
        direction: Direction,
        *,
        num_blocks: int,
        num_runs: int,
        nbytes: int,
        changed: threading.Condition,
    ) -> None:
        self.id: Final = id
        self.direction: Final = direction
        self.num_blocks: Final = num_blocks
        self.num_runs: Final = num_runs
        self.nbytes: Final = nbytes
        self.num_copies = 0
        self.arrived = 0
        self.started = 0.0
        self.ended = 0.0
        self._changed: Final = changed
        self._done = False
        self._error: TransferError | None = None

    @property
    def seconds(self) -> float:
        """How long its queue was busy with it; 0 until it has ended."""
        return self.ended - self.started if self._done else 0.0

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not: nothing of it touches memory any more."""
        return self._done

    @property
    def error(self) -> TransferError | None:
        """Why it failed; None while it is under way, and if all its bytes have arrived."""
        return self._error

    def wait(self, timeout: float | None = None) -> None:
        """Block until it has ended.

        Raises
        ------
        TransferError
            If it failed or was cancelled.
        TimeoutError
            If it has not ended after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"transfer {self.id} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error

    def end(self, error: TransferError | None) -> None:
        """Say that it has ended. For the engine, which holds the lock of `changed`."""
        self._error = error
        self._done = True
        self._changed.notify_all()

    def __repr__(self) -> str:
        state = "under way" if not self._done else str(self._error or "arrived")
        return f"<Ticket {self.id} {self.direction.name} {self.num_blocks} blocks: {state}>"

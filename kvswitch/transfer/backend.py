"""What a copy engine offers: queues that run copies in order, and events to wait for.

The vocabulary is CUDA's, because its rules are the strict ones: a queue is a stream, work on it is
asynchronous, and **a wait on an event that has not been recorded yet does not wait**. Whoever keeps
to these rules on the CPU backend keeps to them on a GPU.
"""

from __future__ import annotations

from typing import Protocol

from kvswitch.errors import TransferError
from kvswitch.messages import Direction
from kvswitch.transfer.arena import HostArena
from kvswitch.transfer.plan import Copies

__all__ = ["Backend", "DeadQueue", "Event", "Queue"]


class DeadQueue(TransferError):  # noqa: N818 - names the state
    """A queue that will never run anything again: its thread died, or its device is lost."""


class Event(Protocol):
    """A point in a queue. Each `Queue.record` moves it to a new point.

    An event never recorded counts as reached, as on CUDA.
    """

    @property
    def error(self) -> Exception | None:
        """What failed on that queue since the event recorded before this one.

        None until the queue has come here; `DeadQueue` if it never will.
        """

    @property
    def time(self) -> float:
        """When the queue came here, in `time.perf_counter` seconds; 0 before."""

    def done(self) -> bool:
        """Whether the queue has come here (or died). Does not block."""

    def wait(self, timeout: float | None = None) -> bool:
        """Block the calling thread, without spinning, until done; False after `timeout` seconds."""


class Queue(Protocol):
    """Runs what it is given in order, asynchronously. Used by one thread at a time."""

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        """Copy ``copies[start:stop]``: one window, or several up to `Backend.span_bytes`.

        The arrays must not change any more.

        Raises
        ------
        DeadQueue
            If the queue can take nothing any more (also when closed). Any other exception fails
            just this window.
        """

    def record(self, event: Event | None = None) -> Event:
        """Mark this point with `event`, or with a new one. DeadQueue as in `copy`."""

    def wait(self, event: Event) -> None:
        """Let later work of this queue wait until `event`, as recorded *now*, has been reached.

        Never blocks the caller. An event not recorded yet does **not** wait; nor does one whose
        work failed or whose queue died.
        """


class Backend(Protocol):
    """Makes queues. Belongs to the one `TransferEngine` it is given to, which closes it.

    Attributes
    ----------
    coalesce : bool
        Whether runs are copied as wholes; False asks for one copy per block and region.
    window_bytes : int
        Bytes of a window that suit its link, where the settings do not say.
    span_bytes : int
        Bytes of consecutive windows that a queue is given at once, because it lets the engine's own
        copies in between windows by itself. 0: window after window, paced by the host.
    has_streams : bool
        Whether compute is asynchronous, in streams that can wait for an event (`hold`).
    """

    coalesce: bool = True
    window_bytes: int = 8 << 20
    span_bytes: int = 0
    has_streams: bool = False

    def open_queue(self, direction: Direction) -> Queue:
        """A queue of its own for transfers in this direction."""

    def event(self) -> Event:
        """An event not recorded yet."""

    def fence(self, stream: object | None) -> Event | None:
        """Everything the engine's compute `stream` (None: the current one) has been given so far.

        None where compute is synchronous, so that there is nothing to wait for.
        """

    def hold(self, stream: object | None, event: Event) -> None:
        """Let what the compute `stream` is given from now on wait for `event`, as recorded now.

        Only where there are streams. Never blocks the caller.
        """
        raise TransferError("this backend has no streams: wait for the event instead")

    def host_arena(self, nbytes: int) -> HostArena:
        """Reserve host memory that queues copy well from and to. Raises what `HostArena` does."""
        return HostArena(nbytes)

    def close(self) -> None:
        """Finish what the queues were given and free them. May be called again."""

"""Moving blocks between device and host: layouts, plans, host memory, engine and CPU backend."""

from kvswitch.transfer.arena import HostArena
from kvswitch.transfer.backend import Backend, DeadQueue, Event, Queue
from kvswitch.transfer.cpu import CpuBackend
from kvswitch.transfer.engine import TransferEngine
from kvswitch.transfer.layout import Layout, Region, layout_of
from kvswitch.transfer.plan import Copies, coalesce, lower
from kvswitch.transfer.ticket import Ticket

__all__ = [
    "Backend",
    "Copies",
    "CpuBackend",
    "DeadQueue",
    "Event",
    "HostArena",
    "Layout",
    "Queue",
    "Region",
    "Ticket",
    "TransferEngine",
    "coalesce",
    "layout_of",
    "lower",
]

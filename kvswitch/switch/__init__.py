"""Context switches: the planner (Algorithm 1), its strategy, and the facade for custom engines."""

from kvswitch.switch.counters import COUNTERS, GAUGES, Counters
from kvswitch.switch.engine_pool import EnginePool, EngineSwapManager
from kvswitch.switch.facade import KVSwitch, Ready, Resumed, SwapTicket
from kvswitch.switch.manager import Resumption, SwapManager
from kvswitch.switch.ranks import RankReports, ReducedReports
from kvswitch.switch.sequence import SequenceState
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.strategy import Arrival, Strategy
from kvswitch.switch.worker import SwapWorker

__all__ = [
    "COUNTERS",
    "GAUGES",
    "Arrival",
    "Counters",
    "EnginePool",
    "EngineSwapManager",
    "KVSwitch",
    "RankReports",
    "Ready",
    "ReducedReports",
    "Resumed",
    "Resumption",
    "SequenceState",
    "Strategy",
    "SwapManager",
    "SwapStats",
    "SwapTicket",
    "SwapWorker",
]

"""Who runs next: priorities, priority epochs, and the target batch [paper 3, 4.2]."""

from kvswitch.scheduling.inversion import InversionMeter
from kvswitch.scheduling.policies import FixedPolicy, PriorityPolicy, TracePolicy
from kvswitch.scheduling.queues import State
from kvswitch.scheduling.requests import RequestPriorities
from kvswitch.scheduling.scheduler import Decision, PriorityScheduler
from kvswitch.scheduling.trace import PriorityTrace

__all__ = [
    "Decision",
    "FixedPolicy",
    "InversionMeter",
    "PriorityPolicy",
    "PriorityScheduler",
    "PriorityTrace",
    "RequestPriorities",
    "State",
    "TracePolicy",
]

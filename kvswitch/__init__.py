"""kvswitch: preemption in LLM serving as a cheap context switch.

A custom engine needs `KVSwitch`, `Config` and the errors; engines in several processes use the
halves: `SwapManager` where decisions are made, `TransferEngine` where bytes move.
"""

from kvswitch.config import Config
from kvswitch.errors import (
    ConfigError,
    HostMemoryExhausted,
    IntegrityError,
    InvalidTransition,
    KVSwitchError,
    OutOfBlocks,
    TransferError,
    UnknownSequence,
)
from kvswitch.hooks import hookimpl
from kvswitch.switch import KVSwitch, Ready, Resumed, SequenceState, SwapManager, SwapStats
from kvswitch.transfer import HostArena, Layout, Region, TransferEngine, layout_of

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "HostArena",
    "HostMemoryExhausted",
    "IntegrityError",
    "InvalidTransition",
    "KVSwitch",
    "KVSwitchError",
    "Layout",
    "OutOfBlocks",
    "Ready",
    "Region",
    "Resumed",
    "SequenceState",
    "SwapManager",
    "SwapStats",
    "TransferEngine",
    "TransferError",
    "UnknownSequence",
    "hookimpl",
    "layout_of",
]

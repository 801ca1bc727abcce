r"""What the planner knows of one sequence, and the states its KV cache goes through.

::

    allocate            preempt                     swap-out ended
    --------> RUNNING -----------> LEAVING ----------------------> HOST
                ^  |  \                |                             |
       landed   |  |   \ end_turn      | resume (blocks taken back)  | resume
                |  |    v              v                             |
                |  |   IDLE ------> RUNNING or ARRIVING <------------+
                |  |    resume                 |
                +--+---------------------------+

IDLE sequences keep their blocks until somebody needs them; then they leave as if preempted.
Preempting an ARRIVING sequence copies nothing out: its host copies are as valid as they were.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from kvswitch.copies import Fill, Lease
from kvswitch.errors import IntegrityError, UnknownSequence
from kvswitch.messages import BlockIds, Transfer

__all__ = [
    "NO_BLOCKS",
    "ON_DEVICE",
    "Incoming",
    "Outgoing",
    "SequenceState",
    "Sequences",
    "SwapSequence",
]

NO_BLOCKS: BlockIds = np.empty(0, np.int32)
NO_BLOCKS.flags.writeable = False


class SequenceState(Enum):
    """Where a sequence's KV cache is."""

    RUNNING = auto()  # on the device; may be computed on
    LEAVING = auto()  # off the device, swap-out under way
    HOST = auto()  # off the device; what the host holds of it may be swapped in
    ARRIVING = auto()  # device blocks allocated, swap-in under way
    IDLE = auto()  # turn ended; on the device until somebody needs the room


ON_DEVICE = (SequenceState.RUNNING, SequenceState.ARRIVING)
"""States in which nobody else can have a sequence's device blocks."""


@dataclass(slots=True, eq=False)
class SwapSequence:
    """One sequence.

    Attributes
    ----------
    tokens : int
        Tokens that its KV cache holds, or was allocated for; once off the device, those that had
        been computed.
    table : BlockIds
        Its device blocks, in order; empty off the device.
    capacity : int
        Tokens that these have room for.
    outgoing : list of Outgoing
        Swap-outs under way, in order.
    incoming : Incoming or None
        The swap-in under way.
    keys : list
        Content keys of its leading full blocks, as far as known.
    """

    id: Hashable
    state: SequenceState = SequenceState.RUNNING
    tokens: int = 0
    table: BlockIds = field(default_factory=lambda: NO_BLOCKS)
    capacity: int = 0
    priority: float = 0.0
    outgoing: list[Outgoing] = field(default_factory=list)
    incoming: Incoming | None = None
    keys: list[Hashable] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A swap-out under way, and the device blocks it reads, which it holds until it has ended.

    Attributes
    ----------
    followers : list of Outgoing
        Other sequences that have left with the same content: a part of this transfer is theirs,
        too. They hold nothing, and have no followers.
    """

    transfer: Transfer
    sequence: SwapSequence
    fill: Fill
    blocks: BlockIds
    followers: list[Outgoing] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Incoming:
    """A swap-in under way: the device blocks it writes and the host blocks it reads.

    Attributes
    ----------
    first : int
        Tokens of the sequence that are on the device whatever becomes of the transfer.
    tokens : int
        Tokens valid on the device once it has landed.
    needs : tuple of (Fill, int)
        Swap-outs whose bytes it reads, and the tokens that are valid if that one fails.
    step : int
        When it was planned.
    """

    transfer: Transfer
    sequence: SwapSequence
    lease: Lease
    blocks: BlockIds
    first: int
    tokens: int
    needs: tuple[tuple[Fill, int], ...]
    step: int


class Sequences:
    """All sequences, and Algorithm 1's queues: one for each state, longest there first."""

    def __init__(self) -> None:
        self.all: dict[Hashable, SwapSequence] = {}
        self.queues: dict[SequenceState, dict[Hashable, SwapSequence]] = {
            state: {} for state in SequenceState
        }

    def get(self, sequence: Hashable) -> SwapSequence:
        """Look up a sequence; UnknownSequence if there is none."""
        try:
            return self.all[sequence]
        except KeyError:
            raise UnknownSequence(
                f"no sequence {sequence!r}: it was never allocated, or has been freed"
            ) from None

    def add(self, s: SwapSequence) -> None:
        """Put a new sequence into the queue of its state."""
        self.all[s.id] = self.queues[s.state][s.id] = s

    def move(self, s: SwapSequence, state: SequenceState) -> None:
        """Let a sequence change its state."""
        del self.queues[s.state][s.id]
        s.state = state
        self.queues[state][s.id] = s

    def remove(self, s: SwapSequence) -> None:
        """Forget a sequence."""
        del self.all[s.id], self.queues[s.state][s.id]

    def __contains__(self, s: SwapSequence) -> bool:
        """Whether this very sequence is still there: its id may have been given to another."""
        return self.all.get(s.id) is s

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each sequence is in the one queue of its state."""
        queued = [(state, s) for state, queue in self.queues.items() for s in queue.values()]
        if len(queued) != len(self.all):
            raise IntegrityError(f"{len(self.all)} sequences, but {len(queued)} in queues")
        for state, s in queued:
            if s.state is not state or s not in self:
                raise IntegrityError(f"{s.id!r} is {s.state.name}, but queued as {state.name}")
            if (s.state is SequenceState.LEAVING) > bool(s.outgoing):
                raise IntegrityError(f"{s.id!r} is LEAVING, but no swap-out is under way")
            if (s.state is SequenceState.HOST) and s.outgoing:
                raise IntegrityError(f"{s.id!r} is HOST, but a swap-out is under way")
            if (s.state is SequenceState.ARRIVING) != (s.incoming is not None):
                raise IntegrityError(f"{s.id!r} is {s.state.name}, its swap-in says otherwise")

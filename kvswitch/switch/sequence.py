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
import numpy.typing as npt

from kvswitch.copies import Fill, Lease
from kvswitch.messages import BlockIds, Transfer

__all__ = ["Incoming", "Outgoing", "SequenceState", "SwapSequence"]


class SequenceState(Enum):
    """Where a sequence's KV cache is."""

    RUNNING = auto()  # on the device; may be computed on
    LEAVING = auto()  # off the device, swap-out under way
    HOST = auto()  # off the device; what the host holds of it may be swapped in
    ARRIVING = auto()  # device blocks allocated, swap-in under way
    IDLE = auto()  # turn ended; on the device until somebody needs the room


@dataclass(slots=True, eq=False)
class SwapSequence:
    """One sequence.

    Attributes
    ----------
    tokens : int
        Tokens that its KV cache holds, or was allocated for; once off the device, those that the
        engine had accepted.
    capacity : int
        Tokens that its device blocks have room for (0 off the device).
    outgoing : list of Outgoing
        Swap-outs under way, in order.
    left : Outgoing or None
        The one with which it left the device; its blocks can be taken back.
    keys : list
        Content keys of its leading full blocks, as far as known.
    """

    id: Hashable
    state: SequenceState = SequenceState.RUNNING
    tokens: int = 0
    capacity: int = 0
    priority: float = 0.0
    outgoing: list[Outgoing] = field(default_factory=list)
    left: Outgoing | None = None
    incoming: Incoming | None = None
    keys: list[Hashable] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Outgoing:
    """A swap-out under way: the device blocks it reads, held until it has ended.

    Attributes
    ----------
    taken : bool ndarray, shape [n]
        Blocks taken back by the sequence, or given to another whose writer waits for this transfer.
    leaving : bool
        The sequence has left the device, so the blocks will be free when the transfer has ended.
    """

    transfer: Transfer
    sequence: SwapSequence
    fill: Fill
    blocks: BlockIds
    taken: npt.NDArray[np.bool_]
    leaving: bool = False


@dataclass(slots=True, eq=False)
class Incoming:
    """A swap-in under way: the device blocks it writes and the host blocks it reads.

    Attributes
    ----------
    first : int
        Tokens of the sequence that are on the device whatever becomes of the transfer.
    tokens : int
        Tokens valid on the device once it has landed.
    needs : tuple of Fill
        Swap-outs whose bytes it reads: it brings nothing good if one of them fails.
    """

    transfer: Transfer
    sequence: SwapSequence
    lease: Lease
    blocks: BlockIds
    first: int
    tokens: int
    needs: tuple[Fill, ...]
    step: int

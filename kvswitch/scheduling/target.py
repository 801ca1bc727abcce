"""The target batch, and the way to it: pure functions over needs in blocks, in order."""

from __future__ import annotations

import sys
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.scheduling.policies import IntArray

__all__ = [
    "NEVER",
    "enough_for_another",
    "exchange",
    "take_beside_headroom",
    "take_greedily",
]

BoolArray: TypeAlias = npt.NDArray[np.bool_]

NEVER: Final = sys.maxsize
"""More blocks than there can be."""


def take_greedily(need: IntArray, margin: IntArray, capacity: int, slots: int) -> BoolArray:
    """Mark, in order, everyone who fits beside those marked before.

    Parameters
    ----------
    need : IntArray, shape [n]
        Blocks, the most important sequence first.
    margin : IntArray, shape [n]
        Blocks that must stay free for a sequence to be taken. The first one taken does without:
        the highest always runs.
    capacity, slots : int
        Blocks and sequences that there is room for.
    """
    taken = np.zeros(need.size, np.bool_)
    left = np.flatnonzero(need <= capacity)
    used = 0
    while slots and left.size:
        total = used + np.cumsum(need[left])
        too_much = total + margin[left] > capacity
        if not used:
            too_much[0] = False
        count = min(int(too_much.argmax()) if too_much.any() else left.size, slots)
        taken[left[:count]] = True
        used = int(total[count - 1])
        slots -= count
        left = left[count:]
        left = left[need[left] + margin[left] <= capacity - used]
    return taken


def take_beside_headroom(
    need: IntArray, running: BoolArray, *, headroom: int, below: int, capacity: int, slots: int
) -> tuple[BoolArray, IntArray]:
    """Mark who is to run, as `take_greedily` does; and the margin that was asked of each.

    Nobody leaves for the headroom alone: of those that run, only who is below a newcomer must leave
    some. Else one whose growth has used it up would give way to a less important, smaller one.

    Parameters
    ----------
    need, capacity, slots
        As for `take_greedily`.
    running : BoolArray, shape [n]
    headroom, below : int
        Blocks that stay free beside a newcomer, and beside one that runs below a newcomer.
    """
    margin = np.where(running, 0, headroom)
    target = take_greedily(need, margin, capacity, slots)
    newcomers = np.flatnonzero(target & ~running)
    if newcomers.size:
        first = int(newcomers[0])
        margin[first:][running[first:]] = below
        target = take_greedily(need, margin, capacity, slots)
    return target, margin


def enough_for_another(target: BoolArray, need: IntArray, margin: IntArray, slots: int) -> int:
    """Return the least capacity in blocks with which `take_greedily` would take another set."""
    before = np.cumsum(np.where(target, need, 0))
    wants = before + need + np.where(before > 0, margin, 0)
    wants = wants[~target & (np.cumsum(target) < slots)]
    return int(wants.min()) if wants.size else NEVER


def exchange(incoming: IntArray, leaving: IntArray, room: int, places: int) -> tuple[int, int]:
    """Return how many come in and how many leave: all that can come in, no more leave than must.

    Parameters
    ----------
    incoming, leaving : IntArray
        Blocks needed by those who want to come in, and given back by those who may leave; both in
        the order in which they go.
    room, places : int
        Blocks and slots left now; `room` is negative if those who run need more than there is.
    """
    wanted, given = np.cumsum(incoming), np.cumsum(leaving)
    most = room + (int(given[-1]) if given.size else 0)
    ins = min(int(np.searchsorted(wanted, most, "right")), places + given.size)
    short = (int(wanted[ins - 1]) if ins else 0) - room
    outs = int(np.searchsorted(given, short)) + 1 if short > 0 else 0
    return ins, min(max(outs, ins - places), given.size)

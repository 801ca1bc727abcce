"""Who gives way to whom in one iteration: a pure function over numbers."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.scheduling.target import exchange, take_beside_headroom

__all__ = ["Candidates", "choose"]

Numbers: TypeAlias = npt.NDArray[np.float64]
Blocks: TypeAlias = npt.NDArray[np.int64]
Mask: TypeAlias = npt.NDArray[np.bool_]


class Candidates(NamedTuple):
    """Requests that run, and those waiting that may take their place, in any order.

    Attributes
    ----------
    priority : float64 ndarray, shape [n]
        Lower is more important.
    arrival : float64 ndarray, shape [n]
        Among equals the earlier one is more important.
    blocks : int64 ndarray, shape [n]
        Waiting: blocks needed. Running: blocks that are there once it has left.
    running, protected : bool ndarray, shape [n]
        Whether it runs; whether it must not be preempted now.
    """

    priority: Numbers
    arrival: Numbers
    blocks: Blocks
    running: Mask
    protected: Mask


def choose(them: Candidates, *, room: int, slots: int, headroom: int) -> tuple[list[int], int]:
    """Decide who leaves, so that more important requests can be admitted.

    Parameters
    ----------
    room : int
        Blocks that are free, or will be without preempting anybody.
    slots : int
        Requests that can run.
    headroom : int
        Blocks that stay free beside whoever is admitted.

    Returns
    -------
    leaving : list of int
        Indices of running requests, the least important first. No more than it takes.
    blocks : int
        Blocks that those will need who can be admitted then.
    """
    order = np.lexsort((them.arrival, ~them.running, them.priority))
    running = them.running[order]
    blocks = them.blocks[order]
    capacity = room + int(blocks[running].sum())
    target, _ = take_beside_headroom(
        blocks, running, headroom=headroom, below=headroom, capacity=capacity, slots=slots
    )
    # vLLM admits from the top, and stops at the first that does not fit.
    waiting = np.flatnonzero(~running)
    fits = target[waiting]
    newcomers = waiting if fits.all() else waiting[: int(fits.argmin())]
    victims = np.flatnonzero(running & ~target & ~them.protected[order])[::-1]
    ins, outs = exchange(
        blocks[newcomers],
        blocks[victims],
        # vLLM admits nobody into the headroom while others run, not even the first.
        room=room - headroom,
        places=slots - int(running.sum()),
    )
    if not ins:
        if not newcomers.size or victims.size < running.sum():
            return [], 0
        ins, outs = 1, victims.size  # alone it fits
    return order[victims[:outs]].tolist(), int(blocks[newcomers[:ins]].sum())

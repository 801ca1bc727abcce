"""Priority policies: how important each sequence is in a priority epoch.

A policy is asked for all sequences at once and answers elementwise, so the same call serves the
one sequence that has just arrived. Larger numbers are more important.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError
from kvswitch.scheduling.trace import PriorityTrace

__all__ = ["FixedPolicy", "FloatArray", "IntArray", "PriorityPolicy", "TracePolicy", "ask"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]


class PriorityPolicy(Protocol):
    """What the scheduler asks at every priority epoch, and once for each sequence that arrives."""

    def priorities(
        self, epoch: int, index: IntArray, base: FloatArray, waited: IntArray
    ) -> FloatArray:
        """Return the priority of each sequence, computed elementwise.

        Parameters
        ----------
        epoch : int
            Number of the priority epoch, from 0.
        index : IntArray, shape [n]
            The sequence's number in a trace; -1 if it was added without one.
        base : FloatArray, shape [n]
            Priority given by `PriorityScheduler.add` or `set_priority`.
        waited : IntArray, shape [n]
            Epochs begun since the sequence last ran, or arrived; 0 while it runs.

        Returns
        -------
        FloatArray, shape [n]
            Finite numbers; larger is more important.
        """
        ...


def ask(
    policy: PriorityPolicy, epoch: int, index: IntArray, base: FloatArray, waited: IntArray
) -> FloatArray:
    """Ask `policy` as its protocol says; ConfigError unless it gives each a finite priority."""
    priorities = np.asarray(policy.priorities(epoch, index, base, waited), np.float64)
    if priorities.shape != index.shape or not np.isfinite(priorities).all():
        raise ConfigError(
            f"{type(policy).__name__} must return one finite priority for each of "
            f"{index.size} sequences"
        )
    return priorities


class FixedPolicy:
    """The priority a sequence was given, optionally raised while it waits.

    Parameters
    ----------
    ageing : int, optional
        A sequence that waits gains 1.0 for every `ageing` epochs, and falls back to its base once
        it has run. Without it the lowest may wait for ever.

    Notes
    -----
    With ageing nobody starves. Let a sequence begin to wait in epoch `a`, with base `b`; let
    `L = ceil(top - b)`, where `top` is the highest base of any sequence while it waits. At epoch
    `a + ageing * (L + 1)` it is above all that run and all that begin to wait from then on. If `N`
    others wait at that moment, it runs by the end of epoch

        a + ageing * (L + 1) + N // g,    g = max(1, min(slots, (blocks - headroom) // need))

    where `need` is the largest need in blocks of any sequence, so `g` sequences always fit
    together. This holds while the pool's `blocks` are there for running sequences, and the engine
    defers none that the scheduler switches in.

    Raises
    ------
    ConfigError
        If `ageing` is below 1.
    """

    def __init__(self, ageing: int | None = None) -> None:
        if ageing is not None and ageing < 1:
            raise ConfigError(
                f"ageing={ageing}: give the epochs of waiting that raise a priority by one "
                "(1 or more), or None for none"
            )
        self._ageing = ageing

    def priorities(
        self, epoch: int, index: IntArray, base: FloatArray, waited: IntArray
    ) -> FloatArray:
        """Return `base`, plus one for every `ageing` epochs waited."""
        if self._ageing is None:
            return base
        return base + waited // self._ageing


class TracePolicy:
    """Priorities read from a precomputed trace [paper 4.2]; what a sequence was given is ignored.

    Parameters
    ----------
    trace : PriorityTrace
        Row `epoch` (it wraps at its end), column `index`. Every sequence must be added with its
        index in the trace.
    """

    def __init__(self, trace: PriorityTrace) -> None:
        self._levels = trace.levels

    @property
    def sequences(self) -> int:
        """Number of sequences in the trace: indices lie below it."""
        return int(self._levels.shape[1])

    def priorities(
        self, epoch: int, index: IntArray, base: FloatArray, waited: IntArray
    ) -> FloatArray:
        """Return the trace's levels; ConfigError for an index that is not in the trace."""
        epochs, sequences = self._levels.shape
        if index.size and (index.min() < 0 or index.max() >= sequences):
            bad = int(index[(index < 0) | (index >= sequences)][0])
            raise ConfigError(
                "a priority trace needs the index of each sequence in it: give it to add()"
                if bad < 0
                else f"index {bad} is beyond the priority trace, which has {sequences} sequences "
                f"(0 to {sequences - 1}): make a trace with more"
            )
        levels: FloatArray = self._levels[epoch % epochs, index].astype(np.float64)
        return levels

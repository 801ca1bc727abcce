"""The priority scheduler: who runs in this iteration [paper 3, 4.2].

At a priority epoch waiting, running and swapped sequences are ordered together, and the *target*
is taken greedily from the top: whoever fits in blocks and slots beside those taken before. The
running batch is then moved towards the target. Between epochs the priorities hold, and the target
is computed again only when something changed that can change it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvswitch.errors import ConfigError, IntegrityError, InvalidTransition
from kvswitch.scheduling.policies import PriorityPolicy, ask
from kvswitch.scheduling.queues import RUNNING, SWAPPED, WAITING, Queues, RowNumbers, State
from kvswitch.scheduling.target import (
    NEVER,
    enough_for_another,
    exchange,
    take_beside_headroom,
)

__all__ = ["Decision", "PriorityScheduler"]


@dataclass(frozen=True, slots=True)
class Decision:
    """Who changes places in this iteration; everybody else stays. No sequence is named twice.

    Attributes
    ----------
    preempt : tuple of Hashable
        Sequences to switch out, the least important first. To be carried out before the others.
    resume : tuple of Hashable
        Swapped sequences to switch in, the most important first.
    admit : tuple of Hashable
        Waiting sequences that start to run, the most important first.
    """

    preempt: tuple[Hashable, ...] = ()
    resume: tuple[Hashable, ...] = ()
    admit: tuple[Hashable, ...] = ()


_NOTHING: Final = Decision()


class PriorityScheduler:
    """Decides who runs, given priorities, free blocks, slots and what a switch costs.

    Pure bookkeeping: it reads no clock, thread or device, so an engine, its replicas and the
    simulator get the same decisions from the same calls.

    `schedule` itself moves the sequences it names: one switched in then holds the blocks it
    needs, one switched out holds none. Where it turns out otherwise the engine says so: `deferred`
    if a sequence could not be switched in, `yielded` if the engine preempted one on its own,
    `update` as sequences grow.

    Parameters
    ----------
    policy : PriorityPolicy
    blocks : int
        Size of the device pool; nobody may need more.
    slots : int
        Largest number of running sequences.
    epoch : int
        Iterations between two priority updates; the paper's frequency f is 1 / epoch.
    quantum : int
        Iterations for which a sequence just switched in is not preempted for another (`victim`
        ignores it). Below `epoch`.
    headroom : int
        Blocks that stay free beside a sequence switched in and all above it, for the growth of
        those that run; half as many beside those below it that still run, so that block groups
        stay large. If nobody is switched in, nobody leaves for it, and the highest of all does
        without.

    Raises
    ------
    ConfigError
        If a number is out of range.
    """

    def __init__(
        self,
        policy: PriorityPolicy,
        *,
        blocks: int,
        slots: int,
        epoch: int = 25,
        quantum: int = 5,
        headroom: int = 0,
    ) -> None:
        for name, value in (("blocks", blocks), ("slots", slots), ("epoch", epoch)):
            if value < 1:
                raise ConfigError(f"{name}={value}: give 1 or more")
        if not 0 <= quantum < epoch:
            raise ConfigError(
                f"quantum={quantum} must be 0 or more and below epoch={epoch}: a sequence must "
                "be able to give way before the next priority update"
            )
        if not 0 <= headroom < blocks:
            raise ConfigError(f"headroom={headroom} must be 0 or more and below blocks={blocks}")
        self._policy: Final = policy
        self._blocks: Final = blocks
        self._slots: Final = slots
        self._interval: Final = epoch
        self._quantum: Final = quantum
        self._headroom: Final = headroom
        self._queues: Final = Queues()
        self._iteration = -1
        self._epoch = 0
        self._arrivals = 0
        # When the target must be computed again: something changed, or so many blocks are there
        # (free and held) that somebody left out would fit.
        self._dirty = False
        self._enough = NEVER
        self._inverted: int | None = 0  # None: to be counted again

    def __contains__(self, sequence: Hashable) -> bool:
        return sequence in self._queues.row_of

    def __len__(self) -> int:
        return len(self._queues.row_of)

    def add(
        self,
        sequence: Hashable,
        *,
        need: int,
        priority: float = 0.0,
        index: int | None = None,
        cost: float = 0.0,
        swapped: bool = False,
    ) -> None:
        """Take in a request, or the next turn of a conversation.

        Parameters
        ----------
        sequence : Hashable
            May be one that was removed when its last turn ended.
        need : int
            Blocks it must hold to run: its whole context and what its next step writes. Blocks
            that an idle conversation still holds are part of it (and count as free, see
            `schedule`).
        priority : float
            Base priority; larger is more important. The policy decides what to make of it.
        index : int, optional
            Its number in a priority trace; trace policies need it.
        cost : float
            Cost of switching it out, in any unit: blocks to copy, tokens to recompute. Among
            running sequences of equal priority the cheapest is switched out first.
        swapped : bool
            True if any of its KV exists, on the device or the host: `schedule` will then name it
            in `resume`, not in `admit`.

        Raises
        ------
        InvalidTransition
            If it is there already.
        ConfigError
            If it needs more than the whole pool, or a number is out of range.
        """
        queues = self._queues
        if sequence in queues.row_of:
            raise InvalidTransition(f"{sequence!r} was added already: remove it first")
        self._check_need(sequence, need, held=0)
        _check_finite("priority", priority)
        _check_finite("cost", cost)
        if index is not None and index < 0:
            raise ConfigError(f"index={index}: give the sequence's number in the trace, from 0")
        index = -1 if index is None else index
        effective = self._ask_one(index, priority, waited=0)
        row = queues.add(sequence)
        queues.state[row] = SWAPPED if swapped else WAITING
        queues.index[row] = index
        queues.base[row] = priority
        queues.priority[row] = effective
        queues.cost[row] = cost
        queues.blocks_needed[row] = need
        queues.arrival[row] = self._arrivals
        queues.ran[row] = self._epoch
        self._arrivals += 1
        self._changed()

    def remove(self, sequence: Hashable) -> None:
        """Forget a sequence, in any state: its turn has ended, or it was aborted.

        Raises
        ------
        UnknownSequence
            If it is not here.
        """
        queues = self._queues
        row = queues.row(sequence)
        if queues.state[row] == RUNNING:
            queues.switch_out(np.array([row]), WAITING)
            self._dirty = True
        queues.remove(row)
        self._inverted = None

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Give a sequence another base priority; what the policy makes of it holds at once.

        Raises
        ------
        UnknownSequence
            If it is not here.
        ConfigError
            If `priority` is not finite.
        """
        queues = self._queues
        row = queues.row(sequence)
        _check_finite("priority", priority)
        waited = 0 if queues.state[row] == RUNNING else self._epoch - queues.ran.item(row)
        effective = self._ask_one(queues.index.item(row), priority, waited)
        queues.base[row] = priority
        if effective != queues.priority[row]:
            queues.priority[row] = effective
            self._changed()

    def update(
        self,
        sequence: Hashable,
        *,
        held: int | None = None,
        need: int | None = None,
        cost: float | None = None,
    ) -> None:
        """Say what has become of a sequence; only what is given changes.

        Parameters
        ----------
        sequence : Hashable
        held : int, optional
            Blocks it holds now. Only a running sequence holds any.
        need : int, optional
            Blocks it must hold to run, or to go on; by default `held`, where that is given. A
            running sequence that is about to grow may say so here: if the pool cannot satisfy
            all, the next `schedule` preempts the least important.
        cost : float, optional
            Cost of switching it out.

        Raises
        ------
        UnknownSequence
            If it is not here.
        InvalidTransition
            If `held` is given for a sequence that does not run.
        ConfigError
            If it needs less than it holds or more than the whole pool, or a number is out of range.
        """
        queues = self._queues
        row = queues.row(sequence)
        if cost is not None:
            _check_finite("cost", cost)
        if held is None:
            held = queues.blocks_held.item(row)
        elif queues.state.item(row) == RUNNING:
            need = held if need is None else need
        else:
            raise InvalidTransition(
                f"{sequence!r} does not run, so what it holds counts as free: update its need"
            )
        if need is not None:
            self._check_need(sequence, need, held)
            growth = queues.resize(row, held, need)
            if growth < 0:
                self._enough += growth  # those after it in the order fit in with so much less
        if cost is not None:
            queues.cost[row] = cost

    def state(self, sequence: Hashable) -> State:
        """Return the queue a sequence is in; UnknownSequence if it is not here."""
        return State(self._queues.state.item(self._queues.row(sequence)))

    def priority(self, sequence: Hashable) -> float:
        """Return a sequence's priority in the present epoch; UnknownSequence if it is not here."""
        return self._queues.priority.item(self._queues.row(sequence))

    @property
    def current_epoch(self) -> int:
        """Number of the present priority epoch, from 0; when it changes, so may all priorities."""
        return self._epoch

    @property
    def inverted(self) -> int:
        """How many sequences that do not run have a higher priority than one that does."""
        if self._inverted is None:
            self._inverted = self._queues.inverted()
        return self._inverted

    def schedule(self, free_blocks: int) -> Decision:
        """Decide who runs in the next iteration. To be called once an iteration.

        Parameters
        ----------
        free_blocks : int
            Device blocks that could be given to sequences switched in and to the growth of those
            that run: free ones, those whose swap-out is under way, and those of idle conversations.
            So a sequence may be switched in with blocks that are still leaving: the engine waits
            for them, or calls `deferred`.

        Returns
        -------
        Decision
            Already in effect here.

        Raises
        ------
        ConfigError
            If `free_blocks` is negative, or the policy fails; no iteration has begun then.
        """
        if free_blocks < 0:
            raise ConfigError(f"free_blocks={free_blocks}: give 0 or more")
        iteration = self._iteration + 1
        if iteration % self._interval == 0:
            self._begin_epoch(iteration // self._interval)
        self._iteration = iteration
        queues = self._queues
        capacity = free_blocks + queues.held
        if self._dirty or capacity >= self._enough or capacity < queues.needed:
            return self._switch(capacity)
        return _NOTHING

    def deferred(self, sequence: Hashable) -> None:
        """Say that a sequence which the last `schedule` switched in could not be, for now.

        It is again what it was, has not run, and will be tried again by the next `schedule`.

        Raises
        ------
        UnknownSequence
            If it is not here.
        InvalidTransition
            If the last `schedule` did not switch it in.
        """
        queues = self._queues
        row = queues.row(sequence)
        if queues.state[row] != RUNNING or queues.entered[row] != self._iteration:
            raise InvalidTransition(f"{sequence!r} was not switched in by the last schedule()")
        queues.switch_out(np.array([row]), queues.came_from.item(row))
        self._changed()

    def victim(self, exclude: Collection[Hashable] = ()) -> Hashable | None:
        """Return who must give way when a running sequence cannot grow, or None if nobody can.

        It is the least important of those that run, and may be the one that asks; among equals the
        cheapest to switch out, then the last to arrive. The quantum does not protect it. The
        engine preempts it and calls `yielded`.

        Parameters
        ----------
        exclude : collection of Hashable
            Sequences that cannot give way now.
        """
        return self._queues.least_important(exclude)

    def yielded(self, sequence: Hashable) -> None:
        """Say that the engine has preempted a running sequence on its own, as when one must grow.

        Raises
        ------
        UnknownSequence
            If it is not here.
        InvalidTransition
            If it does not run.
        """
        row = self._queues.row(sequence)
        if self._queues.state[row] != RUNNING:
            raise InvalidTransition(f"{sequence!r} does not run, so it cannot give way")
        self._preempt(np.array([row]))
        self._changed()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the bookkeeping contradicts itself."""
        self._queues.check_integrity()
        if self._queues.running > self._slots:
            raise IntegrityError(
                f"scheduler: {self._queues.running} sequences run in {self._slots} slots"
            )
        if self._inverted not in (None, self._queues.inverted()):
            raise IntegrityError("scheduler: the count of inverted sequences is out of date")

    def _begin_epoch(self, epoch: int) -> None:
        queues = self._queues
        used = np.flatnonzero(queues.state)
        waited = np.where(queues.state[used] == RUNNING, 0, epoch - queues.ran[used])
        queues.priority[used] = ask(
            self._policy, epoch, queues.index[used], queues.base[used], waited
        )
        self._epoch = epoch
        self._changed()

    def _switch(self, capacity: int) -> Decision:
        """Compute the target for `capacity` blocks, and move the running batch towards it."""
        queues = self._queues
        order, running = queues.order()
        need = queues.blocks_needed[order]
        target, margin = take_beside_headroom(
            need,
            running,
            headroom=self._headroom,
            below=self._headroom // 2,
            capacity=capacity,
            slots=self._slots,
        )
        self._enough = enough_for_another(target, need, margin, self._slots)

        newcomers = order[target & ~running]
        outgoing = order[running & ~target][::-1]
        protected = queues.entered[outgoing] + self._quantum > self._iteration
        victims = outgoing[~protected]
        reserve = max(0, min(self._headroom // 2, capacity - int(need[target].sum())))
        # While protected ones stay, the target may not fit. Its newcomers then come in from the
        # top, nobody from outside takes their place, and nobody leaves in vain.
        ins, outs = exchange(
            queues.blocks_needed[newcomers],
            queues.blocks_needed[victims],
            room=capacity - reserve - queues.needed,
            places=self._slots - queues.running,
        )
        self._dirty = bool(protected.any())
        if not ins and (not outs or capacity >= queues.needed):
            return _NOTHING

        newcomers, victims = newcomers[:ins], victims[:outs]
        was_swapped = queues.state[newcomers] == SWAPPED
        self._preempt(victims)
        queues.switch_in(newcomers, self._iteration)
        self._inverted = None
        return Decision(
            preempt=queues.names(victims),
            resume=queues.names(newcomers[was_swapped]),
            admit=queues.names(newcomers[~was_swapped]),
        )

    def _preempt(self, rows: RowNumbers) -> None:
        self._queues.switch_out(rows, SWAPPED)
        self._queues.ran[rows] = self._epoch

    def _changed(self) -> None:
        self._dirty = True
        self._inverted = None

    def _ask_one(self, index: int, base: float, waited: int) -> float:
        return ask(
            self._policy,
            self._epoch,
            np.array([index]),
            np.array([base], np.float64),
            np.array([waited]),
        ).item()

    def _check_need(self, sequence: Hashable, need: int, held: int) -> None:
        if need > self._blocks:
            raise ConfigError(
                f"{sequence!r} needs {need} blocks, the whole pool has {self._blocks}: it can "
                "never run; shorten it, or give the pool more blocks"
            )
        if held < 0 or need < held or need < 1:
            raise ConfigError(
                f"{sequence!r} needs {need} blocks and holds {held}: give what it needs in all, "
                "1 or more and no less than it holds"
            )


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value}: give a finite number")

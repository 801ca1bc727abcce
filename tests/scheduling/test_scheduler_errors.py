"""What the scheduler refuses, and that it is then as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError, InvalidTransition, UnknownSequence
from kvswitch.scheduling import (
    Decision,
    FixedPolicy,
    PriorityPolicy,
    PriorityScheduler,
    PriorityTrace,
    State,
    TracePolicy,
)


def scheduler_of(policy: PriorityPolicy | None = None, **settings: int) -> PriorityScheduler:
    settings = {"blocks": 100, "slots": 8, "epoch": 10, "quantum": 0} | settings
    return PriorityScheduler(policy or FixedPolicy(), **settings)


# -- transitions -----------------------------------------------------------------------------------


def test_only_who_was_just_switched_in_can_be_deferred() -> None:
    scheduler = scheduler_of(slots=1)
    scheduler.add("a", need=1)
    scheduler.add("b", need=1)
    scheduler.schedule(100)
    with pytest.raises(InvalidTransition, match="'b' was not switched in"):
        scheduler.deferred("b")
    scheduler.schedule(99)
    with pytest.raises(InvalidTransition, match="'a' was not switched in"):
        scheduler.deferred("a")
    assert (scheduler.state("a"), scheduler.state("b")) == (State.RUNNING, State.WAITING)
    scheduler.check_integrity()


def test_only_who_runs_can_give_way() -> None:
    scheduler = scheduler_of()
    scheduler.add("a", need=1)
    with pytest.raises(InvalidTransition, match="'a' does not run"):
        scheduler.yielded("a")
    assert scheduler.state("a") == State.WAITING


def test_only_who_runs_holds_blocks() -> None:
    scheduler = scheduler_of()
    scheduler.add("a", need=4)
    with pytest.raises(InvalidTransition, match="'a' does not run"):
        scheduler.update("a", held=4)
    scheduler.check_integrity()


def test_nobody_can_be_added_twice() -> None:
    scheduler = scheduler_of()
    scheduler.add("a", need=1, priority=1.0)
    with pytest.raises(InvalidTransition, match="'a' was added already"):
        scheduler.add("a", need=2, priority=2.0)
    assert (len(scheduler), scheduler.priority("a")) == (1, 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.remove("x"),
        lambda s: s.set_priority("x", 1),
        lambda s: s.update("x", need=1),
        lambda s: s.state("x"),
        lambda s: s.priority("x"),
        lambda s: s.deferred("x"),
        lambda s: s.yielded("x"),
    ],
)
def test_an_unknown_sequence_is_named(call: Any) -> None:
    with pytest.raises(UnknownSequence, match="'x' was never added"):
        call(scheduler_of())


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 0}, "blocks=0"),
        ({"slots": 0}, "slots=0"),
        ({"epoch": 0}, "epoch=0"),
        ({"quantum": -1}, "quantum=-1"),
        ({"epoch": 10, "quantum": 10}, "quantum=10 .* below epoch=10"),
        ({"headroom": -1}, "headroom=-1"),
        ({"blocks": 100, "headroom": 100}, "headroom=100"),
    ],
)
def test_settings_out_of_range_are_config_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler_of(**settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"need": 101}, "needs 101 blocks, the whole pool has 100"),
        ({"need": 0}, "needs 0 blocks"),
        ({"need": 1, "priority": float("nan")}, "priority=nan"),
        ({"need": 1, "priority": float("inf")}, "priority=inf"),
        ({"need": 1, "cost": float("nan")}, "cost=nan"),
        ({"need": 1, "index": -1}, "index=-1"),
        ({"need": 1, "index": 2}, "index 2 is beyond the priority trace"),
        ({"need": 1}, "needs the index"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_added(
    arguments: dict[str, Any], message: str
) -> None:
    scheduler = scheduler_of(TracePolicy(PriorityTrace.random(0, 2, 2)))
    with pytest.raises(ConfigError, match=message):
        scheduler.add("a", **arguments)
    assert "a" not in scheduler
    assert scheduler.schedule(100) == Decision()
    scheduler.check_integrity()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"held": 101}, "the whole pool has 100"),
        ({"need": 101, "held": 5}, "the whole pool has 100"),
        ({"need": 3}, "needs 3 blocks and holds 4"),
        ({"need": 5, "held": 6}, "needs 5 blocks and holds 6"),
        ({"held": -1}, "holds -1"),
        ({"held": 0}, "needs 0 blocks"),
        ({"held": 5, "cost": float("inf")}, "cost=inf"),
    ],
)
def test_an_impossible_update_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    scheduler = scheduler_of()
    scheduler.add("a", need=4)
    scheduler.schedule(100)
    with pytest.raises(ConfigError, match=message):
        scheduler.update("a", **arguments)
    scheduler.check_integrity()
    scheduler.add("too much", need=97, priority=-1)
    scheduler.add("b", need=96, priority=-2)
    assert scheduler.schedule(96) == Decision(admit=("b",))  # `a` still holds four


def test_a_priority_that_is_no_number_is_refused() -> None:
    scheduler = scheduler_of()
    scheduler.add("a", need=1, priority=1.0)
    with pytest.raises(ConfigError, match="priority=nan"):
        scheduler.set_priority("a", float("nan"))
    assert scheduler.priority("a") == 1.0


def test_a_negative_number_of_free_blocks_is_refused_and_begins_no_iteration() -> None:
    scheduler = scheduler_of(epoch=2)
    scheduler.schedule(100)
    for _ in range(3):
        with pytest.raises(ConfigError, match="free_blocks=-1"):
            scheduler.schedule(-1)
    scheduler.schedule(100)
    assert scheduler.current_epoch == 0


@pytest.mark.parametrize("answer", [np.zeros(2), np.array([np.nan]), np.zeros(())])
def test_a_policy_that_fails_leaves_everything_as_it_was(answer: Any) -> None:
    class Broken(FixedPolicy):
        broken = False

        def priorities(self, epoch: int, index: Any, base: Any, waited: Any) -> Any:
            return answer if self.broken else base

    scheduler = scheduler_of(policy := Broken(), epoch=2)
    scheduler.add("a", need=1, priority=1.0)
    scheduler.schedule(100)
    scheduler.schedule(99)
    policy.broken = True
    for call in (
        lambda: scheduler.schedule(99),
        lambda: scheduler.add("b", need=1),
        lambda: scheduler.set_priority("a", 5.0),
    ):
        with pytest.raises(ConfigError, match="Broken must return one finite priority"):
            call()
        scheduler.check_integrity()
    assert (scheduler.current_epoch, scheduler.priority("a")) == (0, 1.0)
    assert "b" not in scheduler
    policy.broken = False
    assert scheduler.schedule(99) == Decision()
    assert scheduler.current_epoch == 1

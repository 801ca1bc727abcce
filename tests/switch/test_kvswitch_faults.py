"""The facade when copies fail, threads die and engines leave without a word; and observers."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from kvswitch import (
    InvalidTransition,
    KVSwitch,
    SequenceState,
)
from kvswitch.hooks import hookimpl
from kvswitch.messages import Direction, Observations
from kvswitch.transfer import TransferEngine

RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
BLOCKS, TOKENS, WIDTH = 12, 4, 64
BLOCK_BYTES = TOKENS * WIDTH * 8


# -- faults --------------------------------------------------------------------------------------


def test_a_copy_that_fails_half_way_costs_one_recomputation(
    tools: Any, make_switch: Any, cache: Any
) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, window=4096)
    for number, name in enumerate("ab"):
        tools.fill(cache, switch.allocate(name, 24), 100.0 * number)
    switch.step()
    for name in "ab":
        switch.preempt(name)
    tools.settle(switch)
    cache[:] = np.nan
    backend.raises[Direction.IN] = [None, OSError("half-way")]
    switch.resume("a")
    switch.resume("b")
    assert tools.settle(switch) == {"a": 0, "b": 24}
    assert tools.holds(cache, switch.planner.table("b"), 100.0)
    assert switch.stats().transfers_failed == 1
    assert switch.stats().tokens_lost == 24


def test_a_swap_out_that_fails_half_way_costs_one_recomputation(
    tools: Any, make_switch: Any, cache: Any
) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, window=4096)
    for number, name in enumerate("ab"):
        tools.fill(cache, switch.allocate(name, 24), 100.0 * number)
    switch.step()
    backend.raises[Direction.OUT] = [None, OSError("half-way")]
    for name in "ab":
        switch.preempt(name)
    tools.settle(switch)
    assert switch.resume("a").tokens == 0
    assert switch.resume("b").tokens == 24
    tools.settle(switch)
    assert tools.holds(cache, switch.planner.table("b"), 100.0)


def test_a_dead_worker_thread_turns_switching_into_recomputing(
    tools: Any, make_switch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend)
    switch.allocate("a", 12)
    switch.allocate("b", 12)
    switch.step()
    backend.raises[Direction.OUT] = [SystemExit("killed")]
    switch.preempt("a")
    tools.settle(switch)
    assert switch.resume("a").tokens == 0
    with caplog.at_level(logging.WARNING, "kvswitch"):
        for _ in range(3):
            switch.allocate("a", 12)
            switch.step()
            switch.preempt("a")
            switch.preempt("b")
            tools.settle(switch)
            assert switch.resume("a").tokens == 0
            assert switch.resume("b").tokens == 0
            switch.allocate("b", 12)
    assert "recomputed" in caplog.text
    assert len(caplog.records) == 1, "once is enough"


def test_what_was_to_be_waited_for_is_not_forgotten_when_interrupted(
    make_switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = make_switch()
    switch.allocate("a", 48)
    switch.step()
    switch.preempt("a")
    switch.allocate("b", 48)
    waited: list[set[int]] = []
    wait = TransferEngine.wait

    def interrupted(self: TransferEngine, ids: Any, *rest: Any) -> None:
        waited.append(set(ids))
        if len(waited) == 1:
            raise KeyboardInterrupt
        wait(self, ids, *rest)

    monkeypatch.setattr(TransferEngine, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        switch.step()
    switch.step()
    assert waited == [{0}, {0}]
    assert switch.planner.under_way == ()


def test_what_is_freed_is_not_copied_to_its_end(tools: Any, make_switch: Any) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, window=4096)
    switch.allocate("a", 48)  # 6 windows of 2 blocks
    backend.go.clear()
    switch.preempt("a")
    switch.step()
    switch.free("a")
    switch.step()
    backend.go.set()
    tools.settle(switch)
    assert backend.copied < 6
    assert switch.available_blocks() == 12


# -- close ---------------------------------------------------------------------------------------


def test_closing_with_transfers_in_flight(tools: Any, make_switch: Any) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend)
    switch.allocate("a", 12)
    switch.allocate("b", 12)
    switch.preempt("a")
    tools.settle(switch)
    backend.go.clear()
    switch.resume("a")
    switch.preempt("b")
    threading.Timer(0.02, backend.go.set).start()
    switch.close()
    assert switch.planner.under_way == ()
    assert switch.planner.copies.num_leases() == 0
    switch.check_integrity()
    switch.close()


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("allocate", ("new", 8)),
        ("preempt", ("a",)),
        ("discard", ("a",)),
        ("resume", ("a",)),
        ("end_turn", ("a",)),
        ("free", ("a",)),
        ("truncate", ("a", 1)),
        ("fork", ("a", "b", 4)),
        ("step", ()),
    ],
)
def test_nothing_works_once_closed(make_switch: Any, verb: str, arguments: tuple[Any, ...]) -> None:
    switch = make_switch()
    switch.allocate("a", 8)
    switch.close()
    with pytest.raises(InvalidTransition, match="has been closed"):
        getattr(switch, verb)(*arguments)


def test_what_is_just_dropped_ends_its_transfers_before_memory_goes(tools: Any, cache: Any) -> None:
    backend = tools.Puppet()
    switch = KVSwitch(cache, {"host_memory": "1MiB"}, block_tokens=TOKENS, backend=backend)
    switch.allocate("a", 48)
    switch.step()
    switch.preempt("a")
    backend.go.clear()
    switch.step()
    gone = weakref.ref(switch)
    threading.Timer(0.02, backend.go.set).start()
    del switch
    gc.collect()
    assert gone() is None
    assert not [t.name for t in threading.enumerate() if t.name.startswith("kvswitch")]


# -- observers -----------------------------------------------------------------------------------


class Observer:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def kvswitch_transfer_started(self, transfer: Any) -> None:
        self.seen.append(("started", transfer.id, transfer.num_blocks))

    @hookimpl
    def kvswitch_transfer_ended(self, ticket: Any) -> None:
        self.seen.append(("ended", ticket.id, ticket.error is None))

    @hookimpl
    def kvswitch_copies_lost(self, sequence: Any, tokens: int) -> None:
        self.seen.append(("lost", sequence, tokens))


def test_observers_see_transfers_and_lost_copies(tools: Any, make_switch: Any) -> None:
    observer = Observer()
    switch = make_switch(host_blocks=3, plugins=[observer])
    switch.allocate("a", 12)
    switch.preempt("a")
    tools.settle(switch)
    switch.allocate("b", 4)
    switch.set_priority("b", 1)
    switch.preempt("b")
    tools.settle(switch)
    assert observer.seen == [
        ("started", 0, 3),
        ("ended", 0, True),
        ("started", 1, 1),
        ("lost", "a", 8),
        ("ended", 1, True),
    ]


def test_observers_see_the_end_of_what_closing_cancels(make_switch: Any) -> None:
    observer = Observer()
    switch = make_switch(plugins=[observer])
    switch.allocate("a", 12)
    switch.preempt("a")
    switch.close()
    assert [what for what, *_ in observer.seen] == ["started", "ended"]


def test_an_observer_that_fails_harms_nobody(
    tools: Any, make_switch: Any, cache: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Observer):
        @hookimpl
        def kvswitch_transfer_started(self, transfer: Any) -> None:
            raise ValueError("on start")

        @hookimpl
        def kvswitch_transfer_ended(self, ticket: Any) -> None:
            raise ValueError("on end")

    switch = make_switch(plugins=[Failing()])
    for number, name in enumerate("ab"):
        tools.fill(cache, switch.allocate(name, 12), 100.0 * number)
    for name in "ab":
        switch.preempt(name)
    tools.settle(switch)
    cache[:] = np.nan
    for name in "ab":
        switch.resume(name)
    assert tools.settle(switch) == {"a": 12, "b": 12}
    assert tools.holds(cache, switch.planner.table("b"), 100.0)
    assert "on start" in caplog.text
    assert "on end" in caplog.text


def test_every_step_tells_the_planner_what_has_happened(
    tools: Any, make_switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = make_switch(strategy="sync")
    seen: list[Observations] = []
    observe = switch.planner.observe

    def observe_too(what: Observations) -> None:
        seen.append(what)
        observe(what)

    monkeypatch.setattr(switch.planner, "observe", observe_too)
    switch.step()
    switch.allocate("runs", 4)
    switch.allocate("a", 12)
    switch.step()
    assert [what.step_seconds for what in seen] == [None, None], "there was nothing to run"
    switch.preempt("a")
    tools.settle(switch)
    switch.resume("a")
    seen.clear()
    switch.step()
    first, second = seen
    assert first.step_seconds is not None
    assert first.step_seconds >= 0
    assert second.step_seconds is None
    (measured,) = second.measurements
    assert (measured.direction, measured.nbytes) == (Direction.IN, 3 * BLOCK_BYTES)

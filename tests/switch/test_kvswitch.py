"""The facade: what a custom engine sees and what it is told when something is wrong."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from kvswitch import (
    Config,
    ConfigError,
    HostMemoryExhausted,
    InvalidTransition,
    KVSwitch,
    OutOfBlocks,
    Region,
    SequenceState,
    UnknownSequence,
    layout_of,
)
from kvswitch.messages import Direction, Observations
from kvswitch.switch import SwapWorker
from kvswitch.transfer import CpuBackend, HostArena, Layout

RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
BLOCKS, TOKENS, WIDTH = 12, 4, 64
BLOCK_BYTES = TOKENS * WIDTH * 8


# -- there and back ------------------------------------------------------------------------------


def test_a_conversation_goes_out_and_comes_back_byte_for_byte(
    tools: Any, make_switch: Any, cache: Any
) -> None:
    switch = make_switch()
    tools.fill(cache, switch.allocate("chat-7", 30), 100.0)
    switch.step()
    switch.preempt("chat-7")
    tools.settle(switch)
    cache[:] = np.nan
    back = switch.resume("chat-7")
    assert back.tokens == 30
    ready = switch.step()
    landed = {**ready.landed, **tools.settle(switch)}
    assert landed == {"chat-7": 30}
    assert tools.holds(cache, switch.planner.table("chat-7"), 100.0)


@pytest.mark.parametrize("kind", ["one array", "two arrays", "layout", "torch", "numpy strided"])
def test_the_cache_may_come_in_any_of_these_shapes(tools: Any, kind: str) -> None:
    arrays: Any = [np.zeros((BLOCKS, TOKENS, 8)) for _ in range(2)]
    given: Any = arrays
    if kind == "one array":
        given = arrays[0]
    elif kind == "layout":
        given = layout_of(arrays)
    elif kind == "torch":
        given = [pytest.importorskip("torch").from_numpy(array) for array in arrays]
    elif kind == "numpy strided":
        arrays = given = [np.zeros((BLOCKS, 2, TOKENS, 8))[:, i] for i in range(2)]
    settings = {"host_memory": 1 << 20, "backend": "cpu"}  # of a layout, "auto" could not tell
    with KVSwitch(given, settings, block_tokens=TOKENS) as switch:
        table = switch.allocate("a", 18).tolist()
        for number, array in enumerate(arrays):
            tools.fill(array, table, 10.0 * number)
        switch.step()
        switch.preempt("a")
        tools.settle(switch)
        for array in arrays if kind != "one array" else arrays[:1]:
            array[:] = np.nan
        switch.resume("a")
        tools.settle(switch)
        for number, array in enumerate(arrays):
            assert tools.holds(array, switch.planner.table("a"), 10.0 * number)


def test_a_ticket_can_be_waited_for(tools: Any, make_switch: Any) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, strategy="async")
    switch.allocate("other", 4)
    switch.allocate("a", 12)
    switch.preempt("a")
    tools.settle(switch)
    ticket = switch.resume("a").ticket
    assert ticket is not None
    assert not ticket.done
    backend.go.clear()
    ready = switch.step()
    assert "a" in ready.arriving
    assert not ready.landed
    threading.Timer(0.01, backend.go.set).start()
    ticket.wait()
    assert ticket.done
    ticket.wait()
    assert switch.step().landed == {"a": 12}


def test_arriving_is_what_must_not_run(tools: Any, make_switch: Any) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, strategy="async")
    switch.allocate("other", 4)
    switch.allocate("a", 12)
    switch.preempt("a")
    tools.settle(switch)
    backend.go.clear()
    switch.resume("a")
    for _ in range(3):
        ready = switch.step()
        assert list(ready.arriving) == ["a"]
        assert ready.landed == {}
    backend.go.set()
    assert tools.settle(switch) == {"a": 12}
    assert list(switch.step().arriving) == []


@pytest.mark.parametrize(("strategy", "awaited"), [("sync", True), ("async", False)])
def test_a_batch_is_prepared_while_copies_are_under_way(
    tools: Any, make_switch: Any, strategy: str, awaited: bool
) -> None:
    backend = tools.Puppet()
    switch = make_switch(backend=backend, strategy=strategy)
    switch.allocate("other", 4)
    switch.allocate("a", 12)
    switch.preempt("a")
    tools.settle(switch)
    backend.go.clear()
    ticket = switch.resume("a").ticket
    absent = switch.dispatch()
    assert list(absent) == ([] if awaited else ["a"])
    assert not ticket.done, "nothing was waited for yet"
    if awaited:
        threading.Timer(0.01, backend.go.set).start()
    ready = switch.wait()
    assert ready.landed == ({"a": 12} if awaited else {})
    assert list(ready.arriving) == list(absent)
    backend.go.set()
    tools.settle(switch)


def test_in_series_nothing_goes_on_beside_copies(tools: Any, make_switch: Any) -> None:
    switch = make_switch(strategy="serial")
    switch.allocate("a", 12)
    switch.preempt("a")
    switch.dispatch()
    assert switch.planner.under_way == ()
    assert switch.wait().landed == {}


def test_a_batch_that_waits_is_stalled(tools: Any, make_switch: Any) -> None:
    switch = make_switch(backend=CpuBackend(bandwidth=BLOCK_BYTES * 30), strategy="sync")
    switch.allocate("a", 48)
    switch.preempt("a")
    tools.settle(switch)
    before = switch.stats()
    switch.resume("a")
    switch.step()
    after = switch.stats()
    assert after.stall_seconds - before.stall_seconds > 0.03
    assert after.overhead_seconds > before.overhead_seconds
    assert after.resumptions == before.resumptions + 1


def test_stall_is_neither_overhead_nor_part_of_an_iteration(
    tools: Any, make_switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = make_switch(strategy="async")
    switch.allocate("runs", 4)
    switch.allocate("a", 12)
    switch.preempt("a")
    tools.settle(switch)
    clock, wait = [100.0], SwapWorker.wait

    def long_wait(self: SwapWorker) -> float:
        seconds = 5.0 if wait(self) else 0.0
        clock[0] += seconds
        return seconds

    monkeypatch.setattr("kvswitch.switch.facade.perf_counter", lambda: clock[0])
    monkeypatch.setattr(SwapWorker, "wait", long_wait)
    switch.step()
    before = switch.stats()
    clock[0] += 2  # the forward
    switch.resume("a").ticket.wait()
    seen: list[Observations] = []
    observe = switch.planner.observe
    monkeypatch.setattr(switch.planner, "observe", lambda what: (seen.append(what), observe(what)))
    switch.step()
    assert seen[0].step_seconds == 2
    assert switch.stats().stall_seconds - before.stall_seconds == 5
    assert switch.stats().overhead_seconds == before.overhead_seconds


def test_verbs_go_through_to_the_planner(make_switch: Any) -> None:
    switch = make_switch()
    switch.allocate("a", 20)
    assert switch.available_blocks() == switch.available_blocks(headroom=False) == 7
    assert switch.fork("a", "b", 11) == 8
    assert switch.truncate("a", 9) == 9
    switch.set_priority("a", 3)
    switch.end_turn("a", 8)
    assert switch.planner.state("a") is IDLE
    assert switch.resume("a").tokens == 8
    switch.discard("a", 8)
    assert switch.planner.state("a") is HOST
    assert switch.resume("a").tokens == 0
    switch.free("a")
    assert "a" not in switch.planner


def test_sizes_need_not_be_multiples_of_anything(tools: Any, cache: Any) -> None:
    with KVSwitch(cache, {"host_memory": 3 * BLOCK_BYTES + 17}, block_tokens=TOKENS) as switch:
        assert switch.planner.copies.pool.num_blocks == 3
        tools.fill(cache, switch.allocate("a", 7), 5.0)
        switch.step()
        switch.preempt("a", 5)
        tools.settle(switch)
        assert switch.resume("a").tokens == 5


# -- settings and layouts that cannot work -------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_memroy": "1GiB"}, "no setting 'host_memroy'; did you mean 'host_memory'"),
        ({"host_memory": 0}, "host_memory must be more than 0"),
        ({"host_memory": 100}, "does not hold one block of 2048 bytes"),
        ({"host_memory": "a lot"}, "cannot read 'a lot'"),
        ({"host_memory": "4000TiB"}, "host memory of"),
        ({"strategy": "clever"}, "strategy"),
        ({"backend": "gpu"}, "no copy backend 'gpu'; registered are: cpu"),
        ({"window": 1}, "window must be at least 4KiB"),
    ],
)
def test_settings_that_cannot_work(cache: Any, settings: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match=message):
        KVSwitch(cache, {"host_memory": "1MiB", **settings}, block_tokens=TOKENS)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("block_tokens", "message"),
    [(0, "not 0"), (3, "not 3"), (-4, "not -4")],
)
def test_block_tokens_that_cannot_be(cache: Any, block_tokens: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVSwitch(cache, Config(host_memory="1MiB"), block_tokens=block_tokens)


def test_a_region_without_tokens_may_stand_beside_one_with(cache: Any) -> None:
    """Such as one scale a block."""
    scales = np.zeros((BLOCKS, 1))
    with KVSwitch([cache, scales], {"host_memory": "1MiB"}, block_tokens=TOKENS) as switch:
        assert switch.layout.block_bytes == BLOCK_BYTES + 8


def test_layouts_whose_blocks_are_not_contiguous() -> None:
    cache = np.zeros((TOKENS, BLOCKS, WIDTH)).swapaxes(0, 1)
    with pytest.raises(ConfigError, match="bytes of one block are not contiguous"):
        KVSwitch(cache, block_tokens=TOKENS)
    with pytest.raises(ConfigError):
        KVSwitch(Layout((Region(4096, 10, 20),), BLOCKS), block_tokens=TOKENS)


def test_a_failed_start_leaves_no_memory_behind(
    cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[HostArena] = []

    def close(arena: HostArena) -> None:
        closed.append(arena)

    monkeypatch.setattr(HostArena, "close", close)

    class Broken(CpuBackend):
        def open_queue(self, direction: Direction) -> Any:
            raise ConfigError("no such device")

    with pytest.raises(ConfigError, match="no such device"):
        KVSwitch(cache, {"host_memory": "1MiB"}, block_tokens=TOKENS, backend=Broken())
    assert len(closed) == 1


def test_verbs_between_the_halves_of_a_step_count_for_its_forward(
    tools: Any, make_switch: Any, cache: Any
) -> None:
    switch = make_switch(backend=CpuBackend(bandwidth=BLOCK_BYTES * 100))
    tools.fill(cache, switch.allocate("a", BLOCKS * TOKENS), 1.0)
    switch.step()
    switch.preempt("a")
    switch.dispatch()
    blocks = switch.allocate("b", 3 * TOKENS)  # which the swap-out still reads
    switch.wait()
    tools.fill(cache, blocks, 2.0)
    tools.settle(switch)
    switch.free("b")
    switch.resume("a")
    tools.settle(switch)
    assert tools.holds(cache, switch.planner.table("a"), 1.0)


def test_a_layout_needs_the_name_of_its_backend(cache: Any) -> None:
    with pytest.raises(ConfigError, match="name the backend"):
        KVSwitch(layout_of(cache), block_tokens=TOKENS)


# -- wrong calls ---------------------------------------------------------------------------------


def test_wrong_calls_are_named_and_change_nothing(tools: Any, make_switch: Any) -> None:
    switch = make_switch()
    switch.allocate("a", 20)
    switch.allocate("b", 20)
    with pytest.raises(UnknownSequence, match="'nobody'"):
        switch.preempt("nobody")
    with pytest.raises(InvalidTransition, match="nothing to resume"):
        switch.resume("a")
    with pytest.raises(OutOfBlocks, match="preempt a sequence"):
        switch.allocate("a", 33)
    with pytest.raises(InvalidTransition, match="exists already"):
        switch.fork("a", "b", 8)
    switch.preempt("a")
    with pytest.raises(InvalidTransition, match="preempted already"):
        switch.preempt("a")
    with pytest.raises(InvalidTransition, match="resume it before it can grow"):
        switch.allocate("a", 40)
    switch.free("a")
    with pytest.raises(UnknownSequence):
        switch.free("a")
    tools.settle(switch)
    assert switch.available_blocks() == 7


def test_who_finds_no_host_memory_is_recomputed_and_the_others_go_on(
    tools: Any, make_switch: Any, cache: Any
) -> None:
    switch = make_switch(host_blocks=3)
    tools.fill(cache, switch.allocate("important", 12), 7.0)
    switch.set_priority("important", 1)
    switch.allocate("a", 12)
    switch.step()
    switch.preempt("important")
    tools.settle(switch)
    with pytest.raises(HostMemoryExhausted, match="Recompute it, free what has ended"):
        switch.preempt("a")
    assert switch.planner.state("a") is RUNNING
    switch.discard("a")
    assert switch.resume("a").tokens == 0
    switch.allocate("a", 12)
    switch.resume("important")
    tools.settle(switch)
    assert tools.holds(cache, switch.planner.table("important"), 7.0)

"""The transfer engine when transfers are cancelled or fail, threads die, and it is closed."""

from __future__ import annotations

import gc
import mmap
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import TransferError
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import CpuBackend, Layout, Region, Ticket, TransferEngine, layout_of

OUT, IN = Direction
PATIENCE = 20.0
SHORT = 0.03  # seconds in which something that must not happen would probably happen

Until = Callable[[Callable[[], object]], None]


def blocks(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


# Cancelling


def test_a_cancelled_transfer_drops_what_has_not_been_dispatched(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue = world.backend.queues[OUT]
    world.backend.pause(OUT)
    ticket, other = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    until(lambda: len(queue.given) == 2)
    world.engine.cancel(ticket.id)
    world.engine.cancel(99)
    assert not ticket.done  # two windows are still in flight
    world.backend.resume()
    with pytest.raises(TransferError, match="0 was cancelled"):
        ticket.wait(PATIENCE)
    other.wait(PATIENCE)
    assert len(queue.moved) == 3
    assert ticket.ended > ticket.started > 0
    assert world.wrong() == []
    world.engine.cancel(ticket.id)  # ended: ignored


def test_a_transfer_that_has_not_begun_is_cancelled_whole_but_ends_in_its_turn(
    make_world: Any, chaos: Any
) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    first, second, third = (world.out([i], [i]) for i in range(3))
    world.engine.cancel(second.id)
    time.sleep(SHORT)
    # So that waiting for the newest transfer of some blocks is waiting for all of them.
    assert not second.done
    assert world.engine.conflicts(np.array([0, 1], np.int32)) == (1,)
    world.backend.resume()
    assert world.wrong() == []
    assert [first.error, third.error] == [None, None]
    assert "cancelled" in str(second.error)
    assert second.seconds == 0


def test_a_cancelled_transfer_waits_for_nothing(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    world.out([0], [0])
    second = world.back([0], [5])
    world.engine.cancel(second.id)
    with pytest.raises(TransferError, match="cancelled"):
        second.wait(PATIENCE)


def test_a_transfer_dispatched_whole_is_not_cancelled(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), window_bytes=10_000)
    world.backend.pause(OUT)
    ticket = world.out([0, 1], [0, 1])
    until(lambda: world.backend.queues[OUT].given)
    time.sleep(SHORT)
    world.engine.cancel(ticket.id)
    world.backend.resume()
    ticket.wait(PATIENCE)
    assert world.wrong() == []


# Failing


@pytest.mark.parametrize("window", [0, 1, 4])
def test_a_failing_window_fails_that_transfer_only(
    window: int, make_world: Any, chaos: Any
) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue = world.backend.queues[OUT]
    queue.fail(window, OSError("the link is down"))
    ticket, other = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    with pytest.raises(TransferError, match=r"transfer 0 failed.*the link is down") as failed:
        ticket.wait(PATIENCE)
    assert isinstance(failed.value.__cause__, OSError)
    other.wait(PATIENCE)
    assert len(queue.given) <= window + 3  # at most one more was in flight
    assert world.wrong() == []


def test_a_refused_window_fails_that_transfer_only(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.queues[OUT].refuse = [ValueError("no")]
    ticket, other = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    with pytest.raises(TransferError, match="no"):
        ticket.wait(PATIENCE)
    other.wait(PATIENCE)
    assert world.wrong() == []


def test_a_plan_that_cannot_be_made_fails_that_transfer_only(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()

    def lower(*_: object, **__: object) -> None:
        raise MemoryError("no room for the plan")

    with monkeypatch.context() as patch:
        patch.setattr("kvswitch.transfer.lane.lower", lower)
        ticket = world.out([0], [0])
        with pytest.raises(TransferError, match="no room for the plan"):
            ticket.wait(PATIENCE)
    world.out([1], [1]).wait(PATIENCE)
    assert world.wrong() == []


def test_memory_that_cannot_be_written_fails_the_transfer_on_the_cpu(make_world: Any) -> None:
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ) as nothing:
        address = np.frombuffer(nothing, np.uint8).ctypes.data
        device = np.zeros((8, 64), np.uint8)
        host = Layout((Region(address, 64, 64),), 64)
        with TransferEngine(CpuBackend(), layout_of(device), host) as broken:
            ticket = broken.submit(Transfer(0, OUT, np.array([[0, 9, 2], [4, 3, 1]], np.int32)))
            with pytest.raises(TransferError, match="Bad address"):
                ticket.wait(PATIENCE)


# Death


def assert_dead(world: Any, *tickets: Ticket) -> None:
    for ticket in tickets:
        with pytest.raises(TransferError, match=r"has died.*killed.*make a new one"):
            ticket.wait(PATIENCE)
    world.engine.wait([ticket.id for ticket in tickets], PATIENCE)
    world.engine.drain(PATIENCE)
    assert {t.id for t in tickets} <= {t.id for t in world.engine.poll()}
    world.engine.check_integrity()
    for direction in Direction:
        with pytest.raises(TransferError, match=r"has died.*killed"):
            world.engine.submit(Transfer(1000, direction, np.array([[9, 9, 1]], np.int32)))
    world.engine.cancel(tickets[0].id)
    assert world.engine.conflicts(np.array([0, 1, 2], np.int32)) == ()
    world.engine.close()
    world.engine.close()


def test_a_copying_thread_that_dies_is_told_to_everybody(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    world.backend.queues[OUT].fail(1, SystemExit("killed"))
    world.backend.pause(OUT)
    first, second = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    third = world.back([7], [8])  # of the other direction, waiting for the second
    world.backend.resume()
    assert_dead(world, first, second, third)


def test_a_dispatcher_that_dies_is_told_to_everybody(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    world.backend.queues[OUT].refuse = [KeyboardInterrupt("killed")]
    assert_dead(world, world.out([0], [0]), world.back([0], [1]), world.back([30], [20]))


def test_whoever_dies_first_the_other_direction_comes_to_rest_before_it_says_so(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), window_bytes=10_000)
    world.backend.pause(IN)
    moving = world.back([30, 31], [20, 21])
    until(lambda: world.backend.queues[IN].given)
    world.backend.queues[OUT].refuse = [SystemExit("killed")]
    dead = world.out([0], [0])
    with pytest.raises(TransferError, match="killed"):
        dead.wait(PATIENCE)
    time.sleep(SHORT)
    assert not moving.done
    world.backend.resume()
    moving.wait(PATIENCE)  # all its bytes have arrived
    assert_dead(world, dead)


def test_a_dying_dispatcher_awaits_what_it_has_dispatched(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue, gate = world.backend.queues[OUT], threading.Event()
    queue.refuse = [None, None, SystemExit("killed")]
    queue.before[1] = lambda: gate.wait(PATIENCE)
    ticket = world.out(blocks(0, 6), blocks(0, 6))
    until(lambda: not queue.refuse)
    time.sleep(SHORT)
    assert not ticket.done
    gate.set()
    assert_dead(world, ticket)
    assert len(queue.moved) == 2


def test_a_cpu_thread_that_dies_is_told_to_everybody(
    make_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world(CpuBackend())

    def move(*_: object, **__: object) -> None:
        raise SystemExit("killed")

    monkeypatch.setattr("kvswitch.transfer.pieces.Pieces.move", move)
    assert_dead(world, world.out([0], [0]))


def test_an_engine_whose_event_cannot_be_recorded_dies(make_world: Any, chaos: Any) -> None:
    # What is in flight could not be told any more.
    world = make_world(chaos(), window_bytes=10_000)
    queue = world.backend.queues[OUT]
    record, calls = queue.record, []

    def failing(*event: Any) -> Any:
        calls.append(event)
        if len(calls) == 2:
            raise ValueError("killed")
        return record(*event)

    queue.record = failing
    assert_dead(world, world.out([0], [0]))


# Closing


def test_closing_cancels_what_is_not_dispatched_and_awaits_the_rest(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue = world.backend.queues[OUT]
    world.backend.pause(OUT)
    tickets = [world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7]), world.back([0], [9])]
    until(lambda: len(queue.given) == 2)
    closing = threading.Thread(target=world.engine.close)
    closing.start()
    closing.join(SHORT)
    assert closing.is_alive()
    with pytest.raises(TransferError, match="is closed"):
        world.out([8], [8])
    world.backend.resume()
    closing.join(PATIENCE)
    assert not closing.is_alive()
    assert len(queue.moved) == 2
    for ticket in tickets:
        with pytest.raises(TransferError, match="cancelled"):
            ticket.wait(0)
    assert {t.id for t in world.engine.poll()} == {0, 1, 2}
    world.engine.check_integrity()
    world.engine.close()
    assert world.backend.closed >= 1


def test_an_engine_is_closed_by_its_context(chaos: Any) -> None:
    device, host = np.zeros((4, 8), np.uint8), np.zeros((4, 8), np.uint8)
    with TransferEngine(chaos(), layout_of(device), layout_of(host)) as moved:
        ticket = moved.submit(Transfer(0, OUT, np.array([[0, 0, 4]], np.int32)))
        moved.drain(PATIENCE)
    assert ticket.error is None
    with pytest.raises(TransferError, match="closed"):
        moved.submit(Transfer(1, OUT, np.array([[0, 0, 4]], np.int32)))


def test_a_closed_engine_is_forgotten(chaos: Any) -> None:
    layout = layout_of(np.zeros((4, 8), np.uint8))
    closed = TransferEngine(chaos(), layout, layout_of(np.zeros((4, 8), np.uint8)))
    closed.close()
    gone = weakref.ref(closed)
    del closed
    gc.collect()
    assert gone() is None


def test_an_engine_left_open_is_closed_when_the_program_ends() -> None:
    script = """
import atexit
import numpy as np
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import CpuBackend, TransferEngine, layout_of
atexit.register(lambda: print(ticket.done, ticket.error))  # runs after what is registered later
device, host = np.ones((2, 64, 1 << 16), np.uint8)
engine = TransferEngine(CpuBackend(bandwidth=2e6), layout_of(device), layout_of(host),
                        window_bytes=1 << 18)
ticket = engine.submit(Transfer(0, Direction.OUT, np.array([[0, 0, 64]], np.int32)))
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=240, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"True transfer 0 was cancelled\n", b"")

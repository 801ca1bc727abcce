"""The transfer engine, step by step, on a backend that does what the test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError, IntegrityError, TransferError
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import CpuBackend, TransferEngine, coalesce, lane, layout_of

OUT, IN = Direction
PATIENCE = 20.0
SHORT = 0.03  # seconds in which something that must not happen would probably happen

Until = Callable[[Callable[[], object]], None]


def blocks(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


# Tickets


def test_blocks_go_out_and_come_back(make_world: Any) -> None:
    world = make_world()
    out = world.out(blocks(0, 8), blocks(10, 8))
    back = world.back(blocks(10, 8), blocks(16, 8))
    out.wait(PATIENCE)
    back.wait(PATIENCE)
    assert world.wrong() == []


def test_a_ticket_tells_what_was_moved_in_how_many_copies(make_world: Any) -> None:
    world = make_world(regions=3, block_bytes=50, window_bytes=100)
    before = time.perf_counter()
    ticket = world.out([0, 1, 2, 5, 7, 6], [4, 5, 6, 7, 21, 20])
    ticket.wait(PATIENCE)
    after = time.perf_counter()
    assert (ticket.id, ticket.direction) == (0, OUT)
    assert (ticket.num_blocks, ticket.nbytes) == (6, 6 * 150)
    assert ticket.num_runs == 3  # 0-2, 5, 6-7
    assert ticket.num_copies == 9  # as many in each region, however windows cut them
    assert ticket.done
    assert ticket.error is None
    assert before <= ticket.started <= ticket.ended <= after
    assert ticket.seconds == ticket.ended - ticket.started
    assert "arrived" in repr(ticket)


def test_without_coalescing_every_block_of_every_region_is_a_copy(
    make_world: Any, chaos: Any
) -> None:
    world = make_world(chaos(coalesce=False), regions=3)
    ticket = world.out(blocks(0, 6), blocks(0, 6))
    ticket.wait(PATIENCE)
    assert (ticket.num_runs, ticket.num_copies) == (6, 18)


def test_an_empty_transfer_ends_in_its_turn(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    first, empty = world.out([0], [0]), world.out([], [])
    assert not empty.done
    world.backend.resume()
    empty.wait(PATIENCE)
    assert first.done
    assert (empty.num_blocks, empty.num_runs, empty.nbytes, empty.seconds) == (0, 0, 0, 0)
    assert world.wrong() == []


def test_ended_tickets_are_polled_once_and_in_order(make_world: Any) -> None:
    world = make_world()
    assert world.engine.poll() == []
    tickets = [world.out([i], [i]) for i in range(5)]
    world.engine.drain(PATIENCE)
    assert world.engine.poll() == tickets
    assert world.engine.poll() == []


def test_waiting_gives_up_in_time(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    ticket = world.out([0], [0])
    for give_up in (
        lambda: ticket.wait(SHORT),
        lambda: world.engine.wait([0], SHORT),
        lambda: world.engine.drain(SHORT),
    ):
        with pytest.raises(TimeoutError, match="0"):
            give_up()
    assert not ticket.done
    assert "under way" in repr(ticket)
    world.backend.resume()
    world.engine.wait([0, 99], PATIENCE)  # never submitted: nothing to wait for
    assert ticket.done


# Windows


def test_at_most_two_windows_are_in_flight(make_world: Any, chaos: Any, until: Until) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue = world.backend.queues[OUT]
    world.backend.pause(OUT)
    first, second = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    until(lambda: len(queue.given) == 2)
    time.sleep(SHORT)
    assert len(queue.given) == 2
    world.engine.check_integrity()
    world.backend.resume()
    first.wait(PATIENCE)
    second.wait(PATIENCE)
    assert sum(queue.moved) == 7 * 64
    assert max(queue.moved) <= 64


def test_the_next_transfer_is_dispatched_while_one_is_in_flight(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), regions=1, block_bytes=64, window_bytes=64)
    queue = world.backend.queues[OUT]
    # The last window of the first waits for the second, which may read the same block, too.
    queue.before[1] = lambda: until(lambda: len(queue.given) == 3)
    world.out([0, 1], [0, 1])
    world.out([1], [2])
    assert world.wrong() == []


# Order


def test_a_fence_is_waited_for_before_the_first_window(
    make_world: Any, chaos: Any, until: Until
) -> None:
    backend = chaos()
    world = make_world(backend, regions=1)
    stream = backend.stream()
    stream.go.clear()
    stream.run(lambda: world.device[0][3].fill(77))
    fence = backend.fence(stream)
    ticket = world.submit(OUT, [3], [3], fence=fence)
    until(lambda: backend.queues[OUT].waits == [fence])
    time.sleep(SHORT)
    assert not ticket.done
    stream.go.set()
    ticket.wait(PATIENCE)
    assert (world.host[0][3] == 77).all()


@pytest.mark.parametrize("direction", [OUT, IN])
@pytest.mark.parametrize("side", ["device", "host"])
def test_a_transfer_waits_for_the_other_direction_where_they_share_a_block(
    direction: Direction, side: str, make_world: Any, chaos: Any, until: Until
) -> None:
    # First one way, paused; then the other way, on one shared block (read-after-write,
    # write-after-read) and on none.
    world = make_world(chaos())
    other = IN if direction is OUT else OUT
    device, host = (4, 30) if side == "device" else (20, 4)
    world.backend.pause(direction)
    src, dst = (blocks(0, 6), blocks(0, 6))
    first = world.submit(direction, src, dst)
    pair = ([device], [host]) if other is OUT else ([host], [device])
    second = world.submit(other, *pair)
    third = world.submit(other, *([23], [39]) if other is OUT else ([39], [23]))
    queue = world.backend.queues[other]
    time.sleep(SHORT)
    assert queue.given == []  # the third waits behind the second: one direction keeps its order
    assert not second.done
    assert not third.done
    world.backend.resume()
    assert world.wrong() == []
    assert first.ended <= second.started <= second.ended <= third.started


def test_what_shares_no_block_passes(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    first = world.out(blocks(0, 6), blocks(0, 6))
    world.back([39, 38, 6], [23, 22, 21]).wait(PATIENCE)
    assert not first.done
    world.backend.resume()
    assert world.wrong() == []


def test_a_transfer_waits_for_those_it_names(make_world: Any, chaos: Any, until: Until) -> None:
    world = make_world(chaos())
    world.backend.pause(OUT)
    first = world.out([0], [0])
    second = world.submit(IN, [30], [20], after=(first.id,))
    third = world.submit(OUT, [1], [1], after=(first.id,))  # the same direction: in order anyway
    time.sleep(SHORT)
    assert world.backend.queues[IN].given == []
    world.backend.resume()
    second.wait(PATIENCE)
    third.wait(PATIENCE)
    assert first.ended <= second.started


def test_a_transfer_goes_on_when_one_it_waits_for_has_failed(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    world.backend.queues[OUT].fail(0, OSError("broken"))
    first = world.out([0], [0])
    second = world.submit(IN, [30], [20], after=(first.id,))
    second.wait(PATIENCE)
    assert first.error is not None
    world.submit(IN, [31], [21], after=(first.id, second.id)).wait(PATIENCE)  # ended long ago


def test_conflicts_names_the_newest_transfer_of_each_direction(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    for direction in Direction:
        world.backend.pause(direction)
    world.out(blocks(0, 4), blocks(0, 4))
    world.out(blocks(2, 4), blocks(4, 4))
    world.back(blocks(20, 4), blocks(3, 4))

    def conflicts(*ids: int) -> tuple[int, ...]:
        found = world.engine.conflicts(np.array(ids, np.int32))
        assert isinstance(found, tuple)
        return found

    assert conflicts(0) == (0,)
    assert conflicts(0, 2) == (1,)
    assert conflicts(3) == (1, 2)
    assert conflicts(6) == (2,)
    assert conflicts(7, 23) == ()
    assert conflicts() == ()
    for wrong in (-1, 24):
        with pytest.raises(TransferError, match="numbered 0 to 23"):
            conflicts(wrong)
    world.backend.resume()
    world.engine.wait(conflicts(3), PATIENCE)
    world.backend.pause(OUT)
    world.out([10], [10])
    assert conflicts(0, 3, 6) == ()  # those have ended
    assert conflicts(0, 3, 6, 10) == (3,)
    world.backend.resume()


# Compute that comes after transfers on the device


def test_a_stream_comes_after_the_transfers_it_is_held_for(
    make_world: Any, chaos: Any, until: Until
) -> None:
    backend = chaos(has_streams=True)
    world = make_world(backend, regions=1)
    stream = backend.stream()
    for direction in Direction:
        backend.pause(direction)
    ended = world.out([], [])
    ended.wait(PATIENCE)
    leaving, other = world.out([3], [3]), world.out([4], [4])
    arriving = world.back([30], [20])
    assert world.engine.hold([ended.id, leaving.id, arriving.id, 99], stream) == {1, 3}
    assert not leaving.done
    stream.run(lambda: world.device[0][3].fill(77))  # what the next forward writes
    backend.resume()
    other.wait(PATIENCE)
    assert (world.host[0][3] != 77).all()
    assert stream.record().wait(PATIENCE)
    assert (world.device[0][3] == 77).all()
    arriving.wait(PATIENCE)


def test_a_stream_is_held_only_when_all_has_been_dispatched(
    make_world: Any, chaos: Any, until: Until
) -> None:
    # A wait for an event that is not recorded yet would not wait.
    backend = chaos(has_streams=True)
    world = make_world(backend, regions=1, block_bytes=64, window_bytes=64)
    stream = backend.stream()
    backend.pause(OUT)
    ticket = world.out(blocks(0, 6), blocks(0, 6))
    held: list[frozenset[int]] = []
    thread = threading.Thread(target=lambda: held.append(world.engine.hold([ticket.id], stream)))
    thread.start()
    until(lambda: len(backend.queues[OUT].given) == 2)
    thread.join(SHORT)
    assert thread.is_alive()
    backend.resume()
    thread.join(PATIENCE)
    assert held[0] <= {ticket.id}
    assert ticket.done or stream.waits


def test_holding_for_transfers_that_fail_or_are_cancelled_ends(
    make_world: Any, chaos: Any, until: Until
) -> None:
    backend = chaos(has_streams=True)
    world = make_world(backend, regions=1, block_bytes=64, window_bytes=64)
    backend.pause(OUT)
    first, second = world.out(blocks(0, 6), blocks(0, 6)), world.out([7], [7])
    until(lambda: len(backend.queues[OUT].given) == 2)
    for ticket in (first, second):
        world.engine.cancel(ticket.id)
    backend.resume()
    assert world.engine.hold([first.id, second.id], backend.stream()) == frozenset()
    assert first.done
    assert second.done


def test_without_streams_holding_is_waiting(make_world: Any) -> None:
    world = make_world(CpuBackend())
    ticket = world.out([3], [3])
    assert world.engine.hold([ticket.id]) == frozenset()
    assert ticket.done


def test_windows_are_given_in_spans_to_queues_that_pace_themselves(
    make_world: Any, chaos: Any, until: Until
) -> None:
    backend = chaos()
    backend.span_bytes = 3 * 64 + 10
    world = make_world(backend, regions=1, block_bytes=64, window_bytes=64)
    backend.pause(OUT)
    world.out(blocks(0, 8), blocks(0, 8))
    until(lambda: len(backend.queues[OUT].given) == 2)
    time.sleep(SHORT)
    queue = backend.queues[OUT]
    assert len(queue.given) == 2
    assert all(2 * 64 < given <= 3 * 64 for given in queue.given)  # three windows each
    backend.resume()
    assert world.wrong() == []
    assert sum(queue.moved) == 8 * 64


def test_a_transfer_is_dispatched_behind_a_long_span_not_after_it(
    make_world: Any, chaos: Any, until: Until
) -> None:
    backend = chaos(has_streams=True)
    backend.span_bytes = 1 << 20
    world = make_world(backend)
    backend.pause(OUT)
    first = world.out(blocks(0, 6), blocks(0, 6))
    until(lambda: len(backend.queues[OUT].given) == 1)
    time.sleep(SHORT)  # the dispatcher waits for the first one
    second = world.out([9], [9])
    until(lambda: len(backend.queues[OUT].given) == 2)
    assert world.engine.hold([second.id], backend.stream()) == {second.id}
    assert not first.done
    backend.resume()
    assert world.wrong() == []


# Bad input


@pytest.mark.parametrize(
    ("transfer", "reason"),
    [
        ((1, OUT, [[0, 0, 1]]), "must increase: 1 comes after 3"),
        ((3, OUT, [[0, 0, 1]]), "must increase"),
        ((-1, OUT, [[0, 0, 1]]), "start at 0"),
        ((4, OUT, [[0, 0, 1]], (4,)), "lower ids only"),
        ((4, OUT, [[0, 0, 1]], (1, 9)), "lower ids only"),
        ((4, OUT, [[24, 0, 1]]), "source block 24 does not exist"),
        ((4, IN, [[0, 24, 1]]), "destination block 24 does not exist"),
        ((4, IN, [[39, 0, 2]]), "source block 40 does not exist"),
        ((4, OUT, [[0, 0, 0]]), "at least one block"),
    ],
)
def test_transfers_that_make_no_sense_are_refused_and_change_nothing(
    transfer: tuple[Any, ...], reason: str, make_world: Any
) -> None:
    world = make_world()
    world.engine.submit(Transfer(3, OUT, np.array([[5, 5, 1]], np.int32))).wait(PATIENCE)
    number, direction, runs, *after = transfer
    with pytest.raises(TransferError, match=reason):
        world.engine.submit(Transfer(number, direction, np.array(runs, np.int32), *after))
    world.engine.check_integrity()
    assert world.engine.conflicts(np.arange(24, dtype=np.int32)) == ()
    world.engine.submit(Transfer(4, OUT, np.array([[0, 0, 1]], np.int32))).wait(PATIENCE)


def test_layouts_of_different_blocks_are_refused(chaos: Any) -> None:
    one, other = layout_of(np.zeros((4, 8), np.uint8)), layout_of(np.zeros((4, 9), np.uint8))
    with pytest.raises(ConfigError, match="same bytes per block"):
        TransferEngine(chaos(), one, other)


def test_windows_hold_something(chaos: Any) -> None:
    one, other = layout_of(np.zeros((4, 8), np.uint8)), layout_of(np.zeros((4, 8), np.uint8))
    with pytest.raises(ConfigError, match="window_bytes"):
        TransferEngine(chaos(), one, other, window_bytes=0)


def test_integrity_is_checked(make_world: Any, chaos: Any) -> None:
    world = make_world(chaos())
    lane = world.engine._lanes[0]
    lane.newest[0][3] = 99
    with pytest.raises(IntegrityError, match="unknown job"):
        world.engine.check_integrity()
    lane.newest[0][3] = 0
    world.engine._ledger.under_way[5] = None
    with pytest.raises(IntegrityError, match="tickets"):
        world.engine.check_integrity()
    del world.engine._ledger.under_way[5]
    lane._spans = 3
    with pytest.raises(IntegrityError, match="spans in flight"):
        world.engine.check_integrity()
    lane._spans = 0


# Beside a busy thread


def test_a_main_thread_that_never_rests_slows_transfers_but_stops_none() -> None:
    nbytes = 8 << 20
    device = np.random.default_rng(0).integers(0, 256, (512, nbytes // 512), np.uint8)
    host = np.full_like(device, 0xFF)
    ids = np.random.default_rng(1).permutation(512).astype(np.int32)
    everything = np.arange(512, dtype=np.int32)
    with TransferEngine(
        CpuBackend(), layout_of(device), layout_of(host), window_bytes=1 << 20
    ) as busy:
        for number, (src, dst) in enumerate([(everything, ids), (ids, everything)]):
            ticket = busy.submit(Transfer(number, Direction(number), coalesce(src, dst)))
            end, spins = time.monotonic() + PATIENCE, 0
            while not ticket.done and time.monotonic() < end:
                spins += 1
            assert ticket.error is None
            assert ticket.done
            assert spins > 0
            if number == 0:
                assert (host[ids] == device).all()
                device[:] = 0xFF
        assert (host[ids] == device).all()


def test_index_of_blocks_is_right_for_any_runs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        count = rng.integers(1, rng.integers(2, 6), rng.integers(1, 10))
        first = rng.integers(0, 100, (2, len(count)))
        runs = np.stack([*first, count], axis=1).astype(np.int32)
        for side, index in enumerate(lane._blocks(runs, int(count.sum()))):
            expected = [b + i for b, n in zip(first[side], count, strict=True) for i in range(n)]
            assert np.arange(200)[index].tolist() == expected


# Regions one by one


def test_regions_can_be_waited_for_while_others_are_under_way(
    make_world: Any, chaos: Any, until: Until
) -> None:
    world = make_world(chaos(), regions=4, block_bytes=64, window_bytes=256)
    world.out(blocks(0, 4), blocks(0, 4)).wait(PATIENCE)
    queue = world.backend.queues[IN]
    second = threading.Event()
    queue.before[3] = lambda: second.wait(PATIENCE)  # amidst the third region
    ticket = world.back(blocks(0, 4), blocks(8, 4))
    world.engine.wait_regions([ticket.id], 2)
    assert not ticket.done
    assert 2 * 4 * 64 <= ticket.arrived < 3 * 4 * 64
    late = threading.Thread(target=world.engine.wait_regions, args=([ticket.id], 3))
    late.start()
    late.join(SHORT)
    assert late.is_alive()
    second.set()
    late.join(PATIENCE)
    assert not late.is_alive()
    ticket.wait(PATIENCE)
    assert ticket.arrived == ticket.nbytes
    assert world.wrong() == []


def test_regions_of_a_transfer_that_fails_are_waited_for_until_it_has_ended(
    make_world: Any, chaos: Any
) -> None:
    world = make_world(chaos(), regions=2, block_bytes=64, window_bytes=256)
    world.backend.queues[IN].fail(0, ValueError("link down"))
    ticket = world.back(blocks(0, 4), blocks(8, 4))
    world.engine.wait_regions([ticket.id], 2)
    assert ticket.done
    assert ticket.error is not None


def test_unknown_regions_are_not_waited_for(make_world: Any) -> None:
    world = make_world()
    world.engine.wait_regions([7], 2)

"""Transfers in every order that two queues allow: all bytes against doing one after the other."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from kvswitch.errors import TransferError
from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import CpuBackend, TransferEngine, coalesce, layout_of
from kvswitch.transfer.lane import Lane

OUT, IN = Direction
PATIENCE = 20.0


def some_pairs(world: Any, direction: Direction, rng: random.Random) -> tuple[list[int], list[int]]:
    """Distinct source and destination blocks, partly contiguous."""
    n = rng.randint(1, 8)
    sides = []
    for blocks in (world.device_blocks, world.host_blocks):
        if rng.random() < 0.5:
            first = rng.randrange(blocks - n)
            sides.append(list(range(first, first + n)))
        else:
            sides.append(rng.sample(range(blocks), n))
    device, host = sides
    return (device, host) if direction is OUT else (host, device)


def stir(world: Any, seed: int, steps: int, *, compute: bool = True, faults: bool = True) -> None:
    """Do `steps` random things."""
    rng = random.Random(seed)
    for _ in range(steps):
        direction = Direction(rng.randrange(2))
        what = rng.random()
        if what < 0.6 or not (compute or faults):
            after = tuple(rng.sample(sorted(world.tickets), min(len(world.tickets), 2)))
            pairs = some_pairs(world, direction, rng)
            world.submit(direction, *pairs, after=after if rng.random() < 0.2 else ())
        elif what < 0.75 and compute:
            world.backend.resume()
            world.write(rng.randrange(world.device_blocks))
        elif what < 0.85 and faults:
            world.engine.cancel(rng.randrange(len(world.tickets) + 1))
        elif what < 0.9 and faults:
            queue = world.backend.queues[direction]
            queue.fail(len(queue.given) + rng.randrange(3), OSError("broken"))
        elif what < 0.95:
            world.backend.pause(direction)
        else:
            world.backend.resume()
    world.backend.resume()


@pytest.mark.parametrize("seed", range(12))
def test_bytes_are_right_whatever_the_queues_do(seed: int, make_world: Any, chaos: Any) -> None:
    world = make_world(chaos(seed))
    stir(world, seed, 150)
    assert world.wrong() == []
    ended = world.engine.poll()
    assert sorted(ticket.id for ticket in ended) == sorted(world.tickets)
    for direction in Direction:
        ids = [ticket.id for ticket in ended if ticket.direction is direction]
        assert ids == sorted(ids)  # a direction ends in order


def test_bytes_are_right_on_the_cpu_backend(make_world: Any) -> None:
    rng = random.Random(0)
    world = make_world(CpuBackend(), block_bytes=3000, window_bytes=10_000)
    for i in range(400):
        direction = Direction(rng.randrange(2))
        world.submit(direction, *some_pairs(world, direction, rng))
        if i % 3 == 0:
            world.write(rng.randrange(world.device_blocks))
        if i % 7 == 0:
            world.engine.cancel(i - rng.randrange(5))
    assert world.wrong() == []


# Negative controls: what must be caught if the engine did not look for conflicts


def test_control_transfers_that_ignore_conflicts_spoil_bytes(
    make_world: Any, chaos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lane, "conflict", lambda *_: 0)

    def spoilt(seed: int) -> bool:
        world = make_world(chaos(seed))
        stir(world, seed, 60, compute=False, faults=False)
        return bool(world.wrong())

    assert any(spoilt(seed) for seed in range(10))


def test_control_compute_that_ignores_conflicts_spoils_bytes(
    make_world: Any, chaos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransferEngine, "conflicts", lambda *_: ())

    def spoilt(seed: int) -> bool:
        world = make_world(chaos(seed))
        stir(world, seed, 60, faults=False)
        return bool(world.wrong())

    assert any(spoilt(seed) for seed in range(10))


@pytest.mark.parametrize("ignored", [False, True])
def test_control_a_block_is_not_read_back_before_it_has_been_written(
    ignored: bool, make_world: Any, chaos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ignored:
        monkeypatch.setattr(Lane, "conflict", lambda *_: 0)
    world = make_world(chaos())
    world.backend.pause(OUT)
    world.out([0], [0])
    back = world.back([0], [5])
    if ignored:
        back.wait(PATIENCE)
    world.backend.resume()
    assert bool(world.wrong()) == ignored


# The same, with steps that hypothesis picks and shrinks


def test_any_sequence_of_steps_leaves_the_right_bytes(make_world: Any, chaos: Any) -> None:
    directions = st.sampled_from(Direction)

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.world = make_world(chaos(), regions=1, block_bytes=24, window_bytes=48)

        @rule(direction=directions, seed=st.integers(0, 999))
        def submit(self, direction: Direction, seed: int) -> None:
            pairs = some_pairs(self.world, direction, random.Random(seed))
            self.world.submit(direction, *pairs)

        @rule(block=st.integers(0, 23))
        def compute(self, block: int) -> None:
            self.world.backend.resume()
            self.world.write(block)

        @rule(back=st.integers(0, 5))
        def cancel(self, back: int) -> None:
            self.world.engine.cancel(len(self.world.tickets) - 1 - back)

        @rule(direction=directions)
        def pause(self, direction: Direction) -> None:
            self.world.backend.pause(direction)

        @rule(direction=directions, ahead=st.integers(0, 2))
        def fail(self, direction: Direction, ahead: int) -> None:
            queue = self.world.backend.queues[direction]
            queue.fail(len(queue.given) + ahead, OSError("broken"))

        @rule(direction=directions)
        def refuse(self, direction: Direction) -> None:
            self.world.backend.queues[direction].refuse.append(OSError("refused"))

        @rule()
        def drain(self) -> None:
            self.world.backend.resume()
            assert self.world.wrong() == []

        @invariant()
        def bookkeeping_is_sound(self) -> None:
            self.world.engine.check_integrity()

        def teardown(self) -> None:
            self.drain()
            self.world.close()

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


# Races


@pytest.mark.parametrize("seed", range(6))
def test_closing_at_any_moment_ends_every_ticket(seed: int, make_world: Any, chaos: Any) -> None:
    world = make_world(chaos(seed))
    rng = random.Random(seed)
    steps = rng.randrange(1, 40)
    stir(world, seed, steps, compute=False)
    closers = [threading.Thread(target=world.engine.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
        assert not closer.is_alive()
    assert world.wrong() == []
    assert len(world.engine.poll()) == len(world.tickets)


@pytest.mark.parametrize("seed", range(4))
def test_submitting_and_cancelling_race_with_closing(seed: int, chaos: Any) -> None:
    device, host = (np.zeros((8, 64), np.uint8) for _ in range(2))
    engine = TransferEngine(chaos(seed), layout_of(device), layout_of(host), window_bytes=64)
    tickets, refused = [], threading.Event()
    ids = np.arange(8, dtype=np.int32)

    def submit() -> None:
        for number in range(100_000):
            try:
                transfer = Transfer(number, Direction(number % 2), coalesce(ids, ids))
                tickets.append(engine.submit(transfer))
            except TransferError:
                refused.set()
                return

    def cancel() -> None:
        rng = random.Random(seed)
        while not refused.is_set():
            engine.cancel(rng.randrange(len(tickets) + 1))
            engine.check_integrity()
            refused.wait(0.0002)

    threads = [threading.Thread(target=work) for work in (submit, cancel)]
    for thread in threads:
        thread.start()
    refused.wait(0.02 + 0.02 * seed)
    while not tickets:
        time.sleep(0.001)
    engine.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert refused.is_set()
    assert all(ticket.done for ticket in tickets)
    assert engine.poll() != []
    engine.check_integrity()

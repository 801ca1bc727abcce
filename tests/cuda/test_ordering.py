"""Compute and transfers on a CUDA device: every byte against doing one thing after the other.

"Compute" is a copy on the engine's own stream, from a place on the host that holds new values. What
keeps the order is the fence of each transfer and `TransferEngine.hold`; leaving out any of it is
found out, at least above the fake driver, which is late on purpose.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import Layout, Region, TransferEngine, coalesce

OUT, IN = Direction
PATIENCE = 30.0
DEVICE_BLOCKS, HOST_BLOCKS, REGIONS, BLOCK = 16, 24, 3, 512

PLACES = [pytest.param("fake_cuda", id="fake"), pytest.param("real_cuda", marks=pytest.mark.gpu)]
SETTINGS: dict[str, dict[str, Any]] = {
    "batch": {"copies": "batch"},
    "batch paced by the host": {"copies": "batch", "pacing": "host"},
    "loop": {"copies": "loop"},
    "kernel": {"copies": "kernel"},
    "not coalesced": {"copies": "batch", "coalesce": False},
}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


class World:
    """Blocks on a device and on the host, and what their values should be."""

    def __init__(self, place: Any, settings: dict[str, Any], window_bytes: int = 4096) -> None:
        from kvswitch_cuda import CudaBackend

        self.backend = CudaBackend(0, **settings)
        self.context = self.backend.context
        self.stream = self.context.open_stream()
        self._device = place.device(REGIONS * DEVICE_BLOCKS * BLOCK)
        self._host = place.host(REGIONS * HOST_BLOCKS * BLOCK)
        self._fresh = place.host(4096 * BLOCK)
        self._layouts = [
            Layout(
                tuple(Region(m.address + i * n * BLOCK, BLOCK, BLOCK) for i in range(REGIONS)), n
            )
            for m, n in ((self._device, DEVICE_BLOCKS), (self._host, HOST_BLOCKS))
        ]
        self.engine = TransferEngine(self.backend, *self._layouts, window_bytes=window_bytes)
        self.device, self.host = [0] * DEVICE_BLOCKS, [0] * HOST_BLOCKS
        self._values = 0
        self.number = 0
        self.hold: Callable[..., Any] = self.engine.hold
        self.fence: Callable[[], Any] = lambda: self.backend.fence(self.stream)

    def compute(self, block: int) -> None:
        """Give the stream something that writes a block."""
        touching = self.engine.conflicts(np.array([block], np.int32))
        self.hold(touching, self.stream)
        self._values += 1
        self._fresh.write(np.full(BLOCK, self._values % 251), self._values * BLOCK)
        source = self._fresh.address + self._values * BLOCK
        with self.context as context:
            for region in self._layouts[0].regions:
                target = region.address + block * region.stride
                assert context.driver.copy(target, source, BLOCK, self.stream) == 0
        self.device[block] = self._values % 251

    def submit(self, direction: Direction, src: list[int], dst: list[int]) -> None:
        runs = coalesce(np.array(src, np.int32), np.array(dst, np.int32))
        self.engine.submit(Transfer(self.number, direction, runs), fence=self.fence())
        self.number += 1
        here, there = (self.device, self.host) if direction is OUT else (self.host, self.device)
        for values, block in [(here[a], b) for a, b in zip(src, dst, strict=True)]:
            there[block] = values

    def wrong(self) -> list[str]:
        self.engine.drain(PATIENCE)
        with self.context as context:
            context.driver("cuStreamSynchronize", context.driver.api.CUstream(self.stream))
        assert all(t.error is None for t in self.engine.poll())
        self.engine.check_integrity()
        return [
            f"{name} block {block}, region {i}: {found[i, block].tolist()[:4]} is not {value}"
            for name, memory, values in (
                ("device", self._device, self.device),
                ("host", self._host, self.host),
            )
            for found in [memory.read().reshape(REGIONS, -1, BLOCK)]
            for block, value in enumerate(values)
            for i in range(REGIONS)
            if (found[i, block] != value).any()
        ]

    def stir(self, seed: int, steps: int) -> None:
        rng = random.Random(seed)
        for _ in range(steps):
            if rng.random() < 0.4:
                self.compute(rng.randrange(DEVICE_BLOCKS))
            else:
                n = rng.randint(1, 8)
                device, host = (rng.sample(range(m), n) for m in (DEVICE_BLOCKS, HOST_BLOCKS))
                if rng.random() < 0.5:
                    first = rng.randrange(DEVICE_BLOCKS - n)
                    device = list(range(first, first + n))
                    host = list(range(first + 3, first + 3 + n))
                direction = Direction(rng.randrange(2))
                self.submit(direction, *((device, host) if direction is OUT else (host, device)))

    def close(self) -> None:
        del self.hold, self.fence  # and the events that tests have put there
        self.context.close_stream(self.stream)
        self.engine.close()


@pytest.fixture
def make_world(place: Any) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**settings: Any) -> World:
        made.append(World(place, settings))
        return made[-1]

    yield make
    for world in made:
        world.close()
    made.clear()


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_one_thing_after_the_other(
    name: str, seed: int, make_world: Callable[..., World]
) -> None:
    world = make_world(**SETTINGS[name])
    world.stir(seed, 150)
    assert world.wrong() == []


def first_found(make_world: Callable[..., World], spoil: Callable[[World], None]) -> list[str]:
    """What goes wrong when something is left out, in the first of some runs where it does."""
    for seed in range(10):
        world = make_world(copies="batch")
        spoil(world)
        world.stir(seed, 150)
        if wrong := world.wrong():
            return wrong
    return []


@pytest.mark.parametrize("place", PLACES[:1], indirect=True)
class TestWhatIsLeftOutIsFoundOut:
    """Negative controls: above the fake driver, so that they do not depend on luck."""

    def test_the_stream_is_not_held(self, make_world: Callable[..., World]) -> None:
        def spoil(world: World) -> None:
            world.hold = lambda ids, stream: None

        assert first_found(make_world, spoil)

    def test_transfers_have_no_fence(self, make_world: Callable[..., World]) -> None:
        def spoil(world: World) -> None:
            world.fence = lambda: None

        assert first_found(make_world, spoil)

    def test_sources_are_read_in_any_order(self, make_world: Callable[..., World]) -> None:
        def spoil(world: World) -> None:
            for queue in world.backend._queues:
                queue._attributes[0] = 3  # CU_MEMCPY_SRC_ACCESS_ORDER_ANY

        assert first_found(make_world, spoil)

    def test_a_stream_is_held_for_an_event_that_is_not_recorded(
        self, make_world: Callable[..., World]
    ) -> None:
        def spoil(world: World) -> None:
            event = world.backend.event()
            world.hold = lambda ids, stream: world.backend.hold(stream, event)

        assert first_found(make_world, spoil)

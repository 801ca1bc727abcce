"""KVSwitch with real bytes, on a link that pauses, delays, fails and is told to cancel.

An engine of random decisions writes a value never used before into every token it computes. Blocks
that are free are poisoned, on the device and on the host. Whatever is said to be valid is compared,
byte for byte.
"""

from __future__ import annotations

import gc
import random
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvswitch import HostMemoryExhausted, KVSwitch, OutOfBlocks, SequenceState
from kvswitch.messages import BlockIds, Direction
from kvswitch.switch.traffic import Traffic

RUNNING, LEAVING, HOST, ARRIVING, IDLE = SequenceState
BLOCKS, TOKENS, WIDTH = 24, 4, 32
SEQUENCES = 9


class WrongBytes(AssertionError):  # noqa: N818 - says what is the matter
    """What a sequence should have is not there."""


class Soak:
    """A custom engine without a plan.

    `text` is what each sequence consists of, one value a token, and `computed` how much of that is
    on the device, or will be. What is recomputed has the value that it had.
    """

    def __init__(
        self, tools: Any, seed: int, *, trouble: float = 0.05, host_blocks: int = 0
    ) -> None:
        self.rng = random.Random(seed)
        self.cache = [np.full((BLOCKS, TOKENS, WIDTH), np.nan) for _ in range(2)]
        block_bytes = 2 * TOKENS * WIDTH * 8
        host_blocks = host_blocks or self.rng.choice([8, 30, 200])
        self.backend = tools.UnrulyBackend(seed, trouble)
        self.switch = KVSwitch(
            self.cache,
            {
                "host_memory": host_blocks * block_bytes,
                "strategy": self.rng.choice(["adaptive", "async", "sync", "serial"]),
                "reuse": self.rng.random() < 0.9,
                "first_group": 3,
                "window": 4096,
            },
            block_tokens=TOKENS,
            backend=self.backend,
        )
        engine = self.switch._shut.peek()[2][0]  # type: ignore[index]
        host = engine.arena.view().view(np.float64)
        self.host = host.reshape(2, host_blocks, TOKENS * WIDTH)
        self.text: dict[int, list[float]] = {}
        self.computed: dict[int, int] = {}
        self.next_value = 1.0
        self.next_id = 0

    @property
    def switches(self) -> int:
        stats = self.switch.planner.stats()
        return stats.preemptions + stats.resumptions

    # -- decisions -------------------------------------------------------------------------------

    def pick(self, *states: SequenceState) -> int | None:
        found = [s for s in self.text if not states or self.switch.planner.state(s) in states]
        return self.rng.choice(found) if found else None

    def decide(self) -> None:
        switch, rng = self.switch, self.rng
        verb = rng.choices(
            ["new", "grow", "preempt", "resume", "end_turn", "rare"], [2, 4, 6, 7, 2, 1]
        )[0]
        if verb == "new" and len(self.text) < SEQUENCES:
            self.allocate(self.next_id, rng.randrange(40))
            self.next_id += 1
        elif verb == "grow" and (s := self.pick(RUNNING)) is not None:
            self.allocate(s, self.computed[s] + rng.randrange(12))
        elif verb == "preempt" and (s := self.pick(RUNNING, ARRIVING, IDLE)) is not None:
            try:
                switch.preempt(s, self.computed[s])
            except HostMemoryExhausted:
                switch.discard(s, self.computed[s])
        elif verb == "resume" and (s := self.pick(LEAVING, HOST, IDLE)) is not None:
            accepted = max(0, self.computed[s] - rng.choice([0, 0, 0, 2]))
            try:
                back = switch.resume(s, accepted)
            except OutOfBlocks:
                return
            if accepted < self.computed[s]:
                self.roll_back(s, accepted)
            self.computed[s] = back.tokens
            if back.ticket is None:
                self.compare(s)
            elif rng.random() < 0.1:
                self.backend.go_on()
                back.ticket.wait()
                assert back.ticket.done
        elif verb == "end_turn" and (s := self.pick(RUNNING, ARRIVING)) is not None:
            switch.end_turn(s, self.computed[s])
            self.roll_back(s, switch.planner.tokens(s))
        elif verb == "rare" and (s := self.pick()) is not None:
            self.rarely(s)

    def rarely(self, s: int) -> None:
        what = self.rng.choice(["free", "truncate", "fork", "priority"])
        if what == "free":
            self.switch.free(s)
            del self.text[s], self.computed[s]
        elif what == "truncate":
            kept = self.switch.truncate(s, int(self.computed[s] * self.rng.random()))
            self.roll_back(s, kept)
        elif what == "priority":
            self.switch.set_priority(s, self.rng.randrange(4))
        elif self.switch.planner.state(s) in (RUNNING, IDLE) and len(self.text) < SEQUENCES:
            kept = self.switch.fork(s, self.next_id, self.computed[s])
            self.text[self.next_id] = self.text[s][:kept]
            self.computed[self.next_id] = kept
            self.next_id += 1

    def allocate(self, s: int, tokens: int) -> None:
        try:
            self.switch.allocate(s, tokens)
        except OutOfBlocks:
            return
        self.text.setdefault(s, [])
        self.computed.setdefault(s, 0)

    def roll_back(self, s: int, tokens: int) -> None:
        """From here on the text will be another."""
        del self.text[s][tokens:]
        self.computed[s] = tokens

    # -- the iteration ---------------------------------------------------------------------------

    def iterate(self) -> None:
        for _ in range(self.rng.randrange(5)):
            self.decide()
        self.backend.go_on()
        ready = self.switch.step()
        if self.rng.random() < 0.3:
            self.backend.pause(self.rng.choice(list(Direction)))
        for s, tokens in ready.landed.items():
            assert isinstance(s, int)
            self.computed[s] = tokens
        running = [s for s in self.text if self.switch.planner.state(s) is RUNNING]
        assert not ready.arriving.keys() & set(running)
        for s in running:
            self.compare(s)
            if self.rng.random() < 0.7:
                self.compute(s)
        self.poison()

    def compute(self, s: int) -> None:
        done, tokens = self.computed[s], self.switch.planner.tokens(s)
        while len(self.text[s]) < tokens:
            self.next_value += 1
            self.text[s].append(self.next_value)
        new = np.array(self.text[s][done:tokens])
        places = np.arange(done, tokens)
        blocks = self.switch.planner.table(s)[places // TOKENS]
        self.cache[0][blocks, places % TOKENS] = new[:, None]
        self.cache[1][blocks, places % TOKENS] = -new[:, None]
        self.computed[s] = tokens

    def compare(self, s: int) -> None:
        tokens = self.computed[s]
        table = self.switch.planner.table(s)[: -(-tokens // TOKENS)]
        should = np.array(self.text[s][:tokens])[:, None]
        for sign, cache in zip((1, -1), self.cache, strict=True):
            found = cache[table].reshape(-1, WIDTH)[:tokens]
            if not (found == sign * should).all():
                raise WrongBytes(f"sequence {s}: {found[:, 0]} instead of {sign * should[:, 0]}")

    def poison(self) -> None:
        planner = self.switch.planner
        free = planner.device.references(np.arange(BLOCKS, dtype=np.int32)) == 0
        for cache in self.cache:
            cache[free] = np.nan
        hosts = np.arange(self.host.shape[1], dtype=np.int32)
        lost = planner.copies.pool.references(hosts) == 0
        self.host[:, lost & ~planner.copies._keys.named(hosts)] = np.nan

    # -- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        for s in list(self.text):
            self.switch.free(s)
        self.text.clear()
        self.computed.clear()
        self.backend.go_on()
        while self.switch.planner.under_way:
            self.switch.step()
        self.check_nothing_is_held()

    def check_nothing_is_held(self) -> None:
        planner = self.switch.planner
        assert planner.copies.num_leases() == len(planner.copies) == 0
        assert planner.device.free_blocks == BLOCKS
        assert planner.copies.pool.free_blocks == self.host.shape[1]
        self.switch.check_integrity()

    def close(self) -> None:
        self.backend.go_on()
        self.switch.close()


def soak(tools: Any, seed: int, switches: int) -> Soak:
    run = Soak(tools, seed)
    try:
        while run.switches < switches:
            run.iterate()
            run.switch.check_integrity()
        run.finish()
    finally:
        run.close()
    return run


def test_two_thousand_switches(tools: Any) -> None:
    stats = [soak(tools, seed, 250).switch.stats() for seed in range(12)]
    for name in (
        *("take_backs", "conflicts", "evictions", "idle_copies", "transfers_failed"),
        *("contaminated_blocks", "blocks_spared", "tokens_lost", "blocks_out_incremental"),
    ):
        assert sum(getattr(s, name) for s in stats) >= 3, name


def test_closing_amid_everything_leaves_nothing_behind(tools: Any) -> None:
    for seed in range(20):
        run = Soak(tools, seed)
        for _ in range(30):
            run.iterate()
        run.close()
        assert run.switch.planner.under_way == ()
        assert run.switch.planner.copies.num_leases() == 0
        run.switch.check_integrity()
    assert not [t for t in threading.enumerate() if t.name.startswith("kvswitch")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hundred_thousand_switches_leave_memory_flat(tools: Any) -> None:
    run = Soak(tools, 1)
    sizes, used = [], []
    tracemalloc.start()
    try:
        for switches in (20_000, 100_000):
            while run.switches < switches:
                run.iterate()
            run.finish()
            gc.collect()
            used.append(tracemalloc.get_traced_memory()[0])
            planner = run.switch.planner
            sizes.append([len(value) for value in dicts_of(planner)])
    finally:
        tracemalloc.stop()
        run.close()
    assert sizes[0] == sizes[1]
    assert used[1] - used[0] < 100_000


def dicts_of(planner: Any) -> list[Any]:
    """All that could grow without bounds."""
    parts = [planner, planner._traffic, planner._departures, planner._arrivals]
    parts += [planner._sequences, planner.copies, planner.device]
    values = [getattr(part, name) for part in parts for name in vars(part)]
    return [value for value in values if isinstance(value, dict | list | set)]


# -- negative controls: without the rules, bytes go wrong ----------------------------------------


def bytes_go_wrong(tools: Any) -> bool:
    """Whether any of some soaks, without looking at the books, finds wrong bytes."""
    for seed in range(30):
        run = Soak(tools, seed, trouble=0.0)
        try:
            while run.switches < 150:
                run.iterate()
        except WrongBytes:
            return True
        finally:
            run.close()
    return False


def test_blocks_released_before_their_swap_out_has_ended_are_found_out(
    tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Traffic.send

    def send_and_release(self: Traffic, *args: Any) -> Any:
        out = send(self, *args)
        self._readers[out.blocks] -= 1
        self._device.release(out.blocks)
        out.blocks = np.empty(0, np.int32)
        return out

    monkeypatch.setattr(Traffic, "send", send_and_release)
    assert bytes_go_wrong(tools)


def test_blocks_taken_without_waiting_for_their_swap_out_are_found_out(
    tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    take: Callable[..., list[int]] = Traffic.take

    def take_and_run(self: Traffic, sequence: int, blocks: int) -> list[int]:
        take(self, sequence, blocks)
        return []

    monkeypatch.setattr(Traffic, "take", take_and_run)
    assert bytes_go_wrong(tools)


def test_taking_back_what_others_have_written_is_found_out(
    tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    still_here: Callable[..., BlockIds] = Traffic.still_here

    def forget_who_took_it(self: Traffic, *args: Any) -> BlockIds:
        self._taken[:] = 0
        return still_here(self, *args)

    monkeypatch.setattr(Traffic, "still_here", forget_who_took_it)
    assert bytes_go_wrong(tools)


def test_without_any_of_this_bytes_are_right(tools: Any) -> None:
    assert not bytes_go_wrong(tools)


# -- a main thread that never lets go ------------------------------------------------------------


def test_swapping_goes_on_beside_a_main_thread_that_holds_the_gil(tools: Any) -> None:
    run = Soak(tools, 3, trouble=0.0, host_blocks=30)
    run.allocate(0, 90)
    run.switch.step()
    run.compute(0)
    for _ in range(5):
        run.switch.preempt(0)
        run.switch.step()
        spin(lambda: run.switch.planner.state(0) is HOST or run.switch.step() is None)
        run.poison()
        run.switch.resume(0)
        run.switch.step()
        spin(lambda: run.switch.planner.state(0) is RUNNING or run.switch.step() is None)
        run.compare(0)
    run.finish()
    run.close()


def spin(until: Callable[[], bool]) -> None:
    """Burn time in pure Python, looking up only now and then."""
    deadline = time.monotonic() + 60
    while not until():
        sum(range(10_000))
        assert time.monotonic() < deadline, "the copy did not come to an end"

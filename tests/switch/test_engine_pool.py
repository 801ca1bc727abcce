"""`EngineSwapManager` against an engine with a pool of its own, whose bytes are watched."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Hashable, Sequence

import numpy as np
import pytest

from kvswitch.errors import InvalidTransition
from kvswitch.messages import Direction, Observations, SwapOrders
from kvswitch.switch import EngineSwapManager

TOKENS = 4  # of a block


class Pool:
    """Reference counts, and free blocks that keep their content's key until they are used again."""

    def __init__(self, blocks: int) -> None:
        self.references = [0] * blocks
        self.keys: list[Hashable | None] = [None] * blocks
        self.free = deque(range(blocks))
        self.copied: list[int] = []  # said to be on the host, when they were released

    def take(self, count: int) -> list[int]:
        blocks = [self.free.popleft() for _ in range(count)]
        for block in blocks:
            self.references[block], self.keys[block] = 1, None
        return blocks

    def hold(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            if self.references[block] == 0:
                self.free.remove(block)
            self.references[block] += 1

    def release(self, blocks: Sequence[int], *, copied: bool = False) -> None:
        self.copied += blocks if copied else ()
        for block in blocks:
            self.references[block] -= 1
            assert self.references[block] >= 0
            if self.references[block] == 0:
                self.free.append(block)

    def keep(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> int:
        count = 0
        while count < len(blocks) and self.keys[blocks[count]] == keys[count]:
            count += 1
        self.hold(blocks[:count])
        return count


class World:
    """A planner, its pool, and memory on both sides that transfers move late and in parts."""

    def __init__(self, device: int = 16, host: int = 32, **settings: bool) -> None:
        self.pool = Pool(device)
        self.planner = EngineSwapManager(self.pool, host, TOKENS, first_group=1, **settings)
        self.device: list[object] = [None] * device
        self.host: list[object] = [None] * host
        self.under_way: deque[tuple[int, Direction, list[tuple[int, int]]]] = deque()

    def write(self, blocks: Sequence[int], name: str, keys: Sequence[Hashable] = ()) -> None:
        for i, block in enumerate(blocks):
            self.device[block] = (name, i)
            self.pool.keys[block] = keys[i] if i < len(keys) else None

    def orders(self) -> SwapOrders:
        self.planner.send_idle()
        orders, _ = self.planner.orders()
        for transfer in orders.transfers:
            pairs = [(s + i, d + i) for s, d, n in transfer.runs.tolist() for i in range(n)]
            self.under_way.append((transfer.id, transfer.direction, pairs))
        while any(t in orders.wait for t, _, _ in self.under_way):
            self.land()
        self.planner.check_integrity()
        return orders

    def land(self, *, ok: bool = True) -> None:
        """Let the oldest transfer end: its bytes move only now."""
        transfer, direction, pairs = self.under_way.popleft()
        for src, dst in pairs if ok else ():
            if direction is Direction.OUT:
                self.host[dst] = self.device[src]
            else:
                self.device[dst] = self.host[src]
        ended = (transfer,)
        self.planner.observe(
            Observations(completed=ended if ok else (), failed=() if ok else ended)
        )
        self.planner.check_integrity()

    def rest(self) -> None:
        self.orders()
        while self.planner.busy:
            while self.under_way:
                self.land()
            self.orders()


def leave(world: World, name: str, blocks: list[int], **more: object) -> None:
    world.planner.swap_out(name, len(blocks) * TOKENS, blocks, **more)  # type: ignore[arg-type]
    world.pool.release(blocks)


def test_there_and_back() -> None:
    world = World()
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    assert len(world.pool.free) == 13  # held while they are read
    world.rest()
    assert len(world.pool.free) == 16
    assert world.planner.reach("a") == 12
    back = world.pool.take(3)
    assert world.planner.swap_in("a", 0, 12, back) == 12
    world.rest()
    assert [world.device[b] for b in back] == [("a", 0), ("a", 1), ("a", 2)]


def test_next_swap_out_sends_only_the_rest() -> None:
    world = World()
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    world.rest()
    back = world.pool.take(3)
    world.planner.swap_in("a", 0, 11, back)
    world.rest()
    back += world.pool.take(1)
    leave(world, "a", back)
    (transfer,) = world.orders().transfers
    assert transfer.num_blocks == 2  # the partial one again, and the new one
    assert world.planner.stats().blocks_spared == 2


def test_giving_way_makes_the_writer_wait() -> None:
    world = World(device=3)
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    assert not world.pool.free
    world.planner.give_way(1)
    assert len(world.pool.free) == 3
    taken = world.pool.take(1)
    world.planner.written(taken)
    assert world.orders().wait == (0,)  # and so it has landed before `taken` is written
    world.write(taken, "b")
    assert world.host[:3].count(("a", 0)) == 1
    assert world.planner.stats().conflicts == 1


def test_the_pool_is_told_what_may_be_overwritten_first() -> None:
    """What the host has got for somebody who comes back; not what failed, nor of who has ended."""
    world = World()
    a, b, c, d = (world.pool.take(2) for _ in range(4))
    for name, blocks in (("a", a), ("b", b), ("c", c)):
        leave(world, name, blocks)
    leave(world, "d", d, last=True)
    world.orders()
    world.planner.drop("c")
    world.land()
    assert world.pool.copied == a
    world.land(ok=False)
    world.rest()
    assert world.pool.copied == a
    e = world.pool.take(2)
    leave(world, "e", e)
    world.planner.give_way(1)
    assert world.pool.copied == a + e


def test_nothing_is_waited_for_if_nobody_writes() -> None:
    world = World()
    blocks = world.pool.take(3)
    leave(world, "a", blocks, hold=False)
    world.planner.written(world.pool.take(2))  # others
    assert world.orders().wait == ()


def test_retired_is_found_by_its_keys() -> None:
    world = World()
    blocks, keys = world.pool.take(3), ["x", "y", "z"]
    world.write(blocks, "a", keys)
    world.planner.retire("a", 12, blocks, keys)
    world.pool.release(blocks)
    world.rest()
    assert "a" not in world.planner.copies
    assert world.planner.reach("b", keys[:2]) == 8
    back = world.pool.take(2)
    assert world.planner.swap_in("b", 0, 8, back, keys=keys[:2]) == 8
    world.rest()
    assert [world.device[b] for b in back] == [("a", 0), ("a", 1)]


def test_what_was_used_again_is_not_sent() -> None:
    """An idle swap-out holds nothing until its turn comes: memory that is needed goes first."""
    world = World(device=3)
    blocks, keys = world.pool.take(3), ["x", "y", "z"]
    world.write(blocks, "a", keys)
    world.planner.retire("a", 12, blocks, keys)
    world.pool.release(blocks)
    world.write(world.pool.take(2), "b")
    world.rest()
    assert world.planner.reach("c", keys) == 0
    assert world.planner.stats().blocks_out == 0


def two_leave(world: World) -> None:
    """`a` and `b` have the same three full blocks, `b` another one, and leave in one step."""
    keys = ["x", "y", "z"]
    shared, own = world.pool.take(3), world.pool.take(1)
    world.pool.hold(shared)
    world.write([*shared, *own], "a", keys)
    leave(world, "a", shared, keys=keys)
    leave(world, "b", [*shared, *own], keys=keys)
    assert [transfer.num_blocks for transfer in world.orders().transfers] == [3, 1]


def test_who_has_ended_is_forgotten_when_an_older_copy_of_it_has_ended() -> None:
    world = World()
    blocks = world.pool.take(3)
    keys = ["k0", "k1", "k2"]
    world.write(blocks, "a", keys)
    world.planner.swap_out("a", 12, blocks, keys=keys)
    world.orders()  # under way; meanwhile it is back, and ends
    world.planner.retire("a", 12, blocks, keys)
    world.planner.send_ended("a")
    world.pool.release(blocks)
    world.rest()
    assert "a" not in world.planner.copies
    assert world.planner.reach("b", keys) == 12


def test_another_of_a_name_is_not_forgotten_with_the_first() -> None:
    world = World()
    blocks = world.pool.take(3)
    keys = ["k0", "k1", "k2"]
    world.write(blocks, "a", keys)
    world.planner.swap_out("a", 12, blocks, keys=keys, last=True)
    world.pool.release(blocks)
    world.orders()
    world.planner.drop("a")
    assert world.planner.reach("a") == 0
    more = world.pool.take(2)
    world.write(more, "other")
    leave(world, "a", more)
    world.rest()
    assert world.planner.reach("a") == 8


def test_what_two_have_in_common_goes_out_once() -> None:
    world = World()
    two_leave(world)
    world.rest()
    assert len(world.pool.free) == 16
    assert (world.planner.reach("a"), world.planner.reach("b")) == (12, 16)
    assert world.planner.copies.pool.free_blocks == 32 - 4
    back = world.pool.take(4)
    world.planner.swap_in("b", 0, 16, back)
    world.rest()
    assert [world.device[b] for b in back] == [("a", i) for i in range(4)]


def test_a_load_comes_after_the_swap_out_that_is_followed() -> None:
    world = World()
    two_leave(world)
    world.planner.swap_in("b", 0, 16, world.pool.take(4))
    (back,) = world.orders().transfers
    assert back.after == (0, 1)
    world.rest()


def test_what_somebody_follows_is_not_cancelled() -> None:
    world = World()
    two_leave(world)
    world.planner.drop("a")
    assert world.orders().cancel == ()
    world.rest()
    assert world.planner.reach("b") == 16
    world.planner.drop("b")
    world.rest()


def test_a_failure_costs_all_who_follow() -> None:
    world = World()
    two_leave(world)
    world.land(ok=False)
    world.rest()
    assert (world.planner.reach("a"), world.planner.reach("b")) == (0, 0)
    assert world.planner.stats().transfers_failed == 1


def test_failures_are_not_tried_twice() -> None:
    world = World()
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    world.rest()
    world.planner.swap_in("a", 4, 12, world.pool.take(3))
    world.orders()
    world.land(ok=False)
    assert world.planner.reach("a") == 4
    assert world.planner.stats().transfers_failed == 1


def test_load_of_what_failed_to_leave_counts_for_nothing() -> None:
    world = World()
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    world.planner.swap_in("a", 0, 12, world.pool.take(3))
    out, back = world.orders().transfers
    assert back.after == (out.id,)
    world.land(ok=False)
    world.land()
    assert world.planner.reach("a") == 0


def test_a_load_of_what_is_invalidated_meanwhile_counts_for_nothing() -> None:
    world = World()
    blocks = world.pool.take(3)
    world.write(blocks, "a")
    leave(world, "a", blocks)
    world.rest()
    world.planner.swap_in("a", 0, 12, world.pool.take(3))
    world.orders()
    world.planner.invalidate_all()
    (load,) = world.planner.under_way
    assert world.planner.observe(Observations(completed=(load,))) == ("a",)


def test_another_of_a_name_takes_nothing_over_from_one_that_has_ended() -> None:
    world = World()
    first = world.pool.take(3)
    world.write(first, "first", ["k0", "k1", "k2"])
    world.planner.retire("a", 12, first, ["k0", "k1", "k2"])
    second = world.pool.take(2)
    world.write(second, "second", ["other0", "other1"])
    leave(world, "a", second, keys=["other0", "other1"])
    world.rest()
    assert world.planner.reach("b", ["k0", "k1", "k2"]) == 0
    assert world.planner.reach("a") == 8


def test_who_has_ended_loses_its_copies_first() -> None:
    world = World(host=3)
    blocks = world.pool.take(3)
    world.write(blocks, "a", ["k0", "k1", "k2"])
    world.planner.swap_out("a", 12, blocks, keys=["k0", "k1", "k2"], priority=9.0)
    world.orders()
    world.land()
    world.planner.retire("a", 12, blocks, ["k0", "k1", "k2"])
    more = world.pool.take(2)
    world.write(more, "b")
    leave(world, "b", more, priority=1.0)
    assert world.planner.reach("b") == 8


def test_invalidated_copies_are_gone_and_holds_too() -> None:
    world = World()
    blocks, keys = world.pool.take(3), ["x", "y", "z"]
    world.write(blocks, "a", keys)
    leave(world, "a", blocks, keys=keys)
    world.planner.invalidate_all()
    assert len(world.pool.free) == 16
    world.rest()
    assert world.planner.reach("a", keys) == 0


def test_too_many_tokens_are_refused() -> None:
    world = World()
    with pytest.raises(InvalidTransition, match="9 tokens in 2 blocks"):
        world.planner.swap_out("a", 9, world.pool.take(2))
    with pytest.raises(InvalidTransition, match="not under way"):
        world.planner.observe(Observations(completed=(3,)))


@pytest.mark.parametrize("seed", range(40))
def test_random_walk_never_brings_wrong_bytes(seed: int) -> None:
    """Sequences come, grow, leave, come back and end; transfers end late, some fail."""
    rng = random.Random(seed)
    world = World(device=14, host=rng.choice([8, 20, 40]))
    planner, pool = world.planner, world.pool
    tables: dict[str, list[int]] = {}  # running: device blocks
    away: dict[str, int] = {}  # left: blocks it had
    loading: dict[str, int] = {}
    count = 0

    def keys(name: str, blocks: int) -> list[Hashable]:
        """Also the blocks' content, of which all begin with the same two."""
        return [("shared", 0), ("shared", 1), *((name, i) for i in range(2, blocks))][:blocks]

    def write(name: str) -> None:
        named = keys(name, len(tables[name]))
        world.write(tables[name], name, named)
        for block, content in zip(tables[name], named, strict=True):
            world.device[block] = content

    def begin(name: str, blocks: int) -> bool:
        if len(pool.free) < blocks:
            planner.give_way(blocks - len(pool.free))
        if len(pool.free) < blocks:
            return False
        tables[name] = pool.take(blocks)
        return True

    for _ in range(150):
        match rng.choice(["new", "grow", "out", "out", "in", "in", "end", "drop", "land", "step"]):
            case "new" if begin(f"s{count}", rng.randint(1, 4)):
                planner.written(tables[f"s{count}"])
                world.orders()
                write(f"s{count}")
                count += 1
            case "grow" if (ready := [n for n in tables if n not in loading]) and pool.free:
                name = rng.choice(ready)
                tables[name] += pool.take(1)
                planner.written(tables[name][-1:])
                world.orders()
                write(name)
            case "out" if ready := [n for n in tables if n not in loading]:
                name = rng.choice(ready)
                blocks = tables.pop(name)
                named = keys(name, len(blocks))
                hold = rng.random() < 0.7
                planner.swap_out(
                    name, len(blocks) * TOKENS, blocks, keys=named, hold=hold, priority=rng.random()
                )
                pool.release(blocks)
                away[name] = len(blocks)
            case "in" if away:
                name = rng.choice(list(away))
                have = planner.reach(name, keys(name, away[name])) // TOKENS
                if have and begin(name, have):
                    wanted = have * TOKENS
                    loading[name] = planner.swap_in(
                        name, 0, wanted, tables[name], keys=keys(name, have)
                    )
                    assert loading[name] == wanted
                    del away[name]
            case "end" if ready := [n for n in tables if n not in loading]:
                name = rng.choice(ready)
                blocks = tables.pop(name)
                planner.retire(name, len(blocks) * TOKENS, blocks, keys(name, len(blocks)))
                pool.release(blocks)
            case "drop" if away:
                name = rng.choice(list(away))
                del away[name]
                planner.drop(name)
            case "land" if world.under_way:
                _, direction, pairs = world.under_way[0]
                ok = rng.random() < 0.85
                world.land(ok=ok)
                if direction is Direction.IN:
                    written = {dst for _, dst in pairs}
                    name = next(n for n in loading if written <= set(tables[n]))
                    tokens = loading.pop(name)
                    if ok and planner.reach(name) >= tokens:
                        got = [world.device[b] for b in tables[name]]
                        assert got == keys(name, len(got))
                    else:  # recomputed
                        planner.written(tables[name])
                        world.orders()
                        write(name)
            case "step":
                world.orders()
        planner.check_integrity()
    world.rest()
    for blocks in tables.values():
        pool.release(blocks)
    assert len(pool.free) == 14
    assert planner.copies.num_leases() == 0


def test_same_calls_same_orders() -> None:
    def run() -> list[bytes]:
        world = World()
        seen = []
        for i in range(4):
            blocks = world.pool.take(3)
            leave(world, f"s{i}", blocks)
            seen += [t.runs.tobytes() for t in world.orders().transfers]
            world.rest()
        return seen

    assert run() == run()
    assert np.frombuffer(run()[0], np.int32)[2] > 0

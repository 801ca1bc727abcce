"""The planner for engines with a pool of their own: loads by layer, lost arrivals, ended owners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

from kvswitch.messages import Direction, Observations, SwapOrders
from kvswitch.switch import EngineSwapManager

OUT, IN = Direction
TOKENS = 4  # in a block


class Pool:
    """Counts holds; what `content` names can be kept."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self.content: dict[int, Hashable] = {}

    def hold(self, blocks: Sequence[int]) -> None:
        self.held.update(blocks)

    def release(self, blocks: Sequence[int], *, copied: bool = False) -> None:
        self.held.subtract(blocks)
        assert min(self.held.values(), default=0) >= 0

    def keep(self, blocks: Sequence[int], keys: Sequence[Hashable]) -> int:
        kept = 0
        while kept < len(blocks) and self.content.get(blocks[kept]) == keys[kept]:
            kept += 1
        self.hold(blocks[:kept])
        return kept


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def planner(pool: Pool) -> EngineSwapManager:
    return EngineSwapManager(pool, 32, TOKENS, first_group=4)


def moved(orders: SwapOrders, direction: Direction) -> list[int]:
    return [t.num_blocks for t in orders.transfers if t.direction is direction]


def finish(planner: EngineSwapManager, **ended: tuple[int, ...]) -> tuple[Hashable, ...]:
    return planner.observe(Observations(**ended))


def away(planner: EngineSwapManager, owner: str, tokens: int, blocks: list[int]) -> None:
    planner.swap_out(owner, tokens, blocks)
    planner.orders()
    finish(planner, completed=planner.under_way)


def test_a_partly_filled_block_comes_first_and_alone(planner: EngineSwapManager) -> None:
    away(planner, "a", 10, [1, 2, 3])
    assert planner.swap_in("a", 0, 10, [5, 6, 7], by_layer=True) == 10
    orders, owners = planner.orders()
    tail, rest = orders.transfers
    assert (tail.num_blocks, rest.num_blocks) == (1, 2)
    assert tail.runs[:, 1].tolist() == [7]
    assert orders.wait == (tail.id,), "the forward goes on writing in it"
    assert owners == {tail.id: "a", rest.id: "a"}
    assert finish(planner, completed=(tail.id, rest.id)) == ()
    assert planner.copies.valid("a") == 10
    planner.check_integrity()


@pytest.mark.parametrize("tokens", [8, 3])
def test_full_blocks_come_by_layer_and_a_lone_tail_is_waited_for(
    planner: EngineSwapManager, tokens: int
) -> None:
    away(planner, "a", tokens, [1, 2, 3])
    planner.swap_in("a", 0, tokens, [5, 6, 7], by_layer=True)
    orders, _ = planner.orders()
    assert len(orders.transfers) == 1
    assert bool(orders.wait) == (tokens == 3)


def test_a_load_that_waits_is_one_transfer(planner: EngineSwapManager) -> None:
    away(planner, "a", 10, [1, 2, 3])
    planner.swap_in("a", 0, 10, [5, 6, 7], wait=True, by_layer=True)
    orders, _ = planner.orders()
    assert moved(orders, IN) == [3]
    assert len(orders.wait) == 1


def test_a_failed_load_is_lost(planner: EngineSwapManager, pool: Pool) -> None:
    away(planner, "a", 10, [1, 2, 3])
    planner.swap_in("a", 0, 10, [5, 6, 7], by_layer=True)
    orders, _ = planner.orders()
    tail, rest = orders.transfers
    assert finish(planner, completed=(tail.id,), failed=(rest.id,)) == ("a",)
    assert planner.copies.valid("a") == 0
    assert sum(pool.held.values()) == 0


def test_a_load_of_what_was_never_sent_is_lost_though_it_went_well(
    planner: EngineSwapManager,
) -> None:
    planner.swap_out("a", 8, [1, 2])
    first, _ = planner.orders()
    (out,) = first.transfers
    planner.swap_in("a", 0, 8, [5, 6], by_layer=True)
    second, _ = planner.orders()
    (back,) = second.transfers
    assert back.after == (out.id,)
    assert finish(planner, failed=(out.id,)) == ()
    assert finish(planner, completed=(back.id,)) == ("a",)
    assert planner.reach("a") == 0
    planner.check_integrity()


def test_what_has_ended_is_sent_when_its_blocks_are_about_to_go(
    planner: EngineSwapManager, pool: Pool
) -> None:
    planner.swap_out("busy", 4, [9])
    for owner, blocks in (("a", [1, 2]), ("b", [3, 4])):
        keys = [f"{owner}{i}" for i in range(2)]
        pool.content.update(zip(blocks, keys, strict=True))
        planner.retire(owner, 8, blocks, keys)
    planner.send_ended("b")
    planner.send_ended("unknown")
    planner.send_idle()
    orders, _ = planner.orders()
    assert moved(orders, OUT) == [1, 2], "a is idle, and waits until nothing else goes out"
    assert pool.held[3] == pool.held[4] == 1
    finish(planner, completed=planner.under_way)
    assert planner.reach("later", ["b0", "b1"]) == 8
    planner.send_idle()
    later, _ = planner.orders()
    assert moved(later, OUT) == [2]
    finish(planner, completed=planner.under_way)
    assert planner.holds() == []
    assert sum(pool.held.values()) == 0
    planner.check_integrity()


def test_what_the_step_writes_is_not_sent_though_its_key_is_right(
    planner: EngineSwapManager, pool: Pool
) -> None:
    """Engines name blocks when they plan to fill them: until then something else is in them."""
    keys = ["x", "y", "z"]
    pool.content.update(zip([1, 2, 3], keys, strict=True))
    planner.retire("a", 12, [1, 2, 3], keys)
    planner.send_idle({2})
    orders, _ = planner.orders()
    assert moved(orders, OUT) == [1]
    finish(planner, completed=planner.under_way)
    assert planner.reach("later", keys) == 4
    assert sum(pool.held.values()) == 0


def test_who_ends_while_it_is_away_leaves_its_copies(planner: EngineSwapManager) -> None:
    """Its last token was under way when it left: what is being sent then is found by its keys."""
    keys = ["x", "y"]
    planner.swap_out("a", 8, [1, 2], keys=keys)
    orders, _ = planner.orders()
    planner.leave("a")
    planner.leave("unknown")
    later, _ = planner.orders()
    assert later.cancel == ()
    finish(planner, completed=[transfer.id for transfer in orders.transfers])
    assert "a" not in planner.copies
    assert planner.reach("later", keys) == 8
    planner.check_integrity()


def test_holds_are_those_of_all_transfers(planner: EngineSwapManager, pool: Pool) -> None:
    away(planner, "a", 8, [1, 2])
    planner.swap_in("a", 0, 8, [5, 6])
    planner.swap_out("b", 4, [3])
    planner.swap_out("c", 4, [4], hold=False)
    assert sorted(planner.holds()) == [3, 5, 6]
    assert Counter(planner.holds()) == +pool.held
    planner.orders()
    assert Counter(planner.holds()) == +pool.held

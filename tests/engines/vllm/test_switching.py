"""Whatever is switched out and in, and however: the tokens are those of a run without pressure."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest

from kvswitch.transfer import CpuBackend
from kvswitch_vllm import moving
from kvswitch_vllm.moving import Moving
from kvswitch_vllm.planning import Planning

COUNT, LENGTH, OUTPUT, BLOCKS = 8, 150, 120, 30  # 30 blocks: room for three or four of eight

MODES = {
    "load": ("async", "sync"),
    "caching": (True, False),
    "asynchronous": (False, True),
    "only_connector": (False, True),
}
ALL = [dict(zip(MODES, values, strict=True)) for values in product(*MODES.values())]


def pairs() -> list[dict[str, Any]]:
    """So many of ALL that every pair of values occurs."""
    missing = {
        ((a, x), (b, y)) for a, b in product(MODES, MODES) if a < b for x in MODES[a]
        for y in MODES[b]
    }  # fmt: skip
    chosen = []
    while missing:
        best = max(ALL, key=lambda mode: sum(m <= set(mode.items()) for m in map(set, missing)))
        missing = {m for m in missing if not set(m) <= set(best.items())}
        chosen.append(best)
    return chosen


PAIRS = pairs()


def name_of(mode: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in mode.items())


def churn(engine: Any, seed: int = 0) -> Callable[[int], None]:
    """Change a random request's priority every few steps; poison what is free."""
    rng = random.Random(seed)

    def on_step(step: int) -> None:
        if step % 4 == 0 and hasattr(engine.scheduler, "set_request_priority"):
            name = f"r{rng.randrange(COUNT)}"
            engine.core.set_request_priority(name, rng.randrange(-5, 5))
        if step % 3 == 0 and not engine.core.async_scheduling:
            engine.poison_free_blocks()

    return on_step


def check_tokens(make_engine: Any, reference: Any, mode: dict[str, Any]) -> None:
    engine = make_engine(
        {"strategy": mode["load"], "quantum": 2},
        blocks=BLOCKS,
        asynchronous=mode["asynchronous"],
        only_connector=mode["only_connector"],
        enable_prefix_caching=mode["caching"],
    )
    engine.add_batch(COUNT, LENGTH, OUTPUT)
    engine.run(churn(engine))
    assert engine.batch(COUNT) == reference
    assert engine.stats.preemptions > 0
    assert engine.stats.blocks_in > 0
    assert engine.planning.recomputed_tokens <= 32 * engine.stats.preemptions
    assert engine.stats.transfers_failed == 0


@pytest.mark.parametrize("mode", PAIRS, ids=name_of)
def test_tokens_are_the_same(make_engine: Any, reference: Any, mode: dict[str, Any]) -> None:
    check_tokens(make_engine, reference, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in ALL if mode not in PAIRS], ids=name_of)
def test_tokens_are_the_same_in_all_modes(
    make_engine: Any, reference: Any, mode: dict[str, Any]
) -> None:
    check_tokens(make_engine, reference, mode)


def test_comparison_can_fail(
    make_engine: Any, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a load whose bytes are lost changes the tokens."""
    before_forward = Moving.before_forward

    def lose(self: Moving, step: Any) -> None:
        before_forward(self, step)
        for load in step.loads.values():
            self._engine.drain()
            for cache in self._kv_caches.values():
                cache[list(load.blocks)] = 0.0

    monkeypatch.setattr(Moving, "before_forward", lose)
    engine = make_engine({}, blocks=BLOCKS)
    engine.add_batch(COUNT, LENGTH, OUTPUT)
    engine.run()
    assert engine.batch(COUNT) != reference


def test_recompute_sends_nothing(make_engine: Any, reference: Any) -> None:
    engine = make_engine({"preemption": "recompute"}, blocks=BLOCKS)
    engine.add_batch(COUNT, LENGTH, OUTPUT)
    engine.run(churn(engine))
    assert engine.batch(COUNT) == reference
    assert engine.stats.preemptions > 0
    assert engine.stats.blocks_out == engine.stats.blocks_in == 0
    assert engine.planning.recomputed_tokens > 0


def test_too_little_host_memory_costs_recomputation_only(make_engine: Any, reference: Any) -> None:
    engine = make_engine({"host_memory": "2MiB"}, blocks=BLOCKS)
    engine.add_batch(COUNT, LENGTH, OUTPUT)
    engine.run(churn(engine))
    assert engine.batch(COUNT) == reference
    assert engine.planning.recomputed_tokens > 0


def let_copies_end_with_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    after_forward = Moving.after_forward

    def drained(self: Moving) -> set[str]:
        self._engine.drain()
        return after_forward(self)

    monkeypatch.setattr(Moving, "after_forward", drained)


@pytest.mark.parametrize(("caching", "asynchronous"), [(True, False), (True, True), (False, False)])
def test_a_context_comes_back_in_few_copies(
    make_engine: Any,
    random_prompts: Any,
    monkeypatch: pytest.MonkeyPatch,
    caching: bool,
    asynchronous: bool,
) -> None:
    """With memory for four or five of twenty, whose places change all the time.

    Copies end with the forward: how fast this machine is beside its model must not matter.
    """
    let_copies_end_with_the_forward(monkeypatch)
    policy = {"policy": "random", "policy_settings": {"seed": 0, "sequences": 20, "epochs": 500}}
    engine = make_engine(
        {**policy, "host_memory": "256MiB", "epoch": 10, "quantum": 5},
        blocks=96,
        max_model_len=1280,
        asynchronous=asynchronous,
        enable_prefix_caching=caching,
    )
    for i, prompt in enumerate(random_prompts(20, 450)):
        engine.add(f"r{i}", prompt, 100 + 5 * i)
    engine.run()
    stats = engine.stats
    assert stats.blocks_in / stats.resumptions > 14
    assert stats.blocks_in / stats.copies_in >= 10


def until(engine: Any, condition: Callable[[], object]) -> None:
    for _ in range(500):
        if condition():
            return
        engine.step()
    raise AssertionError("it does not come to this")


def give_the_slot_to_another(
    make_engine: Any, random_prompts: Any, asynchronous: bool, blocks: int = 60
) -> Any:
    """An engine of one slot, in which a request is about to be preempted for a better one."""
    engine = make_engine({"quantum": 0}, blocks=blocks, asynchronous=asynchronous, max_num_seqs=1)
    before, after = random_prompts(2, 300)
    engine.add("before", before, 100, priority=1)
    for _ in range(30):
        engine.step()
    engine.add("after", after, 20, priority=0)
    return engine


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_has_left_is_overwritten_before_other_cached_content(
    make_engine: Any, random_prompts: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Also if its blocks are free only when the forward under way has ended."""
    let_copies_end_with_the_forward(monkeypatch)
    engine = give_the_slot_to_another(make_engine, random_prompts, asynchronous)
    name, _ = engine.scheduler.requests
    until(engine, lambda: engine.stats.resumptions and engine.scheduler.running)
    (left,) = engine.scheduler.kv_cache_manager.get_block_ids(name)
    engine.add("again", [7] * 20, 60)
    until(engine, lambda: engine.stats.preemptions == 2)
    until(engine, lambda: not engine.planning.busy and not engine.scheduler.deferred_frees)
    assert engine.stats.blocks_spared >= 10, "so they are free without having been sent"
    groups = engine.planning.groups._groups
    gone = np.array(left, np.int32)
    gone = gone[groups.references(gone) == 0]
    assert len(gone) >= 10
    assert not groups._cached.contains(gone).any()
    engine.run()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_being_sent_is_not_given_up_for_what_is_free_in_a_moment(
    make_engine: Any, random_prompts: Any, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    engine = give_the_slot_to_another(make_engine, random_prompts, asynchronous, blocks=16)
    until(engine, lambda: engine.stats.resumptions and engine.scheduler.running)
    given = []
    monkeypatch.setattr(engine.planning.planner, "give_way", given.append)
    engine.add("again", random_prompts(1, 300, 7)[0], 20)
    until(engine, lambda: engine.stats.preemptions == 2)
    assert given
    assert max(given) <= 0
    monkeypatch.undo()
    engine.run()


@pytest.mark.parametrize(("asynchronous", "alone"), [(False, True), (True, True), (True, False)])
def test_steps_without_a_forward_wait_a_moment_for_transfers(
    make_engine: Any,
    random_prompts: Any,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    alone: bool,
) -> None:
    """Or an engine in the same process would keep those who copy from Python.

    No forward waits, and no other engine that goes in step with this one.
    """
    steps: list[tuple[bool, bool]] = []
    plan = Planning.step

    def step(self: Planning, output: Any) -> Any:
        orders = plan(self, output)
        steps.append((bool(output.num_scheduled_tokens), orders.idle))
        return orders

    monkeypatch.setattr(Planning, "step", step)
    monkeypatch.setattr(moving, "make_backend", lambda *_, **__: CpuBackend(bandwidth=1e6))
    engine = give_the_slot_to_another(make_engine, random_prompts, asynchronous)
    assert engine.planning._alone
    engine.planning._alone = alone
    engine.run()
    assert engine.stats.resumptions == 1
    assert any(idle for _, idle in steps) == alone
    for (before, _), (now, idle) in pairwise(steps):
        assert not (idle and (before or now))

"""Whatever is switched out and in, and however: the tokens are those of a run without pressure."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from kvswitch_vllm.moving import Moving

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


@pytest.mark.parametrize(("caching", "asynchronous"), [(True, False), (True, True), (False, False)])
def test_a_context_comes_back_in_few_copies(
    make_engine: Any, random_prompts: Any, caching: bool, asynchronous: bool
) -> None:
    """With memory for four or five of twenty, whose places change all the time."""
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
    assert stats.blocks_in / stats.copies_in >= 8

"""Who runs: priorities given, changed at run time, and by policy."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize("asynchronous", [False, True])
def test_important_request_preempts(
    make_engine: Any, random_prompts: Any, asynchronous: bool
) -> None:
    """It gets its first token soon, although all memory is taken by less important ones."""
    engine = make_engine({}, blocks=30, asynchronous=asynchronous)
    for i, prompt in enumerate(random_prompts(4, 150)):
        engine.add(f"low{i}", prompt, 120, priority=10)
    for _ in range(40):
        engine.step()
    engine.add("high", random_prompts(1, 180, seed=5)[0], 20, priority=0)
    steps = 0
    while not engine.tokens.get("high"):
        engine.step()
        steps += 1
    assert steps <= 4
    assert engine.stats.preemptions >= 1
    engine.run()


def test_slots_are_taken_too(make_engine: Any, random_prompts: Any) -> None:
    engine = make_engine({}, max_num_seqs=2)
    for i, prompt in enumerate(random_prompts(2, 50)):
        engine.add(f"low{i}", prompt, 100, priority=10)
    for _ in range(10):
        engine.step()
    engine.add("high", random_prompts(1, 50, seed=5)[0], 10, priority=0)
    for _ in range(3):
        engine.step()
    assert engine.tokens.get("high")
    engine.run()


def test_priority_changes_at_run_time(make_engine: Any, random_prompts: Any) -> None:
    engine = make_engine({}, max_num_seqs=2)
    for i, prompt in enumerate(random_prompts(3, 50)):
        engine.add(f"r{i}", prompt, 150)
    for _ in range(10):
        engine.step()
    assert not engine.tokens.get("r2")
    assert engine.core.set_request_priority("r2", -1) == 1
    assert engine.core.set_request_priority("nobody", -1) == 0
    for _ in range(3):
        engine.step()
    assert engine.tokens["r2"]
    engine.run()


def test_equals_do_not_preempt_each_other(make_engine: Any, random_prompts: Any) -> None:
    engine = make_engine({}, max_num_seqs=2)
    engine.add_batch(4, 50, 60)
    engine.run()
    assert engine.stats.preemptions == 0


def test_quantum_bounds_thrashing(make_engine: Any) -> None:
    """Whoever has been switched in runs for a quantum, whatever the priorities do."""
    engine = make_engine(
        {
            "policy": "random",
            "policy_settings": {"seed": 1, "sequences": 4, "epochs": 500},
            "epoch": 6,
            "quantum": 5,
        },
        max_num_seqs=2,
    )
    engine.add_batch(4, 50, 120)
    running: dict[str, int] = {}
    shortest = 10**9

    def watch(step: int) -> None:
        nonlocal shortest
        now = {request.request_id for request in engine.scheduler.running}
        for name in now:
            running.setdefault(name, step)
        for name in set(running) - now:
            if name in engine.scheduler.requests:  # preempted, not finished
                shortest = min(shortest, step - running[name])
            del running[name]

    engine.run(watch)
    assert engine.stats.preemptions > 3
    assert shortest >= 5

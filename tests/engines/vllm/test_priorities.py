"""Who runs: priorities given, changed at run time, and by policy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvswitch_vllm.scheduler import _is_leaving, _may_leave


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


@pytest.mark.parametrize("asynchronous", [False, True])
def test_nobody_stands_still_beside_less_important_ones(
    make_engine: Any, random_prompts: Any, asynchronous: bool
) -> None:
    """All of them grow until there is no memory left: the least important one has to leave."""
    engine = make_engine({}, blocks=25, asynchronous=asynchronous)
    for i, prompt in enumerate(random_prompts(3, 200)):
        # The first of those that run is the least important one, and needs no block for long.
        engine.add(f"r{i}", prompt if i else prompt[:180], 150, priority=5 - i)
        engine.step()
    tokens, still = {}, 0
    least, *others = engine.scheduler.requests.values()
    while all(not request.is_finished() for request in others):
        engine.step()
        for request in others:
            if request in engine.scheduler.running and least in engine.scheduler.running:
                then, step = tokens.get(request, (-1, 0))
                still = max(still, step)
                grown = request.num_output_tokens > then
                tokens[request] = (request.num_output_tokens, 0 if grown else step + 1)
    assert engine.stats.preemptions > 0
    assert still <= 3
    engine.run()


def test_nobody_leaves_beside_one_whose_last_token_is_under_way(
    make_engine: Any, random_prompts: Any
) -> None:
    engine = make_engine({"quantum": 0}, asynchronous=True, max_num_seqs=2)
    ending, going_on, came = random_prompts(3, 50)
    engine.add("ending", ending, 15, priority=1)
    engine.add("going on", going_on, 60, priority=2)
    first = next(iter(engine.scheduler.requests.values()))
    while not _is_leaving(first):
        assert not first.is_finished()
        engine.step()
    engine.add("came", came, 10, priority=0)
    for _ in range(4):
        engine.step()
    assert engine.tokens.get("came")
    assert engine.stats.preemptions == 0
    engine.run()


def test_who_ends_anyway_or_is_streamed_to_does_not_leave() -> None:
    def request(computed: int, ahead: int, *, resumable: bool = False) -> Any:
        return SimpleNamespace(
            num_prompt_tokens=10, max_tokens=5, num_computed_tokens=computed,
            num_output_placeholders=ahead, resumable=resumable,
        )  # fmt: skip

    assert _may_leave(request(12, 0))
    assert _may_leave(request(13, 1))
    assert not _may_leave(request(14, 1)), "the forward under way gives its last token"
    assert not _may_leave(request(12, 0, resumable=True))
    assert _is_leaving(request(14, 1))
    assert not _is_leaving(request(14, 1, resumable=True)), "a session keeps its blocks"
    assert not _is_leaving(request(13, 1))


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

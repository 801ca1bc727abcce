"""The end of a turn, and what else ends or interrupts requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kvswitch.errors import TransferError
from kvswitch.messages import Direction
from kvswitch.transfer import Backend, CpuBackend, Layout, Queue
from kvswitch_vllm import moving


class Failing(CpuBackend):
    """Fails every third copy in one direction."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self._direction = direction

    def open_queue(self, direction: Direction) -> Queue:
        queue = super().open_queue(direction)
        if direction is self._direction:
            copy, calls = queue.copy, iter(range(10**9))

            def fail(*args: Any) -> None:
                if next(calls) % 3 == 0:
                    raise TransferError("told to fail")
                copy(*args)

            queue.copy = fail  # type: ignore[method-assign]
        return queue


def fill(engine: Any, prompts: list[list[int]]) -> None:
    """Let others take all of the memory."""
    for i, prompt in enumerate(prompts):
        engine.add(f"other{i}", prompt, 40)
    engine.run()


@pytest.mark.parametrize("caching", [True, False])
def test_next_turn_swaps_in(make_engine: Any, random_prompts: Any, caching: bool) -> None:
    """The next turn finds prompt and answer of the last one by their hashes."""
    first, *others = random_prompts(6, 150)
    engine = make_engine({}, blocks=16, enable_prefix_caching=caching)
    engine.add("turn1", first, 60)
    engine.run()
    fill(engine, others)
    assert engine.stats.resumptions == 0
    turn = first + engine.tokens["turn1"] + random_prompts(1, 20, seed=3)[0]
    engine.add("turn2", turn, 40)
    engine.run()
    # 150 + 60 tokens, the last of which was not computed: six full blocks.
    assert engine.stats.resumptions == 1
    assert engine.stats.blocks_in == 6
    engine.close()
    plain = make_engine()
    plain.add("turn2", turn, 40)
    assert engine.tokens["turn2"] == plain.run()["turn2"]


@pytest.mark.parametrize("only_connector", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_sent_of_ended_turns_has_been_computed(
    make_engine: Any,
    random_prompts: Any,
    monkeypatch: pytest.MonkeyPatch,
    asynchronous: bool,
    only_connector: bool,
) -> None:
    """vLLM names a block by its content when it plans to fill it, before the forward does.

    A copy that found an ended turn's block by that name would read what was there before.
    """
    engine = make_engine(
        {}, blocks=40, asynchronous=asynchronous, only_connector=only_connector, max_num_seqs=3
    )
    planning, planner = engine.planning, engine.planning.planner
    schedule, plan, send = engine.scheduler.schedule, planning.step, planner.send_idle
    names: dict[int, Any] = {}
    written: set[int] = set()
    loaded: set[int] = set()  # named when they have landed, at the latest
    named = sent = 0

    def scheduled(*args: Any) -> Any:
        names.update((block.block_id, block.block_hash) for block in engine.pool.blocks)
        return schedule(*args)

    def step(output: Any) -> Any:
        nonlocal written, named
        # Scheduling ahead, it gets to know the last token of a block a step later.
        before = written if asynchronous else set()
        written = planning._written(output)
        loaded.update(block for load in planner._arriving for block in load.blocks)
        for block in engine.pool.blocks:
            if block.block_hash not in (None, names[block.block_id]):
                assert block.block_id in written | loaded | before
                named += block.block_id in written
        return plan(output)

    def send_idle(but: Any) -> None:
        nonlocal sent
        assert but == written
        sent += 1
        send(but)

    monkeypatch.setattr(engine.scheduler, "schedule", scheduled)
    monkeypatch.setattr(planning, "step", step)
    monkeypatch.setattr(planner, "send_idle", send_idle)
    engine.add_batch(8, 100, 60)
    engine.run(lambda step: engine.core.set_request_priority(f"r{step % 8}", step % 3)
               if not only_connector and step % 5 == 0 else None)  # fmt: skip
    assert named >= 20
    assert sent > 0
    assert planner.stats().idle_copies > 0


def test_turn_that_ends_while_it_is_away_can_be_gone_on_with(
    make_engine: Any, random_prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last token was under way when it was preempted, so it ends without any block."""
    monkeypatch.setattr(moving, "make_backend", lambda *_, **__: CpuBackend(bandwidth=1e6))
    engine = make_engine({"quantum": 0}, blocks=60, max_num_seqs=1)
    turn, other = random_prompts(2, 300)
    engine.add("turn", turn, 60, priority=1)
    for _ in range(30):
        engine.step()
    engine.add("other", other, 20, priority=0)
    while not engine.stats.preemptions:
        engine.step()
    request = next(r for name, r in engine.scheduler.requests.items() if name.startswith("turn"))
    engine.planning.finished(request, ())
    engine.planning.planner.check_integrity()
    keys = list(request.block_hashes)
    get_kv_transfer_group()._moving._engine.drain()
    for _ in range(2):
        engine.step()
    assert not engine.stats.resumptions
    assert engine.planning.planner.reach("next turn", keys) == 32 * len(keys) > 300
    engine.run()


def test_salt_keeps_tenants_apart(make_engine: Any, random_prompts: Any) -> None:
    first, *others = random_prompts(6, 150)
    engine = make_engine({}, blocks=16)
    engine.add("mine", first, 20, cache_salt="one")
    engine.run()
    fill(engine, others)
    engine.add("theirs", first, 20, cache_salt="two")
    engine.run()
    assert engine.stats.resumptions == 0
    fill(engine, others)
    before = engine.stats.resumptions  # of the others, who are here again
    engine.add("mine again", first, 20, cache_salt="one")
    engine.run()
    assert engine.stats.resumptions == before + 1
    assert engine.tokens["mine"] == engine.tokens["mine again"] == engine.tokens["theirs"]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("direction", list(Direction))
def test_failing_copies_cost_recomputation_only(
    make_engine: Any,
    reference: Any,
    monkeypatch: pytest.MonkeyPatch,
    direction: Direction,
    asynchronous: bool,
) -> None:
    def failing(name: str, layout: Layout, *, on_cuda: bool) -> Backend:
        return Failing(direction)

    monkeypatch.setattr(moving, "make_backend", failing)
    engine = make_engine({}, blocks=30, asynchronous=asynchronous)
    engine.add_batch(8, 150, 120)
    engine.run()
    assert engine.batch(8) == reference
    assert engine.stats.transfers_failed > 0


@pytest.mark.parametrize("asynchronous", [False, True])
def test_aborts_leak_nothing(make_engine: Any, reference: Any, asynchronous: bool) -> None:
    """Requests are aborted while running, waiting, leaving and arriving."""
    engine = make_engine({"strategy": "async", "quantum": 2}, blocks=30, asynchronous=asynchronous)
    engine.add_batch(8, 150, 120)
    seen: list[str] = []
    order = ["WAITING_FOR_REMOTE_KVS", "PREEMPTED", "RUNNING"]
    rng = random.Random(0)

    def abort(step: int) -> None:
        if step % 3 == 0:
            engine.core.set_request_priority(f"r{rng.randrange(8)}", rng.randrange(-5, 5))
        if len(seen) < len(order):
            names = [
                request.request_id
                for request in engine.scheduler.requests.values()
                if request.status.name == order[len(seen)]
            ]
            if names:
                seen.append(order[len(seen)])
                engine.llm.llm_engine.abort_request([names[-1]], internal=True)

    engine.run(abort)
    assert seen == order
    for name, expected in enumerate(reference):
        tokens = engine.tokens.get(f"r{name}", [])
        assert tokens == expected[: len(tokens)]


@pytest.mark.parametrize("only_connector", [False, True])
def test_reset_forgets_every_copy(
    make_engine: Any, random_prompts: Any, only_connector: bool
) -> None:
    engine = make_engine({}, blocks=30, only_connector=only_connector)
    engine.add_batch(8, 150, 120)
    for _ in range(60):
        engine.step()
    assert engine.stats.preemptions > 0
    while any(
        r.status.name == "WAITING_FOR_REMOTE_KVS" for r in engine.scheduler.requests.values()
    ):
        engine.step()  # vLLM cannot reset while a load is under way
    assert engine.core.reset_prefix_cache(reset_running_requests=True)
    copies = engine.planning.planner.copies
    assert all(copies.valid(f"r{i}") == 0 for i in range(8))
    before = engine.stats.blocks_in
    engine.step()
    assert engine.stats.blocks_in == before
    engine.run()


def test_shutdown_ends_threads_and_gives_memory_back(make_engine: Any) -> None:
    import threading

    before = {thread.name for thread in threading.enumerate()}
    engine = make_engine({}, blocks=30)
    engine.add_batch(4, 150, 60)
    for _ in range(30):
        engine.step()
    engine.close()
    started: Callable[[], set[str]] = lambda: {  # noqa: E731
        thread.name for thread in threading.enumerate() if thread.name.startswith("kvswitch")
    }
    assert not started() - before

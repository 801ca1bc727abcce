"""The custom engine: preempted or not, the tokens are the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvswitch import hookimpl
from kvswitch.errors import HostMemoryExhausted
from kvswitch.messages import Direction
from kvswitch_demo.engine import Engine
from kvswitch_demo.model import Llama, LlamaConfig, Weights
from kvswitch_demo.results import RunResult, figures
from kvswitch_demo.run import MODES, Mode, make_engine, serve
from kvswitch_demo.workload import Conversations, Script, Workload

CONFIG = LlamaConfig(
    vocab=64,
    hidden=64,
    ffn=96,
    layers=2,
    heads=6,
    kv_heads=2,
    head_dim=16,
    context=300,
    rope_theta=10_000.0,
    norm_eps=1e-5,
)


@pytest.fixture(scope="module")
def model() -> Iterator[Llama]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Llama(CONFIG, Weights.random(CONFIG))
    torch.set_num_threads(threads)


WORKLOAD = (
    Workload.load()
    .replace("engine", host_memory="1MiB", slots=4, memory_share=0.3, prefill_tokens=32)
    .replace("priorities", epoch=4, quantum=1)
    .replace("conversations", count=10)
)


@pytest.fixture(scope="module")
def scripts() -> Conversations:
    generator = torch.Generator().manual_seed(0)

    def prompt(tokens: int) -> list[int]:
        return torch.randint(0, 64, (tokens,), generator=generator).tolist()

    return [
        Script(
            arrival=0.0,
            prompts=[prompt(20 + 3 * number), prompt(9)],
            outputs=[12 + number, 15],
            pauses=[0.0],
        )
        for number in range(10)
    ]


@pytest.fixture(scope="module")
def reference(model: Llama, scripts: Conversations) -> RunResult:
    return serve(model, "reference", WORKLOAD, scripts)[0]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "reference"])
def test_tokens_are_those_of_a_run_without_preemption(
    mode: Mode, model: Llama, scripts: Conversations, reference: RunResult
) -> None:
    run, switched = serve(model, mode, WORKLOAD, scripts)
    assert run.stats.preemptions > 10
    assert len(switched) > 20
    assert run.tokens == reference.tokens
    assert (run.recomputed_tokens > 0) == (mode == "recompute")


def test_reference_preempts_nobody(reference: RunResult) -> None:
    assert reference.stats.preemptions == 0
    assert reference.recomputed_tokens == 0


def test_lost_bytes_would_be_noticed(
    model: Llama, scripts: Conversations, reference: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: a copy that brings zeros changes tokens."""
    from kvswitch.transfer.cpu import CpuBackend

    class Forgetful(CpuBackend):
        def open_queue(self, direction: Direction) -> Any:
            queue = super().open_queue(direction)
            if direction is Direction.IN:
                monkeypatch.setattr(queue, "copy", lambda copies, start, stop: None)
            return queue

    monkeypatch.setattr("kvswitch_demo.run.CpuBackend", Forgetful)
    assert serve(model, "kvswitch", WORKLOAD, scripts)[0].tokens != reference.tokens


def test_preparing_a_batch_is_no_scheduling(
    model: Llama, scripts: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = model.prepare

    def slowly(*args: Any) -> Any:
        time.sleep(0.002)
        return prepare(*args)

    monkeypatch.setattr(model, "prepare", slowly)
    run, _ = serve(model, "kvswitch", WORKLOAD, scripts[:3])
    busy = [i for i in run.iterations if i.decoding or i.prefilled]
    assert busy
    assert all(i.overhead <= i.ready - i.begin - 0.002 for i in busy)


def test_host_memory_too_small_recomputes_what_is_lost(
    model: Llama, scripts: Conversations, reference: RunResult
) -> None:
    block_bytes = reference.block_bytes
    tight = WORKLOAD.replace("engine", host_memory=str(8 * block_bytes))
    run, _ = serve(model, "kvswitch", tight, scripts)
    assert run.tokens == reference.tokens
    assert run.recomputed_tokens > 0
    assert run.stats.contaminated_blocks > 0


def test_failing_transfers_cost_recomputation_only(
    model: Llama, scripts: Conversations, reference: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch.transfer.cpu import CpuBackend

    class Faulty(CpuBackend):
        def open_queue(self, direction: Direction) -> Any:
            queue = super().open_queue(direction)
            copy, calls = queue.copy, iter(range(10**9))

            def sometimes(copies: Any, start: int, stop: int) -> None:
                if next(calls) % 3 == 0:
                    raise OSError("the link is down")
                copy(copies, start, stop)

            monkeypatch.setattr(queue, "copy", sometimes)
            return queue

    monkeypatch.setattr("kvswitch_demo.run.CpuBackend", Faulty)
    run, _ = serve(model, "kvswitch", WORKLOAD, scripts)
    assert run.stats.transfers_failed > 0
    assert run.recomputed_tokens > 0
    assert run.tokens == reference.tokens


def drive(engine: Engine, scripts: Conversations) -> None:
    for number, script in enumerate(scripts):
        engine.submit(number, script.prompts[0], script.outputs[0])
    while engine.busy:
        engine.step()
        engine.switch.check_integrity()
        engine.scheduler.check_integrity()


def test_free_blocks_may_hold_garbage(
    model: Llama, scripts: Conversations, reference: RunResult
) -> None:
    """Every block is NaN until it is written: nothing unwritten is ever read."""
    engine = make_engine(model, "kvswitch", WORKLOAD, scripts, plugins=())
    with engine.switch:
        engine.kv_cache.fill_(float("nan"))
        drive(engine, scripts)
        for number, script in enumerate(scripts):
            first_turn = len(script.prompts[0]) + script.outputs[0]
            expected = reference.tokens[number][:first_turn]
            assert engine.conversations[number].tokens == expected


def test_nothing_is_left_behind(model: Llama, scripts: Conversations) -> None:
    engine = make_engine(model, "kvswitch", WORKLOAD, scripts, plugins=())
    with engine.switch as switch:
        drive(engine, scripts)
        for number in range(len(scripts)):
            engine.close_conversation(number)
        deadline = time.monotonic() + 60
        while switch.planner.under_way or switch.planner.has_news:
            switch.step()
            assert time.monotonic() < deadline
            time.sleep(0.001)  # or copies would hardly get to run
        assert switch.available_blocks(headroom=False) == switch.layout.num_blocks
        assert switch.planner.copies.num_leases() == 0


def test_a_host_that_can_hold_nothing_is_survived(
    model: Llama, scripts: Conversations, reference: RunResult
) -> None:
    class Full:
        @hookimpl
        def kvswitch_preempt(self) -> None:
            raise HostMemoryExhausted("no room at all")

    engine = make_engine(model, "kvswitch", WORKLOAD, scripts, plugins=[Full()])
    with engine.switch:
        drive(engine, scripts)
    tokens = engine.conversations[0].tokens
    assert tokens == reference.tokens[0][: len(tokens)]


def test_figures_follow_their_definitions(reference: RunResult) -> None:
    turn = reference.turns[0]
    run = replace_turns(reference, [turn])
    shown = figures(run)
    assert shown["turns"] == 1
    assert shown["output_tokens"] == len(turn.token_times)
    assert shown["throughput_tokens_per_s"] == len(turn.token_times) / reference.seconds
    assert shown["ttft_max"] == turn.token_times[0] - turn.arrival


def replace_turns(run: RunResult, turns: list[Any]) -> RunResult:
    import msgspec

    return msgspec.structs.replace(run, turns=turns)

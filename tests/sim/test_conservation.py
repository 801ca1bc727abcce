"""Whatever happens, nothing is lost: every token, block and byte is accounted for."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvswitch.errors import ConfigError
from kvswitch.messages import Direction
from kvswitch.sim.profiles import load_profiles
from kvswitch.sim.run import Machine, Priorities, make_engine, simulate
from kvswitch.sim.systems import SYSTEMS, System, find_system
from kvswitch.sim.workload import Script, load_lengths, sample

MACHINE = Machine.of("a10", "llama-8b")


def small(blocks: int, host_blocks: int) -> Machine:
    """The A10 with so little memory that a few conversations fill it."""
    model = MACHINE.model
    weights = (model.weight_bytes + (blocks + 0.5) * MACHINE.block_bytes) / 2**30
    engine = msgspec.structs.replace(
        MACHINE.engine, memory_utilisation=1.0, activations=0.0, quantum=2, slots=16
    )
    gpu = msgspec.structs.replace(MACHINE.gpu, memory=weights)
    host = (host_blocks + 0.5) * MACHINE.block_bytes / 1e9
    return replace(MACHINE, gpu=gpu, engine=engine, host_memory=host)


turns = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 60)), min_size=1, max_size=4)
scripts = st.lists(
    st.builds(
        lambda arrival, turns, pause: Script(arrival, turns, [pause] * (len(turns) - 1)),
        st.floats(0, 3),
        turns,
        st.sampled_from([0.0, 0.05, 2.0]),
    ),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=10, deadline=None)
@given(
    scripts=scripts,
    blocks=st.integers(70, 120),
    host_blocks=st.sampled_from([3, 40, 400]),
    pattern=st.sampled_from(["random", "markov"]),
    seconds=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 3),
)
def test_tokens_blocks_and_bytes_are_conserved(
    name: str,
    scripts: list[Script],
    blocks: int,
    host_blocks: int,
    pattern: str,
    seconds: float | None,
    seed: int,
) -> None:
    machine = small(blocks, host_blocks)
    assert machine.device_blocks == blocks
    assert machine.host_blocks == host_blocks
    priorities = Priorities(pattern, epoch=5, seconds=seconds)  # type: ignore[arg-type]
    engine, memory = make_engine(SYSTEMS[name], scripts, machine, priorities, seed=seed)
    engine.serve()
    swaps = memory.stats
    engine.close()  # raises if a block or a lease has leaked

    # Tokens: each is made once; of each turn one is a first token, and all others have a gap.
    recorder = engine.recorder
    outputs = [output for script in scripts for _, output in script.turns]
    assert recorder.turns == len(recorder.ttft) == len(outputs)
    assert sum(recorder._tokens) == sum(outputs)
    assert sum(recorder._gap_counts) == sum(outputs) - len(outputs)
    assert min(recorder.ttft) > 0
    assert min(recorder._gaps, default=1.0) > 0

    # Prompts: what is computed and was not before is the prompts, and of every later turn the last
    # token of the one before. A sequence that is computed again adds the token it was to compute.
    prompts = sum(prompt for script in scripts for prompt, _ in script.turns)
    later = sum(len(script.turns) - 1 for script in scripts)
    first_time = recorder.tokens_prefilled - recorder.tokens_recomputed
    assert prompts + later <= first_time <= prompts + later + swaps.preemptions
    if not swaps.tokens_lost and SYSTEMS[name].next_turn != "drop":
        assert recorder.tokens_recomputed == 0

    # Bytes: all that was planned has moved or was cancelled, no faster than the link does.
    link = memory.link
    for direction, planned in ((Direction.IN, swaps.blocks_in), (Direction.OUT, swaps.blocks_out)):
        moved = link.moved[direction]
        least = moved * machine.block_bytes / link.pricing.bandwidth
        assert link.seconds[direction] >= least * (1 - 1e-9)
        assert moved + link.dropped[direction] == planned

    # Time: it passes in iterations and in between.
    assert engine.now >= sum(recorder._durations) - 1e-6
    assert engine.iterations == len(recorder._durations)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_same_run_gives_the_same_figures(name: str) -> None:
    workload = sample(load_lengths(), seed=0, count=30, rate=2.0, think=1.0, context=4096)
    machine = small(400, 800)
    first, second = (
        simulate(SYSTEMS[name], workload.scripts, machine, Priorities("random", 10))
        for _ in range(2)
    )
    measured = {"overhead": 0.0, "overhead_share": 0.0, "real_seconds": 0.0}
    assert msgspec.structs.replace(first, **measured) == msgspec.structs.replace(second, **measured)
    assert first.swaps["preemptions"] > 0


def served(system: System, count: int = 40, **priorities: object) -> object:
    workload = sample(load_lengths(), seed=0, count=count, rate=2.0, think=1.0, context=4096)
    when = Priorities("random", 10, **priorities)  # type: ignore[arg-type]
    return simulate(system, workload.scripts, small(400, 3000), when)


def test_each_stage_helps_where_it_should() -> None:
    """A negative control: the differences that figures show are there to be seen."""
    results = {name: served(SYSTEMS[name]) for name in SYSTEMS}
    base, groups, manager, reuse, ours, v1 = (
        results[name]
        for name in ("vllm-swap", "groups", "manager", "fastswitch", "kvswitch", "vllm-v1")
    )
    assert base.stall > 2 * groups.stall > 2 * manager.stall  # type: ignore[attr-defined]
    assert reuse.swaps["blocks_out_full"] < manager.swaps["blocks_out_full"]  # type: ignore[attr-defined]
    assert ours.ttft["0.95"] < base.ttft["0.95"]  # type: ignore[attr-defined]
    assert v1.recomputed > ours.recomputed == 0  # type: ignore[attr-defined]
    assert base.granularity("in") == 1.0 < groups.granularity("in")  # type: ignore[attr-defined]


def test_priorities_by_the_clock_change_as_often_as_asked() -> None:
    workload = sample(load_lengths(), seed=0, count=40, rate=2.0, think=1.0, context=4096)
    switched = [
        simulate(
            SYSTEMS["kvswitch"],
            workload.scripts,
            small(400, 3000),
            Priorities("random", seconds=seconds),
        ).swaps["preemptions"]
        for seconds in (0.5, 50.0)
    ]
    assert switched[0] > 2 * switched[1]


def test_what_cannot_work_is_said_at_the_start() -> None:
    script = Script(0.0, [(2000, 100)])
    with pytest.raises(ConfigError, match="2100 tokens does not fit into 100 device blocks"):
        simulate(SYSTEMS["kvswitch"], [script], small(100, 100), Priorities())
    with pytest.raises(ConfigError, match="does not hold a block"):
        _ = replace(MACHINE, host_memory=0.001).host_blocks
    with pytest.raises(ConfigError, match="no system 'vlm'; there are: vllm-swap"):
        find_system("vlm")
    with pytest.raises(ConfigError, match="seconds between updates"):
        Priorities(seconds=0.0)


def test_profiles_are_the_defaults_of_the_core() -> None:
    assert load_profiles().engine.headroom == 0.06

"""What `serving.py` measures, for short runs: figures in virtual time, so they never vary."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import INSTANT, Served, free_lists, granularity, serve
from serving_workloads import FEW_LONG, MANY_SHORT, SHAREGPT, Workload


def saturated(policy: str = "random", **machine: object) -> Served:
    """Some iterations under more load than the machine can serve."""
    settings: dict[str, object] = {"headroom": 0.15} | machine
    return serve(
        SHAREGPT, seed=0, count=300, policy=policy, warm_up=2000, iterations=1000, **settings
    )


# -- the harness -----------------------------------------------------------------------------------


def test_the_same_conversations_give_the_same_figures() -> None:
    assert serve(MANY_SHORT, count=40) == serve(MANY_SHORT, count=40)
    assert serve(MANY_SHORT, count=40) != serve(MANY_SHORT, seed=1, count=40)


def test_all_that_was_asked_for_is_served() -> None:
    scripts = SHAREGPT.scripts(seed=3, count=20)
    served = serve(SHAREGPT, seed=3, count=20, device_blocks=600)
    assert served.turns == sum(len(script.turns) for script in scripts)
    assert served.tokens == sum(output for script in scripts for _, output in script.turns)
    assert served.stats.preemptions > 0


# -- what the planner has to reach -----------------------------------------------------------------


def test_whole_contexts_come_in_and_go_out_in_long_runs() -> None:
    served = saturated()
    assert served.occupancy >= 0.9
    assert granularity(served.stats.blocks_in, served.stats.copies_in) >= 20
    served = saturated(reuse=False)
    assert served.occupancy >= 0.9
    assert granularity(served.stats.blocks_in, served.stats.copies_in) >= 20
    assert granularity(served.stats.blocks_out, served.stats.copies_out) >= 20


def test_lists_of_free_blocks_give_single_blocks() -> None:
    with free_lists():
        served = saturated()
    assert served.occupancy >= 0.9
    assert granularity(served.stats.blocks_in, served.stats.copies_in) < 1.1


@pytest.mark.parametrize("policy", ["random", "markov"])
def test_reuse_spares_more_than_half_of_the_same_swap_outs(policy: str) -> None:
    full, spared = (
        saturated(policy, reuse=reuse, strategy="sync", bandwidth=INSTANT).stats
        for reuse in (False, True)
    )
    assert spared.preemptions == pytest.approx(full.preemptions, rel=0.02)
    assert spared.blocks_out <= 0.47 * full.blocks_out


def test_the_size_of_the_first_group_hardly_matters() -> None:
    stats = [saturated(first_group=blocks).stats for blocks in (4, 60, 190)]
    runs = [granularity(s.blocks_in, s.copies_in) for s in stats]
    assert max(runs) - min(runs) <= 0.15 * max(runs)


@pytest.mark.parametrize(
    ("workload", "count", "better", "worse"),
    [
        pytest.param(MANY_SHORT, 150, "sync", "async", id="many short"),
        pytest.param(FEW_LONG, 20, "async", "sync", id="few long"),
    ],
)
def test_adaptive_waiting_keeps_up_with_the_better_forced_mode(
    workload: Workload, count: int, better: str, worse: str
) -> None:
    speed = {
        mode: serve(workload, count=count, strategy=mode).throughput
        for mode in (better, worse, "adaptive")
    }
    assert speed[better] >= 1.05 * speed[worse], "the workload does not tell them apart"
    assert speed["adaptive"] >= 0.98 * speed[better]


@pytest.mark.parametrize("host_blocks", [60, 600])
def test_with_little_host_memory_all_is_served(host_blocks: int) -> None:
    plenty = serve(SHAREGPT, count=40, device_blocks=600)
    served = serve(SHAREGPT, count=40, device_blocks=600, host_blocks=host_blocks)
    assert served.stats.contaminated_blocks > 0
    assert served.recomputed > plenty.recomputed == 0
    assert (served.turns, served.tokens) == (plenty.turns, plenty.tokens)

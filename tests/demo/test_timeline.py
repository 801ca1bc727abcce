"""Which moment of a run its timeline shows."""

from __future__ import annotations

from kvswitch import SwapStats
from kvswitch_demo.report.timeline import timeline
from kvswitch_demo.results import IterationRecord, RunResult, TransferRecord


def run_of(mode: str, epochs: dict[int, tuple[int, int, float]]) -> RunResult:
    """40 iterations of a second; at some, an epoch: (preempted, resumed, seconds waited)."""
    run = RunResult(mode, 40.0, [], [], [], SwapStats(), 1, 0, 0.0, 0.0, {})
    epoch = 0
    for i in range(40):
        preempted, resumed, wait = epochs.get(i, (0, 0, 0.0))
        epoch += i in epochs
        run.iterations.append(
            IterationRecord(i, i + wait + 0.01, i + 1, wait, 0.01, 4, 0, preempted, resumed, epoch)
        )
        if wait:
            run.transfers.append(TransferRecord(True, i + 0.01, i + wait, 7, 10 * i, 7))
    return run


def test_modes_are_shown_where_they_switch_equally_much_and_wait_in_the_middle() -> None:
    many = run_of(
        "per-block",
        {5: (1, 0, 0.5), 10: (2, 1, 0.3), 15: (2, 1, 0.1), 20: (1, 2, 0.2), 25: (5, 4, 0.9)},
    )
    few = run_of("kvswitch", {8: (1, 1, 0.1), 16: (2, 1, 0.2)})
    svg = timeline([few, many])
    assert svg is not None
    assert "per-block: 1 out, 2 in" in svg
    assert "kvswitch: 2 out, 1 in" in svg
    assert "200 copies" in svg
    assert "160 copies" in svg


def test_recomputed_tokens_have_their_share_of_a_forward() -> None:
    run = run_of("recompute", {10: (1, 1, 0.0)})
    without = timeline([run])
    run.iterations[10].prefilled = 60
    run.iterations[10].recomputed = 32
    with_them = timeline([run])
    assert without is not None
    assert with_them is not None
    assert "4 + 60" in with_them
    assert with_them.count("var(--recompute)") == without.count("var(--recompute)") + 2


def test_without_switches_there_is_nothing_to_show() -> None:
    assert timeline([run_of("reference", {10: (1, 1, 0.1)})]) is None
    assert timeline([run_of("kvswitch", {10: (0, 0, 0.0)}), run_of("recompute", {})]) is None

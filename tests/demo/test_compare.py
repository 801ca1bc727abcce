"""Runs set side by side: the first token that differs, and how many times better."""

from __future__ import annotations

import pytest

from kvswitch import SwapStats
from kvswitch_demo.report.compare import compare_tokens, times_better
from kvswitch_demo.results import IterationRecord, RunResult, TurnRecord

MODES = ("reference", "recompute", "per-block", "kvswitch")


def run_of(mode: str, *, seconds: float = 10.0, stall: float = 0.0) -> RunResult:
    """100 turns of two tokens, whose TTFT and gap are a hundredth of the run's length."""
    pace = seconds / 100
    return RunResult(
        mode=mode,
        seconds=seconds,
        turns=[TurnRecord(i, 0, i, 8, [i + pace, i + 2 * pace]) for i in range(100)],
        iterations=[IterationRecord(0.0, 1.0, seconds, stall, 0.1, 8, 0, 1, 1, 1)],
        transfers=[],
        stats=SwapStats(),
        block_bytes=1000,
        recomputed_tokens=0,
        inversion_seconds=2.0,
        inversion_request_seconds=4.0,
        tokens={number: list(range(30)) for number in range(12)},
    )


def all_modes() -> list[RunResult]:
    return [run_of(mode) for mode in MODES]


def test_identical_tokens_are_found_identical() -> None:
    identity = compare_tokens(all_modes())
    assert identity.identical
    assert identity.against == "reference"
    assert identity.compared == ("recompute", "per-block", "kvswitch")
    assert (identity.conversations, identity.tokens) == (12, 360)
    assert "360 tokens of 12 conversations are identical" in str(identity)


def test_the_first_token_that_differs_is_named() -> None:
    runs = all_modes()
    runs[3].tokens[10][5] = -1
    runs[3].tokens[8][17] = -2
    runs[3].tokens[8][20] = -3
    identity = compare_tokens(runs)
    assert not identity.identical
    assert list(identity.differences) == ["kvswitch"]
    found = identity.differences["kvswitch"]
    assert (found.conversations, found.conversation, found.position) == (2, 8, 17)
    assert (found.found, found.expected) == (-2, 17)
    assert "conversation 8 at position 17: token -2 instead of 17" in str(identity)


@pytest.mark.parametrize("shorter", [0, 1])
def test_a_shorter_conversation_differs_where_it_ends(shorter: int) -> None:
    runs = all_modes()[:2]
    del runs[shorter].tokens[4][25:], runs[shorter].tokens[9]
    found = compare_tokens(runs).differences["recompute"]
    assert (found.conversations, found.conversation, found.position) == (2, 4, 25)
    assert (found.expected, found.found)[shorter] is None
    assert (found.expected, found.found)[1 - shorter] == 25


def test_a_missing_conversation_differs_from_the_start() -> None:
    runs = all_modes()[:2]
    del runs[1].tokens[9]
    found = compare_tokens(runs).differences["recompute"]
    assert (found.conversation, found.position, found.expected, found.found) == (9, 0, 0, None)


def test_nothing_compared_is_not_identical() -> None:
    alone = compare_tokens([run_of("kvswitch")])
    assert not alone.identical
    assert "Nothing to compare" in str(alone)
    empty = all_modes()
    for run in empty:
        run.tokens = {}
    assert not compare_tokens(empty).identical


def test_without_a_reference_run_the_first_is_compared_with() -> None:
    identity = compare_tokens(all_modes()[2:])
    assert identity.identical
    assert identity.against == "per-block"


def test_times_better_is_above_one_whichever_way_a_figure_goes() -> None:
    runs = [
        run_of("recompute", seconds=20.0),
        run_of("per-block", seconds=15.0, stall=0.5),
        run_of("kvswitch", seconds=10.0, stall=0.1),
    ]
    better = times_better(runs)
    assert list(better) == ["recompute", "per-block"]
    assert better["recompute"]["throughput_tokens_per_s"] == pytest.approx(2.0)
    assert better["recompute"]["ttft_p95"] == pytest.approx(2.0)
    assert better["per-block"]["stall"] == pytest.approx(5.0)
    assert better["per-block"]["inversion"] == pytest.approx(1.0)


def test_a_ratio_needs_both_figures() -> None:
    better = times_better(all_modes())
    assert better["recompute"]["stall"] is None  # neither waits for copies
    assert better["recompute"]["tbt_p99"] is None  # too few gaps


def test_no_ratios_without_a_kvswitch_run() -> None:
    assert times_better(all_modes()[:3]) == {}

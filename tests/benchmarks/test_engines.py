"""The arithmetic of the engines' comparisons (tests/benchmarks/engines)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "engines"))

from comparison import Outcome, settings
from rounds import interval, report, workload_of


def test_gaps_and_first_tokens_are_counted_from_arrival() -> None:
    outcome = Outcome(
        tokens={"a": [1, 2, 3], "b": [4]},
        arrived={"a": 1.0, "b": 0.0},
        times={"a": [2.0, 2.5, 4.0], "b": [3.0]},
        seconds=4.0,
    )
    figures = outcome.figures()
    assert figures["throughput"] == 1.0
    assert figures["ttft_p50"] == pytest.approx(2.0)
    assert figures["between_p50"] == pytest.approx(1.0)


@pytest.mark.parametrize("epoch", [1, 3, 10])
def test_who_came_in_can_leave_before_priorities_change_again(epoch: int) -> None:
    chosen = settings("kvswitch", 0, 5, argparse.Namespace(epoch=epoch))
    assert chosen is not None
    assert chosen["epoch"] == epoch
    assert chosen["quantum"] < epoch


# Order statistics around the median: how many are left out on each side, from tables of the sign
# test at 5%.
@pytest.mark.parametrize(("count", "left_out"), [(6, 0), (9, 1), (12, 2), (20, 5), (40, 13)])
def test_an_interval_leaves_out_what_the_sign_test_allows(count: int, left_out: int) -> None:
    values = [float(i) for i in range(count)]
    assert interval(values) == (left_out, count - 1 - left_out)


def test_an_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.exponential(1.0, (2000, 20))
    held = sum(low <= np.log(2) <= high for low, high in map(interval, samples.tolist()))
    assert 0.94 <= held / len(samples) <= 0.98


def test_a_round_has_names_of_its_own_and_all_is_there_from_the_start() -> None:
    options = argparse.Namespace(workload="turns", first_seed=0)
    first, second = workload_of(options, 0), workload_of(options, 1)
    assert not {item.name for item in first} & {item.name for item in second}
    assert {item.after for item in first} - {None} <= {item.name for item in first}
    assert all(item.arrival == 0.0 for item in first)


def test_rounds_are_compared_with_the_first_mode() -> None:
    text = report({"never again": [2.0] * 6, "never": [2.0] * 6, "calm": [4.0] * 6})
    assert "| never again | 1.000 | 1.000 to 1.000 |" in text
    assert "| calm | 0.500 | 0.500 to 0.500 |" in text

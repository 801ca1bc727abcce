"""Two tensor-parallel ranks, each a scheduler with a planner: told the same, they do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

OnRanks = Callable[..., list[dict[str, Any]]]
MEMORY = {"host_memory": "64MiB"}

# What is measured may differ between ranks; whatever is decided may not.
OWN = {"worst", "identical", "failed"}


def decided(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What both ranks have come to."""
    first, second = ({k: v for k, v in each.items() if k not in OWN} for each in found)
    assert first == second
    return first


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_retractions_on_two_ranks_change_nothing(on_two_ranks: OnRanks, overlap: bool) -> None:
    found = on_two_ranks("switching.forced", config=MEMORY, page_size=16, overlap=overlap)
    both = decided(found)
    assert both["retractions"] >= 12
    assert both["loaded"] > 0
    assert both["recomputed"] <= (both["retractions"] if overlap else 0)
    assert max(each["worst"] for each in found) < 1e-4


def test_random_priorities_on_two_ranks_change_nothing(on_two_ranks: OnRanks) -> None:
    config = {
        **MEMORY,
        "policy": "random",
        "policy_settings": {"seed": 1, "sequences": 28, "epochs": 500},
        "epoch": 3,
        "quantum": 2,
    }
    both = decided(on_two_ranks("scheduling.pressure", config=config, page_size=16, overlap=True))
    assert both["retractions"] > 10
    assert both["changed"] == 14


def test_a_copy_that_fails_on_one_rank_is_lost_on_both(on_two_ranks: OnRanks) -> None:
    found = on_two_ranks("failures.faults", config=MEMORY, overlap=True, out=0.1, back=0.4, rank=1)
    assert [each["failed"] > 0 for each in found] == [False, True]
    both = decided(found)
    assert both["transfers_failed"] > 0
    assert both["recomputed"] > 0
    assert both["loaded"] > 0

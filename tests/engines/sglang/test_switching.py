"""Real SGLang under pressure: the same tokens, the same bytes, nothing leaks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Scenario = Callable[..., dict[str, Any]]
MEMORY = {"host_memory": "64MiB"}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("page_size", "overlap"),
    [
        (16, False),
        (1, True),
        pytest.param(16, True, marks=slow),
        pytest.param(1, False, marks=slow),
    ],
)
def test_forced_retractions_change_nothing(
    scenario: Scenario, page_size: int, overlap: bool
) -> None:
    found = scenario("forced", config=MEMORY, page_size=page_size, overlap=overlap)
    assert found["retractions"] >= 12
    assert found["recomputed"] <= found["retractions"], "one token of each at most"
    assert found["spared"] > 0.2
    assert found["worst"] < 1e-4, "a token recomputed in another batch differs by rounding only"


@pytest.mark.parametrize("page_size", [1, 16])
def test_what_is_restored_is_identical_bit_by_bit(scenario: Scenario, page_size: int) -> None:
    found = scenario("exact", config=MEMORY, page_size=page_size)
    assert found["requests"] == 6
    assert found["partial"] > 0 or page_size == 1


def test_other_bytes_on_the_host_give_other_tokens(scenario: Scenario) -> None:
    assert scenario("wrong_bytes", config=MEMORY)["same"] == [False, False, True, True]


@pytest.mark.parametrize(
    ("page_size", "overlap", "epoch"), [(16, False, 3), (16, True, 10), (1, True, 3)]
)
def test_random_priorities_under_pressure_change_nothing(
    scenario: Scenario, page_size: int, overlap: bool, epoch: int
) -> None:
    found = scenario("pressure", config=MEMORY, page_size=page_size, overlap=overlap, epoch=epoch)
    assert found["retractions"] > 10
    assert found["recomputed"] <= found["retractions"]


@slow
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("epoch", [3, 10])
def test_random_priorities_whole_matrix(
    scenario: Scenario, page_size: int, overlap: bool, epoch: int
) -> None:
    found = scenario(
        "pressure", config=MEMORY, page_size=page_size, overlap=overlap, epoch=epoch, count=24
    )
    assert found["recomputed"] <= found["retractions"]


def test_who_is_important_takes_memory_from_others(scenario: Scenario) -> None:
    found = scenario("preemption_for_memory", config={**MEMORY, "epoch": 4, "quantum": 0})
    assert found["gone"] >= 1
    assert found["again"] == found["gone"], "nobody leaves for an equal"
    assert found["raised"], "a priority that was raised at run time counts"
    assert found["recomputed"] == 0


def test_who_shares_a_prefix_with_the_tree_takes_memory_too(scenario: Scenario) -> None:
    found = scenario("preemption_with_a_prefix", config={**MEMORY, "epoch": 4, "quantum": 0})
    assert found["in"]
    assert found["gone"] >= 1


@pytest.mark.parametrize("page_size", [16, pytest.param(1, marks=slow)])
def test_the_next_turn_finds_the_last_one_on_the_host(scenario: Scenario, page_size: int) -> None:
    found = scenario("turns", config=MEMORY, page_size=page_size)
    last = found["history"] - 1  # whose KV is never computed
    assert last - page_size < found["loaded"] <= last
    assert found["prefix"] - page_size < found["shared"] <= found["prefix"]
    assert found["foreign"] == 0, "another tenant's"
    assert found["flushed"] == 0, "from before the cache was flushed"


def test_a_forward_begins_before_its_load_has_ended(scenario: Scenario) -> None:
    found = scenario("layers", config={**MEMORY, "strategy": "async", "window": "64KiB"})
    assert found["first"] > 0
    assert found["recomputed"] == 0
    assert found["blocks_per_copy"] >= 8


@slow
def test_a_load_may_also_be_waited_for(scenario: Scenario) -> None:
    found = scenario("layers", config={**MEMORY, "strategy": "sync"})
    assert found["asked"] == 0
    assert found["recomputed"] == 0


def test_recomputing_instead_changes_nothing(scenario: Scenario) -> None:
    found = scenario(
        "forced", config={**MEMORY, "preemption": "recompute"}, page_size=16, overlap=False
    )
    assert found["loaded"] == 0
    assert found["recomputed"] > 0

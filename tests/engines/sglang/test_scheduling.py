"""Real SGLang when priorities change and somebody has to wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Scenario = Callable[..., dict[str, Any]]
MEMORY = {"host_memory": "64MiB"}
slow = pytest.mark.slow


def by_chance(epoch: int, sequences: int) -> dict[str, Any]:
    return {
        **MEMORY,
        "policy": "random",
        "policy_settings": {"seed": epoch, "sequences": sequences, "epochs": 500},
        "epoch": epoch,
        "quantum": min(2, epoch - 1),
    }


@pytest.mark.parametrize(
    ("page_size", "overlap", "epoch", "arguments"),
    [
        (16, False, 3, {}),
        (16, True, 10, {}),
        (1, True, 3, {}),
        (16, True, 3, {"enable_mixed_chunk": True, "chunked_prefill_size": 64}),
    ],
)
def test_random_priorities_under_pressure_change_nothing(
    scenario: Scenario, page_size: int, overlap: bool, epoch: int, arguments: dict[str, Any]
) -> None:
    found = scenario(
        "scheduling.pressure",
        config=by_chance(epoch, 28),
        page_size=page_size,
        overlap=overlap,
        arguments=arguments,
    )
    assert found["changed"] == 14, "everybody had several priorities"
    assert found["retractions"] > 10
    assert found["recomputed"] <= (found["retractions"] if overlap else 0)
    assert found["worst"] < 1e-4


@slow
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("epoch", [3, 10])
def test_random_priorities_whole_matrix(
    scenario: Scenario, page_size: int, overlap: bool, epoch: int
) -> None:
    found = scenario(
        "scheduling.pressure",
        config=by_chance(epoch, 48),
        page_size=page_size,
        overlap=overlap,
        count=24,
    )
    assert found["retractions"] > 20
    assert found["recomputed"] <= (found["retractions"] if overlap else 0)
    assert found["worst"] < 1e-4


@pytest.mark.parametrize("overlap", [False, True])
def test_pages_are_written_only_when_their_copies_have_ended(
    scenario: Scenario, overlap: bool
) -> None:
    """On a slow link, forwards come to pages that are still being sent."""
    found = scenario(
        "scheduling.pressure",
        config=by_chance(3, 28),
        page_size=16,
        overlap=overlap,
        bandwidth=3e7,
    )
    assert found["conflicts"] > 0
    assert found["recomputed"] <= (found["retractions"] if overlap else 0)


def test_who_is_important_takes_memory_from_others(scenario: Scenario) -> None:
    found = scenario(
        "scheduling.preemption_for_memory", config={**MEMORY, "epoch": 4, "quantum": 0}
    )
    assert found["gone"] >= 1
    assert found["again"] == found["gone"], "nobody leaves for an equal"
    assert found["raised"], "a priority that was raised at run time counts"
    assert found["recomputed"] == 0


def test_nobody_is_preempted_beside_one_whose_last_token_is_under_way(scenario: Scenario) -> None:
    found = scenario("scheduling.last_token_under_way", config=MEMORY)
    assert found == {"same": True, "passes": 2, "preempted": 0}


def test_who_shares_a_prefix_with_the_tree_takes_memory_too(scenario: Scenario) -> None:
    found = scenario(
        "scheduling.preemption_with_a_prefix", config={**MEMORY, "epoch": 4, "quantum": 0}
    )
    assert found["in"]
    assert found["gone"] >= 1


LOW_FIRST = {"schedule_low_priority_values_first": True}
APART = {"priority_scheduling_preemption_threshold": 10}


@pytest.mark.parametrize(
    ("low", "high", "arguments", "gets_in"),
    [
        (1, 2, {}, True),
        (2, 2, {}, False),
        (1, 11, APART, False),
        pytest.param(1, 12, APART, True, marks=slow),
        (2, 1, LOW_FIRST, True),
        pytest.param(1, 2, LOW_FIRST, False, marks=slow),
        (1, 2, {"disable_priority_preemption": True}, False),
    ],
)
def test_who_takes_a_slot(
    scenario: Scenario, low: int, high: int, arguments: dict[str, Any], gets_in: bool
) -> None:
    config = {**MEMORY, "epoch": 4, "quantum": 0}
    found = scenario(
        "scheduling.passes_until_in", config=config, low=low, high=high, arguments=arguments
    )
    assert (0 < found["waited"] <= 3) == gets_in
    assert found["left"] == gets_in
    assert found["recomputed"] == 0


def test_who_has_just_come_in_stays_for_a_quantum(scenario: Scenario) -> None:
    found = scenario(
        "scheduling.passes_until_in", config={**MEMORY, "epoch": 12, "quantum": 8}, low=1, high=2
    )
    assert 6 <= found["waited"] <= 9
    assert found["left"] == 1


@pytest.mark.parametrize(("beside", "left"), [(100, 1), (300, 0)])
def test_nobody_leaves_for_one_who_does_not_fit_even_then(
    scenario: Scenario, beside: int, left: int
) -> None:
    found = scenario(
        "scheduling.passes_until_in",
        config={**MEMORY, "epoch": 4, "quantum": 0},
        low=1,
        high=2,
        arguments={"max_running_requests": 8},
        beside=beside,
        prompt=350,
    )
    assert found["left"] == left
    assert (found["waited"] == 1) == bool(left)


def test_with_ageing_nobody_waits_for_ever(scenario: Scenario) -> None:
    config = {**MEMORY, "epoch": 4, "quantum": 0}
    assert scenario("scheduling.raised_by_ageing", config=config)["waited"] == -1
    config["policy_settings"] = {"ageing": 2}
    assert scenario("scheduling.raised_by_ageing", config=config)["waited"] > 0


def test_a_session_is_served_and_not_preempted(scenario: Scenario) -> None:
    found = scenario("scheduling.sessions", config={**MEMORY, "epoch": 4, "quantum": 0})
    assert found == {"kept": 0, "in": False, "left": 0}


def test_who_is_preempted_is_not_turned_away_from_a_full_queue(scenario: Scenario) -> None:
    found = scenario("scheduling.little_queue", config={**MEMORY, "epoch": 4, "quantum": 0})
    assert found["left"] >= 2
    assert found["tokens"] == [60] * 5

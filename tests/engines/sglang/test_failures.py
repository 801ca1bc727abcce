"""Whatever fails costs at most a recomputation; whoever leaves leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Scenario = Callable[..., dict[str, Any]]
MEMORY = {"host_memory": "64MiB"}
MARKOV = {
    "policy": "markov",
    "policy_settings": {"seed": 1, "sequences": 4096, "epochs": 500},
}


@pytest.mark.parametrize(
    ("overlap", "out", "back", "chunk"),
    [
        (True, 0.1, 0.4, None),
        (False, 0.2, 0.5, 32),
        pytest.param(True, 0.4, 0.0, 32, marks=pytest.mark.slow),
        pytest.param(False, 0.0, 0.4, None, marks=pytest.mark.slow),
    ],
)
def test_failed_copies_are_recomputed(
    scenario: Scenario, overlap: bool, out: float, back: float, chunk: int | None
) -> None:
    found = scenario(
        "failures.faults", config=MEMORY, overlap=overlap, out=out, back=back, chunk=chunk
    )
    assert found["failed"] > 0
    assert found["transfers_failed"] > 0
    assert found["recomputed"] > 0
    assert found["loaded"] > 0, "others went well"


def test_little_host_memory_means_recomputation(scenario: Scenario) -> None:
    found = scenario("failures.little_host_memory", config={"host_memory": "1MiB"})
    assert found["recomputed"] > 0
    assert found["loaded"] > 0


@pytest.mark.parametrize("important_first", [True, False])
def test_the_host_keeps_what_is_important(scenario: Scenario, important_first: bool) -> None:
    found = scenario(
        "failures.room_for_one", config={"host_memory": "512KiB"}, important_first=important_first
    )
    assert found["p5"] >= 90
    assert found["p1"] < 90


def test_what_is_being_sent_is_kept_when_its_request_is_aborted(scenario: Scenario) -> None:
    assert scenario("failures.abort_while_away", config=MEMORY) == 80


def test_aborts_leave_nothing_behind(scenario: Scenario) -> None:
    found = scenario("failures.aborts", config=MEMORY)
    assert found["survived"] >= 5
    assert min(found["waiting"], found["preempted"], found["running"]) >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seed", "page_size", "overlap", "config"),
    [
        (0, 16, True, {}),
        (1, 1, True, {"policy_settings": {"ageing": 2}}),
        (
            2,
            16,
            False,
            {"policy": "markov", "policy_settings": {"seed": 1, "sequences": 4096, "epochs": 500}},
        ),
    ],
)
def test_soak(
    scenario: Scenario, seed: int, page_size: int, overlap: bool, config: dict[str, Any]
) -> None:
    """Ten minutes in all."""
    found = scenario(
        "failures.soak",
        config={"host_memory": "24MiB", "epoch": 5, "quantum": 2, **config},
        seconds=200,
        seed=seed,
        page_size=page_size,
        overlap=overlap,
        timeout=800,
    )
    assert found["done"] > 100
    assert found["failed"] > 0

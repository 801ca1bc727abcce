"""Whatever fails costs at most a recomputation; whoever leaves leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Scenario = Callable[..., dict[str, Any]]
MEMORY = {"host_memory": "64MiB"}


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
    found = scenario("faults", config=MEMORY, overlap=overlap, out=out, back=back, chunk=chunk)
    assert found["failed"] > 0
    assert found["transfers_failed"] > 0
    assert found["recomputed"] > 0
    assert found["loaded"] > 0, "others went well"


def test_little_host_memory_means_recomputation(scenario: Scenario) -> None:
    found = scenario("little_host_memory", config={"host_memory": "1MiB"})
    assert found["recomputed"] > 0
    assert found["loaded"] > 0


def test_aborts_leave_nothing_behind(scenario: Scenario) -> None:
    assert scenario("aborts", config=MEMORY)["aborted"] > 10


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "page_size"), [(0, 16), (1, 1)])
def test_soak(scenario: Scenario, seed: int, page_size: int) -> None:
    found = scenario(
        "soak",
        config={"host_memory": "24MiB", "epoch": 5, "quantum": 2},
        seconds=300,
        seed=seed,
        page_size=page_size,
        timeout=800,
    )
    assert found["done"] > 100

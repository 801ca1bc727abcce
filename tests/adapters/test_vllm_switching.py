"""Who gives way to whom in vLLM: no vLLM needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch_vllm.priorities import Priorities
from kvswitch_vllm.settings import Settings
from kvswitch_vllm.switching import Candidates, choose

Request = tuple[float, int, bool]  # priority (lower is more important), blocks, whether it runs


def decide(
    requests: Sequence[Request],
    *,
    room: int,
    slots: int = 8,
    headroom: int = 0,
    protected: int = -1,
) -> list[int]:
    priority, blocks, running = (np.array(column) for column in zip(*requests, strict=True))
    shielded = np.arange(len(requests)) == protected
    them = Candidates(priority * 1.0, np.arange(len(requests)) * 1.0, blocks, running, shielded)
    return choose(them, room=room, slots=slots, headroom=headroom)[0]


def test_the_least_important_leaves_and_no_more_than_must() -> None:
    requests = [(0, 4, False), (3, 4, True), (1, 4, True), (2, 4, True)]
    assert decide(requests, room=0) == [1]
    assert decide(requests, room=4) == []
    assert decide([(0, 5, False), *requests[1:]], room=0) == [1, 3]


def test_nobody_leaves_for_a_less_important_one() -> None:
    assert decide([(2, 4, False), (1, 4, True)], room=0) == []


def test_equals_stay() -> None:
    assert decide([(1, 4, False), (1, 4, True)], room=0) == []


def test_slots_count_too() -> None:
    requests = [(0, 1, False), (1, 1, True), (2, 1, True)]
    assert decide(requests, room=50, slots=2) == [2]
    assert decide(requests, room=50, slots=3) == []


def test_the_quantum_protects() -> None:
    requests = [(0, 4, False), (1, 4, True), (2, 4, True)]
    assert decide(requests, room=0, protected=2) == []
    assert decide(requests, room=0, protected=1) == [2]


def test_nobody_leaves_in_vain() -> None:
    """All that may leave do not suffice, or the first in line does not fit: all stay."""
    assert decide([(0, 9, False), (1, 4, True), (2, 4, True)], room=0) == []
    requests = [(0, 20, False), (1, 4, False), (2, 4, True)]
    assert decide(requests, room=0) == []


def test_headroom_stays_free() -> None:
    requests = [(0, 4, False), (1, 4, True), (2, 4, True)]
    assert decide(requests, room=4, headroom=4) == [2]
    assert decide(requests, room=8, headroom=4) == []


def test_nobody_gives_way_for_headroom_to_a_less_important_smaller_one() -> None:
    requests = [(0, 50, True), (1, 42, True), (7, 1, True), (3, 20, False)]
    assert decide(requests, room=3, headroom=5) == []
    assert decide(requests, room=30, headroom=5) == []


def test_who_takes_all_gets_it_once_nobody_is_protected() -> None:
    # Beside others vLLM would ask for the headroom, too.
    requests = [(0, 8, False), (1, 4, True), (2, 4, True)]
    assert decide(requests, room=0, headroom=2) == [2, 1]
    assert decide(requests, room=0, headroom=2, protected=1) == []


def test_settings_are_checked() -> None:
    assert Settings.from_mapping({"host_memory": "1GiB", "quantum": 2}).quantum == 2
    with pytest.raises(ConfigError, match="did you mean 'epoch'"):
        Settings.from_mapping({"epok": 2})
    with pytest.raises(ConfigError, match="below epoch=25"):
        Settings.from_mapping({"quantum": 25})


class FakeRequest:
    def __init__(self, name: str, priority: float = 0) -> None:
        self.request_id = name
        self.priority = priority


def test_waiting_ages() -> None:
    settings = Settings.from_mapping({"epoch": 2, "quantum": 1, "policy_settings": {"ageing": 1}})
    priorities = Priorities(settings)
    runs, waits = FakeRequest("runs"), FakeRequest("waits", 2)
    for request in (runs, waits):
        priorities.add(request)
    changed = [priorities.begin([runs], [runs, waits]) for _ in range(7)]
    assert changed == [True, False] * 3 + [True]
    assert (runs.priority, waits.priority) == (0, -1)


def test_trace_gives_the_same_priorities_to_the_same_arrivals() -> None:
    settings = Settings.from_mapping(
        {
            "policy": "random",
            "policy_settings": {"seed": 3, "sequences": 4, "epochs": 9},
            "epoch": 6,
        }
    )

    def run() -> list[list[float]]:
        priorities = Priorities(settings)
        requests = [FakeRequest(str(i)) for i in range(6)]  # more than the trace has
        for request in requests:
            priorities.add(request)
        seen = []
        for _ in range(30):
            priorities.begin([], requests)
            seen.append([request.priority for request in requests])
        return seen

    assert run() == run()
    assert all(row[0] == row[4] and row[1] == row[5] for row in run())


def test_quantum_begins_with_switching_in() -> None:
    priorities = Priorities(Settings.from_mapping({"epoch": 9, "quantum": 3}))
    request = FakeRequest("a")
    priorities.add(request)
    priorities.begin([], [request])
    priorities.entered("a")
    protected = []
    for _ in range(4):
        protected.append(priorities.protected(request))
        priorities.begin([request], [request])
    assert protected == [True, True, True, False]

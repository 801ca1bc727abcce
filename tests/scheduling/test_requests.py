"""Priorities of requests that an engine schedules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError, UnknownSequence
from kvswitch.scheduling import FixedPolicy, PriorityTrace, RequestPriorities, TracePolicy


def test_a_fixed_policy_leaves_everybody_as_they_came() -> None:
    priorities = RequestPriorities(FixedPolicy(), epoch=2, quantum=1)
    assert priorities.add("a", 3.0) == 3.0
    assert priorities.begin([]) == {"a": 3.0}
    assert priorities.begin([]) == {}, "not the first iteration of an epoch"
    assert priorities.set_base("a", -1.0) == -1.0
    assert priorities.begin([]) == {"a": -1.0}


def test_who_waits_gains_and_falls_back_once_it_has_run() -> None:
    priorities = RequestPriorities(FixedPolicy(ageing=1), epoch=1, quantum=0)
    priorities.begin([])
    priorities.add("a", 0.0)
    seen = [priorities.begin(running)["a"] for running in ([], [], ["a"], [])]
    assert seen == [1.0, 2.0, 0.0, 1.0]


def test_a_policy_that_answers_nonsense_changes_nothing() -> None:
    class Broken(FixedPolicy):
        answer = np.nan

        def priorities(self, *asked: Any) -> Any:
            return np.full(len(asked[1]), self.answer)

    policy = Broken()
    priorities = RequestPriorities(policy, epoch=2, quantum=1)
    with pytest.raises(ConfigError, match="one finite priority"):
        priorities.add("a", 1.0)
    assert "a" not in priorities
    policy.answer = 1.0
    priorities.add("a", 1.0)
    policy.answer = np.inf
    with pytest.raises(ConfigError, match="one finite priority"):
        priorities.set_base("a", 5.0)


def test_a_trace_starts_anew_at_its_end() -> None:
    trace = PriorityTrace(np.array([[1, 2], [3, 4]], np.uint8))
    priorities = RequestPriorities(TracePolicy(trace), epoch=1, quantum=0)
    assert [priorities.add(name, 0.0) for name in "abc"] == [1.0, 2.0, 1.0]
    priorities.begin([])
    assert priorities.begin([]) == {"a": 3.0, "b": 4.0, "c": 3.0}


def test_who_has_just_come_in_is_protected() -> None:
    priorities = RequestPriorities(FixedPolicy(), epoch=10, quantum=2)
    priorities.add("a", 0.0)
    priorities.begin([])
    assert not priorities.protected("a")
    priorities.entered("a")
    seen = []
    for _ in range(3):
        seen.append(priorities.protected("a"))
        priorities.begin([])
    assert seen == [True, True, False]
    priorities.entered("unknown")
    assert not priorities.protected("unknown")


def test_who_has_gone_is_forgotten() -> None:
    priorities = RequestPriorities(FixedPolicy(), epoch=1, quantum=0)
    priorities.add("a", 0.0)
    assert "a" in priorities
    priorities.remove("a")
    priorities.remove("a")
    assert len(priorities) == 0
    assert priorities.begin(["a"]) == {}
    with pytest.raises(UnknownSequence, match="no request 'a'"):
        priorities.set_base("a", 1.0)


@pytest.mark.parametrize(("epoch", "quantum"), [(0, 0), (5, 5), (5, -1)])
def test_epoch_and_quantum_have_their_ranges(epoch: int, quantum: int) -> None:
    with pytest.raises(ConfigError, match="epoch="):
        RequestPriorities(FixedPolicy(), epoch=epoch, quantum=quantum)

from __future__ import annotations

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch.scheduling import FixedPolicy, PriorityPolicy, PriorityTrace, TracePolicy

TRACE = PriorityTrace(np.array([[0, 1, 2], [7, 6, 5]], np.uint8))


def ask(
    policy: PriorityPolicy,
    epoch: int,
    index: list[int],
    base: list[float] | None = None,
    waited: list[int] | None = None,
) -> list[float]:
    zeros = [0] * len(index)
    answer = policy.priorities(
        epoch,
        np.array(index, np.int64),
        np.array(base or zeros, np.float64),
        np.array(waited or zeros, np.int64),
    )
    assert answer.dtype == np.float64
    return list(answer.tolist())


def test_fixed_policy_keeps_what_was_given() -> None:
    assert ask(FixedPolicy(), 9, [-1, -1], [2.5, -1.0], [0, 100]) == [2.5, -1.0]


def test_fixed_policy_ages_by_one_for_every_so_many_epochs_waited() -> None:
    waited = [0, 2, 3, 5, 6]
    assert ask(FixedPolicy(ageing=3), 9, [-1] * 5, [1.0] * 5, waited) == [1, 1, 2, 2, 3]


def test_ageing_below_one_epoch_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="ageing=0"):
        FixedPolicy(ageing=0)


def test_trace_policy_reads_row_epoch_and_column_index_and_ignores_the_rest() -> None:
    assert ask(TracePolicy(TRACE), 0, [2, 0], [9.0, 9.0], [50, 50]) == [2, 0]
    assert ask(TracePolicy(TRACE), 1, [1]) == [6]


def test_trace_policy_starts_anew_at_the_end_of_the_trace() -> None:
    assert ask(TracePolicy(TRACE), 5, [0, 1, 2]) == [7, 6, 5]


def test_trace_policy_names_an_index_beyond_the_trace() -> None:
    with pytest.raises(ConfigError, match="index 3 is beyond the priority trace, which has 3"):
        ask(TracePolicy(TRACE), 0, [0, 3])


def test_trace_policy_wants_an_index() -> None:
    with pytest.raises(ConfigError, match=r"give it to add\(\)"):
        ask(TracePolicy(TRACE), 0, [0, -1])


@pytest.mark.parametrize("policy", [FixedPolicy(), FixedPolicy(2), TracePolicy(TRACE)])
def test_policies_answer_nobody_with_nothing(policy: PriorityPolicy) -> None:
    assert ask(policy, 3, []) == []

"""The example plug-ins do what they say."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvswitch import ConfigError, KVSwitch, SequenceState
from kvswitch.hooks import make_policy
from kvswitch.scheduling import PriorityScheduler

PLUGINS = Path(__file__).parents[2] / "examples" / "plugins"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PLUGINS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


wrap_preempt = load("wrap_preempt")
replace_policy = load("replace_policy")


def make_switch(plugin: object) -> KVSwitch:
    cache = np.zeros((32, 64), np.float32)
    return KVSwitch(cache, {"host_memory": cache.nbytes}, block_tokens=16, plugins=[plugin])


def settle(switch: KVSwitch) -> None:
    while switch.planner.under_way:
        switch.step()
    switch.check_integrity()


@pytest.fixture
def limit() -> object:
    return wrap_preempt.PreemptionLimit(2, tenant_of=lambda sequence: sequence.split("/")[0])


@pytest.fixture
def limited(limit: object) -> Iterator[KVSwitch]:
    with make_switch(limit) as switch:
        yield switch


def test_a_tenant_is_preempted_only_so_often(limit: object, limited: KVSwitch) -> None:
    for name in ("red/1", "red/2", "red/3", "blue/1"):
        limited.allocate(name, 32)
    limited.preempt("red/1")
    limited.preempt("red/2")
    with pytest.raises(wrap_preempt.TooManyPreemptions, match="red"):
        limited.preempt("red/3")
    assert limited.planner.state("red/3") is SequenceState.RUNNING
    limited.preempt("blue/1")
    limit.reset()  # type: ignore[attr-defined]
    limited.preempt("red/3")
    limited.step()
    settle(limited)


def test_a_preemption_that_fails_does_not_count(limit: object, limited: KVSwitch) -> None:
    limited.allocate("red/1", 32)
    limited.preempt("red/1")
    for _ in range(3):
        with pytest.raises(Exception, match="preempted already"):
            limited.preempt("red/1")
    assert limit.counts["red"] == 1  # type: ignore[attr-defined]


def test_short_sequences_are_discarded_and_long_ones_copied() -> None:
    plugin = replace_policy.LeastAttainedService(worth_copying=64)
    with make_switch(plugin) as switch:
        switch.allocate("short", 40)
        switch.allocate("long", 80)
        switch.preempt("short")
        switch.preempt("long")
        switch.step()
        settle(switch)
        assert plugin.discarded == 1
        assert switch.resume("short").tokens == 0
        assert switch.resume("long").tokens == 80


def test_the_policy_is_found_by_name_and_prefers_who_was_served_least() -> None:
    with pytest.raises(ConfigError, match="least-attained-service"):
        make_policy("least-attained-service")
    plugin = replace_policy.LeastAttainedService()
    policy = make_policy("least-attained-service", plugins=[plugin])
    scheduler = PriorityScheduler(policy, blocks=10, slots=1, epoch=2, quantum=0)
    scheduler.add("old", need=2)
    scheduler.set_priority("old", -1000.0)  # tokens served, negated
    scheduler.add("new", need=2)
    assert scheduler.schedule(10).admit == ("new",)


def test_waiting_makes_up_for_service() -> None:
    policy = replace_policy.LeastAttainedServicePolicy()
    index, served = np.array([0, 1]), np.array([-1000.0, -10.0])
    fresh, starved = (policy.priorities(0, index, served, np.array([w, 0])) for w in (0, 20))
    assert fresh[0] < fresh[1]
    assert starved[0] > starved[1]

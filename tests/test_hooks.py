"""Plug-ins: replacing, wrapping, observing, registering; and what is wrong with a plug-in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswitch import ConfigError, KVSwitch, SequenceState, hookimpl
from kvswitch.hooks import make_policy, plugin_manager
from kvswitch.scheduling import FixedPolicy, PriorityTrace, TracePolicy
from kvswitch.switch import Resumption
from kvswitch.transfer import CpuBackend

BLOCKS, TOKENS = 12, 4


@pytest.fixture
def make() -> Iterator[Callable[..., KVSwitch]]:
    made: list[KVSwitch] = []

    def make(*plugins: object, **settings: Any) -> KVSwitch:
        cache = np.zeros((BLOCKS, TOKENS, 8))
        config = {"host_memory": cache.nbytes, **settings}
        made.append(KVSwitch(cache, config, block_tokens=TOKENS, plugins=plugins))
        return made[-1]

    yield make
    for switch in made:
        switch.check_integrity()
        switch.close()
        switch.check_integrity()


# -- deciding ------------------------------------------------------------------------------------


def test_a_plugin_may_replace_a_verb(make: Any) -> None:
    class NeverCopy:
        @hookimpl
        def kvswitch_preempt(self, switch: KVSwitch, sequence: str, tokens: int | None) -> bool:
            switch.planner.preempt(sequence, tokens, copy=False)
            return True

    switch = make(NeverCopy())
    switch.allocate("a", 8)
    switch.preempt("a")
    assert switch.planner.state("a") is SequenceState.HOST
    assert switch.resume("a").tokens == 0


def test_a_plugin_that_returns_nothing_leaves_it_to_the_others(make: Any) -> None:
    class Undecided:
        asked = 0

        @hookimpl
        def kvswitch_preempt(self) -> None:
            self.asked += 1

    plugin = Undecided()
    switch = make(plugin)
    switch.allocate("a", 8)
    switch.preempt("a")
    assert plugin.asked == 1
    assert switch.planner.state("a") is SequenceState.LEAVING


def test_the_last_plugin_is_asked_first(make: Any) -> None:
    asked: list[str] = []

    class Named:
        def __init__(self, name: str, answer: bool | None) -> None:
            self._name, self._answer = name, answer

        @hookimpl
        def kvswitch_free(self, switch: KVSwitch, sequence: str) -> bool | None:
            asked.append(self._name)
            if self._answer:
                switch.planner.free(sequence)
            return self._answer

    switch = make(Named("first", None), Named("decides", True), Named("last", None))
    switch.allocate("a", 8)
    switch.free("a")
    assert asked == ["last", "decides"]


def test_a_plugin_may_wrap_a_verb(make: Any) -> None:
    class Suspicious:
        """Has the last token computed again."""

        @hookimpl(wrapper=True)
        def kvswitch_resume(self) -> Generator[None, Resumption, Resumption]:
            back = yield
            return Resumption(max(0, back.tokens - 1), back.transfer)

    switch = make(Suspicious())
    switch.allocate("a", 8)
    switch.end_turn("a")
    assert switch.resume("a").tokens == 7


def test_the_hook_for_allocation_is_not_called_for_every_token(make: Any) -> None:
    class Counting:
        calls: list[tuple[str, int, int | None]]

        def __init__(self) -> None:
            self.calls = []

        @hookimpl
        def kvswitch_allocate(self, sequence: str, tokens: int, expected: int | None) -> None:
            self.calls.append((sequence, tokens, expected))

    plugin = Counting()
    switch = make(plugin)
    for tokens in range(1, 10):
        switch.allocate("a", tokens, expected=30)
    assert plugin.calls == [("a", 1, 30), ("a", 5, 30), ("a", 9, 30)]


def test_what_a_plugin_raises_reaches_the_engine_and_changes_nothing(make: Any) -> None:
    class Never:
        @hookimpl(wrapper=True)
        def kvswitch_preempt(self) -> Generator[None, bool, bool]:
            raise PermissionError("not this one")
            yield  # a generator, though never started

    switch = make(Never())
    switch.allocate("a", 8)
    with pytest.raises(PermissionError, match="not this one"):
        switch.preempt("a")
    assert switch.planner.state("a") is SequenceState.RUNNING


# -- registering ---------------------------------------------------------------------------------


class Recording(CpuBackend):
    opened = 0

    def open_queue(self, direction: Any) -> Any:
        Recording.opened += 1
        return super().open_queue(direction)


class BringsBackend:
    def __init__(self, name: str) -> None:
        self._name = name

    @hookimpl
    def kvswitch_backends(self) -> dict[str, Callable[[], Any]]:
        return {self._name: Recording}


@pytest.mark.parametrize("name", ["mine", "cpu"])
def test_a_plugin_may_bring_a_copy_backend(make: Any, name: str) -> None:
    Recording.opened = 0
    make(BringsBackend(name), backend=name)
    assert Recording.opened == 2, "also where it has the name of one that is there"


def test_a_backend_that_cannot_be_made_is_named(make: Any) -> None:
    class NeedsDevice:
        @hookimpl
        def kvswitch_backends(self) -> dict[str, Callable[..., Any]]:
            return {"mine": lambda device: CpuBackend()}

    with pytest.raises(ConfigError, match=r"cannot make copy backend 'mine'.*device"):
        make(NeedsDevice(), backend="mine")
    with pytest.raises(ConfigError, match=r"no copy backend 'yours'; registered are: cpu, .*mine"):
        make(NeedsDevice(), backend="yours")


def test_policies_are_found_by_name(tmp_path: Path) -> None:
    assert isinstance(make_policy("fixed", ageing=4), FixedPolicy)
    shape = {"seed": 1, "sequences": 5, "epochs": 3}
    assert isinstance(make_policy("random", **shape), TracePolicy)
    assert isinstance(make_policy("markov", **shape, keep=0.5), TracePolicy)
    PriorityTrace.random(**shape).save(tmp_path / "trace.npz")
    assert isinstance(make_policy("trace", path=tmp_path / "trace.npz"), TracePolicy)


def test_a_plugin_may_bring_a_policy() -> None:
    class Brings:
        @hookimpl
        def kvswitch_policies(self) -> dict[str, Callable[..., Any]]:
            return {"mine": lambda weight: ("mine", weight), "fixed": lambda: "another"}

    assert make_policy("mine", plugins=[Brings()], weight=3) == ("mine", 3)
    assert make_policy("fixed", plugins=[Brings()]) == "another"


def test_policies_that_cannot_be_made_are_named() -> None:
    with pytest.raises(ConfigError, match="no priority policy 'fixd'; registered are: fixed, mark"):
        make_policy("fixd")
    with pytest.raises(ConfigError, match=r"cannot make priority policy 'fixed'.*'aging'"):
        make_policy("fixed", aging=4)


# -- plug-ins that cannot work -------------------------------------------------------------------


def test_a_hook_that_does_not_exist_is_refused() -> None:
    class Typo:
        @hookimpl
        def kvswitch_premept(self) -> None: ...

    with pytest.raises(ConfigError, match="kvswitch_premept"):
        plugin_manager([Typo()])


def test_a_hook_with_arguments_that_it_does_not_have_is_refused() -> None:
    class Wrong:
        @hookimpl
        def kvswitch_preempt(self, sequence: str, token: int) -> None: ...

    with pytest.raises(ConfigError, match="token"):
        plugin_manager([Wrong()])


def test_a_wrapper_that_does_not_yield_is_refused() -> None:
    class Wrong:
        @hookimpl(wrapper=True)
        def kvswitch_preempt(self) -> None: ...

    with pytest.raises(ConfigError, match="generator"):
        plugin_manager([Wrong()])


def test_things_that_are_no_plugins_are_refused() -> None:
    with pytest.raises(ConfigError, match="BringsBackend is a class: pass an instance"):
        plugin_manager([BringsBackend])
    with pytest.raises(ConfigError, match="has no hooks: mark them with @hookimpl"):
        plugin_manager([object()])
    twice = BringsBackend("mine")
    with pytest.raises(ConfigError, match="already registered"):
        plugin_manager([twice, twice])


# -- installed plug-ins --------------------------------------------------------------------------


def install(folder: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installer leaves behind of a distribution with one entry point."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvswitch]\n{name} = {name}:plugin\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_installed_plugins_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
from kvswitch import hookimpl

class Plugin:
    @hookimpl
    def kvswitch_policies(self):
        return {"installed": lambda: "here"}

plugin = Plugin()
"""
    install(tmp_path, "kvswitch_test_plugin", source, monkeypatch)
    assert make_policy("installed") == "here"


def test_an_installed_plugin_that_cannot_be_loaded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "kvswitch_broken", "import does_not_exist_anywhere", monkeypatch)
    with pytest.raises(ConfigError, match=r"cannot be loaded.*does_not_exist_anywhere"):
        plugin_manager()

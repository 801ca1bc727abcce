"""The default plug-in: FastSwitch's way of allocating, freeing, preempting and resuming."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING

from kvswitch.hooks import hookimpl
from kvswitch.messages import BlockIds
from kvswitch.scheduling import FixedPolicy, PriorityPolicy, PriorityTrace, TracePolicy
from kvswitch.switch.manager import Resumption
from kvswitch.transfer import Backend, CpuBackend

if TYPE_CHECKING:
    from kvswitch.switch.facade import KVSwitch

__all__ = ["DefaultPlugin"]


class DefaultPlugin:
    """Hands every decision to the planner."""

    @hookimpl
    def kvswitch_allocate(
        self, switch: KVSwitch, sequence: Hashable, tokens: int, expected: int | None
    ) -> BlockIds:
        """Allocate from block groups (paper section 3.1)."""
        return switch.planner.allocate(sequence, tokens, expected=expected)

    @hookimpl
    def kvswitch_free(self, switch: KVSwitch, sequence: Hashable) -> bool:
        """Give back device blocks and host copies."""
        switch.planner.free(sequence)
        return True

    @hookimpl
    def kvswitch_preempt(self, switch: KVSwitch, sequence: Hashable, tokens: int | None) -> bool:
        """Swap out what the host does not hold (paper section 3.3)."""
        switch.planner.preempt(sequence, tokens)
        return True

    @hookimpl
    def kvswitch_resume(
        self, switch: KVSwitch, sequence: Hashable, tokens: int | None
    ) -> Resumption:
        """Take back what is still on the device, swap in the rest."""
        return switch.planner.resume(sequence, tokens)

    @hookimpl
    def kvswitch_backends(self) -> Mapping[str, Callable[[], Backend]]:
        """Worker threads that copy host memory."""
        return {"cpu": CpuBackend}

    @hookimpl
    def kvswitch_policies(self) -> Mapping[str, Callable[..., PriorityPolicy]]:
        """The policies of paper section 4.2, and fixed priorities with ageing."""
        return {
            "fixed": FixedPolicy,
            "random": lambda **settings: TracePolicy(PriorityTrace.random(**settings)),
            "markov": lambda **settings: TracePolicy(PriorityTrace.markov(**settings)),
            "trace": lambda path: TracePolicy(PriorityTrace.load(path)),
        }

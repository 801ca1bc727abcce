"""A plug-in that brings a priority policy of its own, and replaces how its sequences are preempted.

*Least attained service*: whoever has been served least comes first, so short requests overtake long
ones. Requests that have hardly begun are not worth a copy: recomputing them is cheaper.

    plugin = LeastAttainedService()
    policy = kvswitch.hooks.make_policy("least-attained-service", plugins=[plugin])
    scheduler = PriorityScheduler(policy, blocks=..., slots=...)
    switch = KVSwitch(kv_cache, block_tokens=16, plugins=[plugin])
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

import numpy as np
import numpy.typing as npt

from kvswitch import KVSwitch, hookimpl
from kvswitch.scheduling import PriorityPolicy

__all__ = ["LeastAttainedService", "LeastAttainedServicePolicy"]


class LeastAttainedServicePolicy:
    """Priority falls with the logarithm of the tokens served; waiting makes up for it.

    The engine passes the tokens served, negated, as base priority: `set_priority(seq, -n)`.
    """

    def priorities(
        self,
        epoch: int,
        index: npt.NDArray[np.int64],
        base: npt.NDArray[np.float64],
        waited: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float64]:
        """See `PriorityPolicy`; all arrays have one entry a sequence."""
        return waited.astype(np.float64) - np.log2(1.0 - np.minimum(base, 0.0))


class LeastAttainedService:
    """Registers the policy, and discards instead of copying what has few tokens.

    Parameters
    ----------
    worth_copying : int
        Tokens from which a sequence is swapped out rather than recomputed.
    """

    def __init__(self, worth_copying: int = 64) -> None:
        self.discarded = 0
        self._worth_copying = worth_copying

    @hookimpl
    def kvswitch_policies(self) -> Mapping[str, Callable[..., PriorityPolicy]]:
        """Make it available by name."""
        return {"least-attained-service": LeastAttainedServicePolicy}

    @hookimpl
    def kvswitch_preempt(
        self, switch: KVSwitch, sequence: Hashable, tokens: int | None
    ) -> bool | None:
        """Answer for short sequences; None leaves the others to FastSwitch's way."""
        length = switch.planner.tokens(sequence) if tokens is None else tokens
        if length >= self._worth_copying:
            return None
        switch.planner.preempt(sequence, tokens, copy=False)
        self.discarded += 1
        return True

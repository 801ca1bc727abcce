"""A plug-in that wraps preemption: who may be switched out how often.

Preempting the same tenant's requests again and again is unfair even where it is cheap. This plug-in
counts preemptions by tenant and, from a limit on, refuses: the engine sees the error and picks
somebody else. Everything else stays as it is.

    switch = KVSwitch(kv_cache, block_tokens=16, plugins=[PreemptionLimit(10, tenant_of)])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Hashable

from kvswitch import KVSwitchError, hookimpl

__all__ = ["PreemptionLimit", "TooManyPreemptions"]


class TooManyPreemptions(KVSwitchError):  # noqa: N818 - says what is the matter
    """The tenant has been switched out often enough: preempt somebody else."""


class PreemptionLimit:
    """Lets every tenant be preempted `limit` times between two calls of `reset`.

    Parameters
    ----------
    limit : int
    tenant_of : callable
        From a sequence id to its tenant.
    """

    def __init__(self, limit: int, tenant_of: Callable[[Hashable], Hashable]) -> None:
        self.counts: Counter[Hashable] = Counter()
        self._limit = limit
        self._tenant_of = tenant_of

    @hookimpl(wrapper=True)
    def kvswitch_preempt(self, sequence: Hashable) -> Generator[None, bool, bool]:
        """Check before, let the others do it, count after. An argument not needed is not named."""
        tenant = self._tenant_of(sequence)
        if self.counts[tenant] >= self._limit:
            raise TooManyPreemptions(
                f"{tenant!r} has been preempted {self._limit} times: preempt somebody else"
            )
        done = yield
        self.counts[tenant] += 1
        return done

    def reset(self) -> None:
        """Begin a new period, e.g. at a priority epoch."""
        self.counts.clear()

"""Where kvswitch can be extended: a pluggy hook specification.

FastSwitch's way is itself a plug-in (`kvswitch.switch.default`), registered first and so called
last: any other may do without it (return something) or wrap it (``wrapper=True``). Plug-ins are
passed to `KVSwitch`, or found through the entry-point group ``kvswitch``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import pluggy

from kvswitch.errors import ConfigError

if TYPE_CHECKING:
    from kvswitch.messages import BlockIds, Transfer
    from kvswitch.scheduling import PriorityPolicy
    from kvswitch.switch.facade import KVSwitch
    from kvswitch.switch.manager import Resumption
    from kvswitch.transfer import Backend, Ticket

__all__ = ["hookimpl", "hookspec", "plugin_manager", "registered"]

hookspec = pluggy.HookspecMarker("kvswitch")
hookimpl = pluggy.HookimplMarker("kvswitch")


class HookSpec(Protocol):
    """The hooks. `switch` is the `KVSwitch` concerned; its `planner` is what most plug-ins need."""

    @hookspec(firstresult=True)
    def kvswitch_allocate(
        self, switch: KVSwitch, sequence: Hashable, tokens: int, expected: int | None
    ) -> BlockIds | None:
        """Get device blocks for `sequence` to hold `tokens`; its block table.

        Called when a sequence is new or its blocks do not suffice, not for every token.
        """

    @hookspec(firstresult=True)
    def kvswitch_free(self, switch: KVSwitch, sequence: Hashable) -> bool | None:
        """Forget `sequence` on the device and on the host; True when done."""

    @hookspec(firstresult=True)
    def kvswitch_preempt(
        self, switch: KVSwitch, sequence: Hashable, tokens: int | None
    ) -> bool | None:
        """Take `sequence`, of which `tokens` are computed, off the device; True when done."""

    @hookspec(firstresult=True)
    def kvswitch_resume(
        self, switch: KVSwitch, sequence: Hashable, tokens: int | None
    ) -> Resumption | None:
        """Bring `sequence` back, as far as `tokens` have been accepted."""

    @hookspec
    def kvswitch_transfer_started(self, switch: KVSwitch, transfer: Transfer) -> None:
        """Observe: a transfer has been handed to the transfer engine."""

    @hookspec
    def kvswitch_transfer_ended(self, switch: KVSwitch, ticket: Ticket) -> None:
        """Observe: a transfer has ended; `ticket.error` says whether well."""

    @hookspec
    def kvswitch_copies_lost(self, switch: KVSwitch, sequence: Hashable, tokens: int) -> None:
        """Observe: host copies of `sequence` were contaminated; `tokens` are still valid."""

    @hookspec
    def kvswitch_backends(self) -> Mapping[str, Callable[[], Backend]]:
        """Register copy backends by name (setting ``backend``)."""

    @hookspec
    def kvswitch_policies(self) -> Mapping[str, Callable[..., PriorityPolicy]]:
        """Register priority policies by name; each is called with the policy's own settings."""


def plugin_manager(plugins: Iterable[Any] = ()) -> pluggy.PluginManager:
    """A plug-in manager with the default plug-in, installed ones, and `plugins` (called first).

    Raises
    ------
    ConfigError
        A plug-in implements a hook that does not exist, or with arguments that it does not have.
    """
    from kvswitch.switch.default import DefaultPlugin

    manager = pluggy.PluginManager("kvswitch")
    manager.add_hookspecs(HookSpec)
    manager.register(DefaultPlugin(), name="kvswitch-default")
    try:
        manager.load_setuptools_entrypoints("kvswitch")
        for plugin in plugins:
            manager.register(plugin)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise ConfigError(f"cannot register plug-in: {error}") from error
    return manager


def registered(results: Iterable[Mapping[str, Any]], name: str, kind: str) -> Any:
    """Look `name` up in what plug-ins registered; earlier results come from later plug-ins.

    Raises
    ------
    ConfigError
        Nothing of that name is registered.
    """
    every: dict[str, Any] = {}
    for result in results:
        every = {**result, **every}
    if name not in every:
        raise ConfigError(f"no {kind} {name!r}; registered are: {', '.join(sorted(every))}")
    return every[name]

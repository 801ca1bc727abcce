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
    from kvswitch.transfer import Backend, Layout, Ticket

__all__ = ["hookimpl", "hookspec", "make_backend", "make_policy", "plugin_manager"]

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
    def kvswitch_backends(self, layout: Layout) -> Mapping[str, Callable[[], Backend]]:
        """Register copy backends by name (setting ``backend``) for a KV cache of that layout."""

    @hookspec
    def kvswitch_policies(self) -> Mapping[str, Callable[..., PriorityPolicy]]:
        """Register priority policies by name; each is called with the policy's own settings."""


def plugin_manager(plugins: Iterable[Any] = ()) -> pluggy.PluginManager:
    """A plug-in manager with the default plug-in, installed ones, and `plugins` (called first).

    Raises
    ------
    ConfigError
        A plug-in cannot be loaded or is not an object with hooks, or one of its hooks does not
        exist or has other arguments.
    """
    from kvswitch.switch.default import DefaultPlugin

    manager = pluggy.PluginManager("kvswitch")
    manager.add_hookspecs(HookSpec)
    manager.register(DefaultPlugin(), name="kvswitch-default")
    try:
        manager.load_setuptools_entrypoints("kvswitch")
    except Exception as error:  # whatever its import raises
        raise ConfigError(f"an installed plug-in cannot be loaded: {error!r}") from error
    for plugin in plugins:
        if isinstance(plugin, type):
            raise ConfigError(f"plug-in {plugin.__name__} is a class: pass an instance of it")
        try:
            manager.register(plugin)
            if not manager.get_hookcallers(plugin):
                raise ConfigError(f"plug-in {plugin!r} has no hooks: mark them with @hookimpl")
        except (pluggy.PluginValidationError, ValueError) as error:
            raise ConfigError(f"cannot register plug-in: {error}") from error
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise ConfigError(f"cannot register plug-in: {error}") from error
    return manager


def _make_registered(
    registrations: Iterable[Mapping[str, Callable[..., Any]]],
    name: str,
    kind: str,
    **settings: Any,
) -> Any:
    """Make what plug-ins have registered as `name`; the later plug-in wins."""
    every: dict[str, Callable[..., Any]] = {}
    for registration in registrations:  # those of later plug-ins come first
        every = {**registration, **every}
    if name not in every:
        raise ConfigError(f"no {kind} {name!r}; registered are: {', '.join(sorted(every))}")
    try:
        return every[name](**settings)
    except TypeError as error:
        raise ConfigError(f"cannot make {kind} {name!r}: {error}") from error


def make_backend(
    name: str, layout: Layout, *, on_cuda: bool, manager: pluggy.PluginManager | None = None
) -> Backend:
    """Make a registered copy backend for a KV cache of that layout.

    Parameters
    ----------
    name : str
        As in setting ``backend``: "auto" takes "cuda" or "cpu", by where the KV cache is.
    on_cuda : bool
        Whether it is on a CUDA device.
    manager : PluginManager, optional
        One with more than the installed plug-ins.

    Raises
    ------
    ConfigError
        There is no such backend, or it cannot be had here.
    """
    if name == "auto":
        name = "cuda" if on_cuda else "cpu"
    registrations = (manager or plugin_manager()).hook.kvswitch_backends(layout=layout)
    backend: Backend = _make_registered(registrations, name, "copy backend")
    return backend


def make_policy(name: str, *, plugins: Iterable[Any] = (), **settings: Any) -> PriorityPolicy:
    """Make a registered priority policy, e.g. ``make_policy("fixed", ageing=4)``.

    Parameters
    ----------
    plugins : iterable of object
        Plug-ins beside the installed ones.
    **settings
        The policy's own.

    Raises
    ------
    ConfigError
        There is no such policy, or it has no such settings.
    """
    registrations = plugin_manager(plugins).hook.kvswitch_policies()
    policy: PriorityPolicy = _make_registered(registrations, name, "priority policy", **settings)
    return policy

"""`KVSwitch`: what a custom engine calls.

It joins the planner and the transfer engine in one process. The calls of one iteration::

    switch.preempt("a")                 # decide: who leaves, who comes, who grows
    switch.resume("b", accepted)
    blocks = switch.allocate("c", tokens)
    ready = switch.step()               # Algorithm 1: collect, swap in, swap out, wait or not
    ...                                 # forward: whoever is not in ready.arriving
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Any

from kvswitch.config import Config
from kvswitch.errors import ConfigError, InvalidTransition, TransferError
from kvswitch.hooks import plugin_manager, registered
from kvswitch.messages import BlockIds, Measurement, Observations
from kvswitch.switch.manager import SwapManager
from kvswitch.switch.sequence import SequenceState
from kvswitch.switch.stats import SwapStats
from kvswitch.transfer import Backend, HostArena, Layout, TransferEngine, layout_of

__all__ = ["KVSwitch", "Ready", "Resumed", "SwapTicket"]

_log = logging.getLogger("kvswitch")


@dataclass(frozen=True, slots=True)
class SwapTicket:
    """A swap-in that `resume` has begun."""

    _switch: KVSwitch
    id: int

    @property
    def done(self) -> bool:
        """Whether it has ended, as far as the last `KVSwitch.step` knows."""
        return self.id not in self._switch.planner.under_way

    def wait(self) -> None:
        """Block until it has ended. Its sequence is then in the next step's `Ready.landed`."""
        if not self.done:
            self._switch._wait_for(self.id)


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `KVSwitch.resume` brings back.

    Attributes
    ----------
    tokens : int
        Leading tokens that are valid once it has landed; the engine recomputes the rest.
    ticket : SwapTicket or None
        The swap-in; None if the sequence is ready at once.
    """

    tokens: int
    ticket: SwapTicket | None


@dataclass(frozen=True, slots=True)
class Ready:
    """What the coming forward may count on.

    Attributes
    ----------
    landed : mapping
        Sequences whose swap-in has ended since the last step, with their valid tokens: what
        `resume` promised, or less if a copy failed.
    arriving : mapping view
        Sequences still on their way: not to be run now.
    """

    landed: Mapping[Hashable, int]
    arriving: Mapping[Hashable, object]


class KVSwitch:
    """Device blocks, host copies and transfers of one engine on one device.

    Parameters
    ----------
    kv_cache : Layout, array, tensor or sequence of these
        The engine's KV cache, block dimension first: one tensor for all layers, or one a layer (or
        a layer's K and V). Must live as long as this object.
    config : Config or mapping, optional
    block_tokens : int
        Token slots in a block.
    plugins : iterable of object
        Plug-ins (`kvswitch.hooks`) beside the installed ones.
    backend : Backend, optional
        A copy backend to use instead of the one that `config` names.

    Raises
    ------
    ConfigError
        A setting, the layout, or the host's memory does not permit it.
    """

    def __init__(
        self,
        kv_cache: Any,
        config: Config | Mapping[str, Any] | None = None,
        *,
        block_tokens: int,
        plugins: Iterable[Any] = (),
        backend: Backend | None = None,
    ) -> None:
        if not isinstance(config, Config):
            config = Config.from_mapping(config or {})
        layout = kv_cache if isinstance(kv_cache, Layout) else layout_of(kv_cache)
        host_blocks = config.host_bytes // layout.block_bytes
        if host_blocks == 0:
            raise ConfigError(
                f"host_memory of {config.host_bytes} bytes does not hold one block of "
                f"{layout.block_bytes} bytes: give kvswitch more"
            )
        self.block_tokens = block_tokens
        self.layout = layout
        self._hooks = plugin_manager(plugins)
        if backend is None:
            backend = self._make_backend(config.backend, kv_cache)
        self.planner = SwapManager(
            layout.num_blocks,
            host_blocks,
            block_tokens,
            block_bytes=layout.block_bytes,
            first_group=config.first_group,
            headroom=config.headroom,
            strategy=config.strategy,
            swap=config.preemption == "switch",
            reuse=config.reuse,
            on_lost=self._on_lost,
        )
        self._keep_alive = kv_cache
        self._backend = backend
        self._arena = HostArena(host_blocks * layout.block_bytes)
        self._engine = TransferEngine(
            backend, layout, self._arena.layout(layout), window_bytes=config.window_bytes
        )
        self._stall = self._overhead = 0.0
        self._step_ended: float | None = None
        self._closed = False

    # -- verbs -------------------------------------------------------------------------------

    def allocate(self, sequence: Hashable, tokens: int, *, expected: int | None = None) -> BlockIds:
        """Create `sequence`, or let it grow, to hold `tokens`; its block table, shape [blocks].

        Parameters
        ----------
        expected : int, optional
            Tokens that it is expected to come to, where the engine knows (output limit).

        Raises
        ------
        OutOfBlocks
            Preempt somebody, or ask again later.
        InvalidTransition
            It is off the device, or its turn has ended: resume it first.
        """
        started = perf_counter()
        table: BlockIds | None = self.planner.grow(sequence, tokens)
        if table is None:
            self._check_open()
            table = self._hooks.hook.kvswitch_allocate(
                switch=self, sequence=sequence, tokens=tokens, expected=expected
            )
        self._overhead += perf_counter() - started
        return table

    def preempt(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Take `sequence` off the device; its swap-out starts with the next `step`.

        Parameters
        ----------
        tokens : int, optional
            Tokens whose KV has been computed; all it was allocated for if not given.

        Raises
        ------
        HostMemoryExhausted
            The host can hold nothing of it. It stays as it was: let it run on, or `discard` it.
        InvalidTransition
            It has been preempted already.
        """
        started = perf_counter()
        self._check_open()
        self._hooks.hook.kvswitch_preempt(switch=self, sequence=sequence, tokens=tokens)
        self._overhead += perf_counter() - started

    def discard(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Take `sequence` off the device without sending anything.

        What the host has of it already stays valid; the rest will be recomputed.
        """
        started = perf_counter()
        self._check_open()
        self.planner.preempt(sequence, tokens, copy=False)
        self._overhead += perf_counter() - started

    def resume(self, sequence: Hashable, tokens: int | None = None) -> Resumed:
        """Bring `sequence` back; its swap-in starts with the next `step`.

        Parameters
        ----------
        tokens : int, optional
            Tokens that the engine has accepted; KV behind them is dropped.

        Raises
        ------
        OutOfBlocks
            Preempt somebody, or ask again later.
        InvalidTransition
            It is on the device already.
        """
        started = perf_counter()
        self._check_open()
        back = self._hooks.hook.kvswitch_resume(switch=self, sequence=sequence, tokens=tokens)
        ticket = None if back.transfer is None else SwapTicket(self, back.transfer)
        self._overhead += perf_counter() - started
        return Resumed(back.tokens, ticket)

    def end_turn(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Mark the turn as over: its KV goes out at idle priority, and the next turn resumes it."""
        started = perf_counter()
        self.planner.end_turn(sequence, tokens)
        self._overhead += perf_counter() - started

    def free(self, sequence: Hashable) -> None:
        """Forget `sequence`: device blocks and host copies go, transfers are cancelled."""
        started = perf_counter()
        self._check_open()
        self._hooks.hook.kvswitch_free(switch=self, sequence=sequence)
        self._overhead += perf_counter() - started

    def truncate(self, sequence: Hashable, tokens: int) -> int:
        """Keep only the first `tokens` of `sequence`; how many are kept (see SwapManager)."""
        return self.planner.truncate(sequence, tokens)

    def fork(self, parent: Hashable, child: Hashable, tokens: int) -> int:
        """Create `child` on `parent`'s leading full blocks; the tokens it starts with."""
        return self.planner.fork(parent, child, tokens)

    def set_priority(self, sequence: Hashable, priority: float) -> None:
        """Set how much `sequence` matters (larger is more): who loses host copies first."""
        self.planner.set_priority(sequence, priority)

    # -- the iteration ---------------------------------------------------------------------------

    def step(self, stream: object | None = None) -> Ready:
        """One iteration of Algorithm 1; call it right before the forward.

        Collects what has landed, dispatches planned swap-ins and swap-outs, and waits for those
        that the forward needs: conflicts, and swap-ins that are worth waiting for.

        Parameters
        ----------
        stream : optional
            The engine's compute stream (CUDA): transfers wait for what it has been given so far.
        """
        started = perf_counter()
        self._check_open()
        forward = None if self._step_ended is None else started - self._step_ended
        stalled = self._stall
        self.planner.observe(self._observations(forward))
        self._dispatch(stream)
        ready = Ready(self.planner.landed(), self.planner.queue(SequenceState.ARRIVING))
        self._step_ended = perf_counter()
        self._overhead += self._step_ended - started - (self._stall - stalled)
        return ready

    def _dispatch(self, stream: object | None = None, also: tuple[int, ...] = ()) -> None:
        orders = self.planner.orders()
        refused = []
        if orders.transfers:
            fence = self._backend.fence(stream)
            for transfer in orders.transfers:
                try:
                    self._engine.submit(transfer, fence=fence)
                except TransferError as error:
                    _log.warning("cannot swap: %s; the sequences concerned are recomputed", error)
                    refused.append(transfer.id)
                else:
                    self._hooks.hook.kvswitch_transfer_started(switch=self, transfer=transfer)
        for transfer_id in orders.cancel:
            self._engine.cancel(transfer_id)
        if refused:
            self.planner.observe(Observations(failed=tuple(refused)))
        if wait := {*orders.wait, *also} - {*refused}:
            started = perf_counter()
            self._engine.wait(wait)
            self._stall += perf_counter() - started
            self.planner.observe(self._observations(None))

    def _observations(self, forward: float | None) -> Observations:
        completed: list[int] = []
        failed: list[int] = []
        measurements: list[Measurement] = []
        for ticket in self._engine.poll():
            (failed if ticket.error else completed).append(ticket.id)
            if not ticket.error:
                measurements.append(Measurement(ticket.direction, ticket.nbytes, ticket.seconds))
            self._hooks.hook.kvswitch_transfer_ended(switch=self, ticket=ticket)
        return Observations(tuple(completed), tuple(failed), tuple(measurements), forward)

    def _wait_for(self, transfer: int) -> None:
        self._check_open()
        self._dispatch(also=(transfer,))

    # -- questions -------------------------------------------------------------------------------

    def available_blocks(self, *, headroom: bool = True) -> int:
        """Device blocks to be had without preempting anybody (see `SwapManager`)."""
        return self.planner.available_blocks(headroom=headroom)

    def stats(self) -> SwapStats:
        """What switching has cost and spared so far."""
        return replace(
            self.planner.stats(), stall_seconds=self._stall, overhead_seconds=self._overhead
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves; for tests and bug reports."""
        self.planner.check_integrity()

    def close(self) -> None:
        """End all transfers and give the host memory back. May be called again."""
        if not self._closed:
            self._closed = True
            self._engine.close()
            self._arena.close()

    def __enter__(self) -> KVSwitch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidTransition("this KVSwitch has been closed")

    def _on_lost(self, sequence: Hashable, tokens: int) -> None:
        self._hooks.hook.kvswitch_copies_lost(switch=self, sequence=sequence, tokens=tokens)

    def _make_backend(self, name: str, kv_cache: Any) -> Backend:
        if name == "auto":
            first = kv_cache[0] if isinstance(kv_cache, list | tuple) else kv_cache
            name = "cuda" if getattr(first, "is_cuda", False) else "cpu"
        factory = registered(self._hooks.hook.kvswitch_backends(), name, "copy backend")
        backend: Backend = factory()
        return backend

"""`KVSwitch`: what a custom engine calls.

It joins the planner and the transfer engine in one process. The calls of one iteration::

    switch.preempt("a")                 # decide: who leaves, who comes, who grows
    switch.resume("b", accepted)
    blocks = switch.allocate("c", tokens)
    ready = switch.step()               # Algorithm 1: collect, swap in, swap out, wait or not
    ...                                 # forward: whoever is not in ready.arriving

`step` is `dispatch` and `wait`: what an engine does between the two goes on beside the copies.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Any

from kvswitch.config import Config
from kvswitch.errors import ConfigError, InvalidTransition
from kvswitch.hooks import make_backend, plugin_manager
from kvswitch.messages import BlockIds, Transfer
from kvswitch.switch.manager import SwapManager
from kvswitch.switch.sequence import SequenceState
from kvswitch.switch.stats import SwapStats
from kvswitch.switch.worker import SwapWorker
from kvswitch.transfer import Backend, Layout, Ticket, TransferEngine, layout_of

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
        return not self._switch.planner.is_under_way(self.id)

    def wait(self) -> None:
        """Block until it has ended. Its sequence is then in the next step's `Ready.landed`.

        Where the device has streams: until the one last given to `KVSwitch.step` waits for it.
        """
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
        Sequences whose swap-in has ended since the last step (or which the device's stream has been
        told to wait for), with their valid tokens: what `resume` promised, or less if a copy has
        failed.
    arriving : mapping view
        Sequences still on their way: not to be run now.
    """

    landed: Mapping[Hashable, int]
    arriving: Mapping[Hashable, object]


class KVSwitch:
    """Device blocks, host copies and transfers of one engine on one device.

    Parameters
    ----------
    kv_cache : array, tensor or sequence of these; or Layout
        The engine's KV cache, block dimension first: one tensor for all layers, or one a layer (or
        a layer's K and V). Tensors are kept alive as long as this object; what a `Layout` points to
        must be by others, and the setting `backend` must name its device's.
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
        if block_tokens < 1 or all(region.nbytes % block_tokens for region in layout.regions):
            raise ConfigError(
                "block_tokens must be the number of token slots in a block, which divides its bytes"
                f" ({layout.regions[0].nbytes} in the first region), not {block_tokens}"
            )
        host_blocks = config.host_bytes // layout.block_bytes
        if host_blocks == 0:
            raise ConfigError(
                f"host_memory of {config.host_bytes} bytes does not hold one block of "
                f"{layout.block_bytes} bytes: give kvswitch more"
            )
        self.block_tokens = block_tokens
        self.layout = layout
        self._hooks = plugin_manager(plugins)
        self._lost: list[tuple[Hashable, int]] = []
        self._stream: object | None = None  # of the last step
        self._stall = self._overhead = 0.0
        self._forward_began: float | None = None  # None: there was nothing to run
        self._stall_before = 0.0
        self._in_series = config.strategy == "serial"  # then nothing goes on beside the copies
        if backend is None:
            first = kv_cache[0] if isinstance(kv_cache, list | tuple) else kv_cache
            if isinstance(first, Layout) and config.backend == "auto":
                raise ConfigError(
                    "a Layout does not say what device its memory is on: name the backend, 'cuda' "
                    "or 'cpu', in place of 'auto'"
                )
            on_cuda = getattr(first, "is_cuda", False)
            backend = make_backend(config.backend, layout, on_cuda=on_cuda, manager=self._hooks)
        engine = TransferEngine.open(backend, layout, host_blocks, window_bytes=config.window_bytes)
        try:
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
                on_lost=self._note_lost,
            )
        except BaseException:
            engine.close()
            raise
        self._grow = self.planner.grow
        self._worker = SwapWorker(
            engine, backend, on_started=self._on_started, on_ended=self._on_ended
        )
        # Holds what transfers touch until they have ended, even if this object is just dropped.
        self._shut = weakref.finalize(self, _shut, engine, kv_cache)

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
        table: BlockIds | None = self._grow(sequence, tokens)
        if table is None:
            self._check_open()
            try:
                table = self._hooks.hook.kvswitch_allocate(
                    switch=self, sequence=sequence, tokens=tokens, expected=expected
                )
            finally:
                self._overhead += perf_counter() - started
            return table
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
            It has been preempted already, or has no room for so many tokens.
        """
        with self._verb():
            self._hooks.hook.kvswitch_preempt(switch=self, sequence=sequence, tokens=tokens)

    def discard(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Take `sequence` off the device without sending anything.

        What the host has of it already stays valid; the rest will be recomputed.
        """
        with self._verb():
            self.planner.preempt(sequence, tokens, copy=False)

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
        with self._verb():
            back = self._hooks.hook.kvswitch_resume(switch=self, sequence=sequence, tokens=tokens)
            ticket = None if back.transfer is None else SwapTicket(self, back.transfer)
            return Resumed(back.tokens, ticket)

    def end_turn(self, sequence: Hashable, tokens: int | None = None) -> None:
        """Mark the turn as over: its KV goes out at idle priority, and the next turn resumes it.

        Its host copies keep its priority, and nobody of equal priority may take them: `free` what
        will not go on, or lower its priority.

        Parameters
        ----------
        tokens : int, optional
            Tokens whose KV has been computed; all it was allocated for if not given.

        Raises
        ------
        InvalidTransition
            It is off the device or idle, or has no room for so many tokens.
        """
        with self._verb():
            self.planner.end_turn(sequence, tokens)

    def free(self, sequence: Hashable) -> None:
        """Forget `sequence`: device blocks and host copies go, transfers are cancelled."""
        with self._verb():
            self._hooks.hook.kvswitch_free(switch=self, sequence=sequence)

    def truncate(self, sequence: Hashable, tokens: int) -> int:
        """Keep only the first `tokens` of `sequence`; how many are kept (see `SwapManager`)."""
        with self._verb():
            return self.planner.truncate(sequence, tokens)

    def fork(self, parent: Hashable, child: Hashable, tokens: int) -> int:
        """Create `child` on `parent`'s leading full blocks; the tokens it starts with."""
        with self._verb():
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
            The engine's compute stream (CUDA; default: the current one). Transfers wait for what it
            has been given so far, and what it is given next waits for those it depends on.

        Raises
        ------
        TransferError
            The device was lost while the stream relied on a transfer: nothing works on it any more.
        """
        self.dispatch(stream)
        return self.wait()

    def dispatch(self, stream: object | None = None) -> Collection[Hashable]:
        """First half of `step`: collect what has landed, hand planned transfers over.

        `wait` is to follow before the forward. Until then the engine can prepare its batch.

        Parameters
        ----------
        stream : optional
            As for `step`.

        Returns
        -------
        collection of Hashable
            Sequences on their way that `wait` will not wait for: not to be run now.
        """
        with self._verb():
            self._stream = stream
            forward = None
            if self._forward_began is not None:
                stalled = self._stall - self._stall_before
                forward = perf_counter() - self._forward_began - stalled
                self._forward_began = None
            self.planner.observe(self._worker.report(step_seconds=forward))
            orders = self.planner.orders()
            self._worker.submit(orders, stream)
        if self._in_series:
            self._wait()
        return self.planner.absent(orders)

    def wait(self) -> Ready:
        """Second half of `step`: block until the forward may run."""
        self._check_open()
        if self.planner.has_news:  # verbs since `dispatch`
            self._worker.submit(self.planner.orders(), self._stream)
        self._wait()
        started = perf_counter()
        ready = Ready(self.planner.landed(), self.arriving)
        while self._lost:
            sequence, tokens = self._lost.pop(0)
            self._tell(self._hooks.hook.kvswitch_copies_lost, sequence=sequence, tokens=tokens)
        ended = perf_counter()
        self._overhead += ended - started
        self._forward_began = ended if self.planner.queue(SequenceState.RUNNING) else None
        self._stall_before = self._stall
        return ready

    def _wait(self) -> None:
        if stalled := self._worker.wait():
            self._stall += stalled
            self.planner.observe(self._worker.report())

    def _wait_for(self, transfer: int) -> None:
        self._check_open()
        self._worker.submit(self.planner.orders(), self._stream, also=transfer)
        self._wait()

    # -- questions -------------------------------------------------------------------------------

    @property
    def arriving(self) -> Mapping[Hashable, object]:
        """Sequences whose swap-in has not ended: preempting one frees no blocks at once."""
        return self.planner.queue(SequenceState.ARRIVING)

    def available_blocks(self, *, headroom: bool = True, returning: bool = False) -> int:
        """Device blocks to be had without preempting anybody (see `SwapManager`)."""
        return self.planner.available_blocks(headroom=headroom, returning=returning)

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
        if self._shut.alive:
            try:
                self._worker.submit(self.planner.orders())
            finally:
                self._shut()
            self.planner.observe(self._worker.report())

    def __enter__(self) -> KVSwitch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _verb(self) -> Iterator[None]:
        """Count the time of a verb as overhead, whether it succeeds or not."""
        started = perf_counter()
        try:
            self._check_open()
            yield
        finally:
            self._overhead += perf_counter() - started

    def _check_open(self) -> None:
        if not self._shut.alive:
            raise InvalidTransition("this KVSwitch has been closed")

    def _on_started(self, transfer: Transfer) -> None:
        self._tell(self._hooks.hook.kvswitch_transfer_started, transfer=transfer)

    def _on_ended(self, ticket: Ticket) -> None:
        self._tell(self._hooks.hook.kvswitch_transfer_ended, ticket=ticket)

    def _note_lost(self, sequence: Hashable, tokens: int) -> None:
        # Told to observers with the next step: not while a verb is half done.
        self._lost.append((sequence, tokens))

    def _tell(self, hook: Callable[..., object], **what: object) -> None:
        """Call an observer; its failure is nobody else's."""
        try:
            hook(switch=self, **what)
        except Exception:
            _log.exception("a plug-in has failed to observe")


def _shut(engine: TransferEngine, kv_cache: object) -> None:
    """End all transfers; then the KV cache that they touched may go."""
    engine.close()

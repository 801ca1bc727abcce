"""Both halves of kvswitch for one SGLang scheduler: what moves when, and the bytes.

SGLang has a scheduler on every tensor-parallel rank, each with its part of the KV cache. So there
is a planner on every rank, and all of them are told the same (`ReducedReports`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from time import perf_counter
from typing import Any

from kvswitch.errors import ConfigError
from kvswitch.hooks import make_backend
from kvswitch.messages import BlockIds
from kvswitch.switch import EngineSwapManager, ReducedReports, SwapStats, SwapWorker
from kvswitch.transfer import Layout, TransferEngine
from kvswitch_sglang.overhead import Overhead
from kvswitch_sglang.pages import PagePool
from kvswitch_sglang.settings import Settings

__all__ = ["LayerWaits", "Switching"]

log = logging.getLogger("sglang.srt.kvswitch")

_REGIONS = 2  # of a layer: keys and values


class Switching:
    """Plans and carries out the copies of one rank.

    Parameters
    ----------
    settings : Settings
    pages : PagePool
        Of which this becomes the holder.
    layout : Layout
        Keys and values of each layer, layer after layer.
    on_cuda : bool
        Whether the KV cache is on a CUDA device.
    page_tokens : int
    rank, num_ranks : int
    minimum : callable
        As for `ReducedReports`.
    overhead : Overhead
        Where time spent here is counted.
    stream : optional
        The stream on which SGLang runs its forwards; None for the current one, or where forwards
        are synchronous.

    Raises
    ------
    ConfigError
        There is not enough host memory, or no such copy backend.
    """

    def __init__(
        self,
        settings: Settings,
        pages: PagePool,
        layout: Layout,
        *,
        on_cuda: bool,
        page_tokens: int,
        rank: int,
        num_ranks: int,
        minimum: Callable[[Any], Any],
        overhead: Overhead,
        stream: object | None,
    ) -> None:
        host_blocks = settings.host_bytes // num_ranks // layout.block_bytes
        if host_blocks < 1:
            raise ConfigError(
                f"host_memory of {settings.host_memory} does not hold one page of "
                f"{layout.block_bytes} bytes on each of {num_ranks} ranks: give kvswitch more"
            )
        self._pages = pages
        self._stream = stream
        self._launched = on_cuda  # a forward has only been launched when SGLang returns from it
        self._layers = len(layout.regions) // _REGIONS
        backend = make_backend(settings.backend, layout, on_cuda=on_cuda)
        self._engine = TransferEngine.open(
            backend, layout, host_blocks, window_bytes=settings.window_bytes
        )
        try:
            self.planner = EngineSwapManager(
                pages,
                host_blocks,
                page_tokens,
                block_bytes=layout.block_bytes,
                first_group=settings.first_group,
                strategy=settings.strategy,
                swap=settings.preemption == "switch",
                reuse=settings.reuse,
            )
        except BaseException:
            self._engine.close()
            raise
        self.page_bytes = layout.block_bytes
        self._page_tokens = page_tokens
        self._swap = settings.preemption == "switch"
        self._always = settings.strategy in ("sync", "serial")
        self._worker = SwapWorker(self._engine, backend)
        self._reports = ReducedReports(rank, num_ranks, minimum)
        self._alone = num_ranks == 1
        self._loads: tuple[int, ...] = ()  # which the forward waits for layer by layer
        self._lost: tuple[Hashable, ...] = ()
        self._left: dict[Hashable, int] = {}  # tokens that a preempted request had computed
        self._recomputed = 0
        self._stall = 0.0
        self.overhead = overhead
        self._began = 0.0
        self._stalled = 0.0  # in the present forward
        self._seconds: float | None = None  # that the last forward took besides
        pages.holder = self

    # -- admission ---------------------------------------------------------------------------------

    def adopt(self, owner: Hashable, keys: Sequence[Hashable], priority: float) -> None:
        """Make copies that `keys` name the owner's: nobody less important takes them then."""
        self.planner.copies.adopt(owner, keys)
        self.planner.set_priority(owner, priority)

    def reach(self, owner: Hashable, keys: Sequence[Hashable]) -> int:
        """Tokens of `owner` that could be loaded, its own or by `keys` of its leading pages."""
        return self.planner.reach(owner, keys) if self._swap else 0

    def load(
        self,
        owner: Hashable,
        first: int,
        tokens: int,
        pages: BlockIds,
        *,
        keys: Sequence[Hashable],
        running: int,
        by_layer: bool,
        priority: float,
    ) -> None:
        """Load tokens `first` to `tokens` of `owner` into `pages`; they must be in `reach`.

        Parameters
        ----------
        pages : BlockIds
            Those behind the ones that hold the first `first` tokens.
        running : int
            Requests that could run now.
        by_layer : bool
            Whether the forward can wait for layers one by one.
        """
        # Pages before the first one are on the device, and play no part.
        blocks = [0] * (first // self._page_tokens) + pages.tolist()
        wait = (
            not by_layer
            or self._always
            or (
                # With nobody to hold up, there is nothing to be gained by waiting for everything.
                running > 0 and self.planner.worth_waiting(tokens - first, running)
            )
        )
        got = self.planner.swap_in(
            owner, first, tokens, blocks, keys=keys, wait=wait, by_layer=by_layer
        )
        assert got == tokens, f"{owner!r}: {got} tokens of {tokens} in reach"
        self.planner.set_priority(owner, priority)

    def resumed(self, owner: Hashable, tokens: int) -> None:
        """`owner` runs with that many tokens computed; the rest is to be computed (again)."""
        left = self._left.pop(owner, None)
        if left is not None:
            self._recomputed += max(0, left - tokens)

    # -- leaving -----------------------------------------------------------------------------------

    def preempted(
        self,
        owner: Hashable,
        tokens: int,
        pages: BlockIds,
        *,
        keys: Sequence[Hashable],
        priority: float,
    ) -> None:
        """`owner` is about to lose its pages: send what the host lacks of it."""
        self._left[owner] = tokens
        if tokens:
            self.planner.swap_out(owner, tokens, pages.tolist(), keys=keys, priority=priority)

    def lost(self, owner: Hashable, tokens: int) -> None:
        """The load of `owner` has failed: as many tokens are to be computed again."""
        self.drop(owner)
        self._left[owner] = tokens

    def ended(self, owner: Hashable, pages: BlockIds, keys: Sequence[Hashable]) -> None:
        """`owner` has ended, and its full pages are the tree's: send them before they go."""
        self._left.pop(owner, None)
        ids = pages.tolist()
        if ids and self._swap:
            self._pages.note_ended(owner, ids, keys)
        self.planner.retire(owner, len(ids) * self._page_tokens, ids, keys)

    def drop(self, owner: Hashable) -> None:
        """Forget `owner`."""
        self._left.pop(owner, None)
        self.planner.drop(owner)

    def left(self, owner: Hashable) -> None:
        """`owner` was aborted while it was away: what is being sent of it is kept for others."""
        self._left.pop(owner, None)
        self.planner.leave(owner)

    def reset(self) -> None:
        """No copy may be used again, and nothing under way may write any more."""
        self.planner.invalidate_all()
        self.settle()
        self._left.clear()

    # -- what the pages ask (`Holder`) -------------------------------------------------------------

    def yield_pages(self, pages: int) -> bool:
        """Give up holds on at least so many, if so many are held; whether there was any."""
        held = self.planner.held_blocks > 0
        self.planner.give_way(pages)
        return held

    def written(self, pages: BlockIds) -> None:
        """Take note that the coming forward writes these."""
        if self.planner.leaving:
            self.planner.written(pages.tolist())

    def going(self, owner: Hashable) -> None:
        """Pages of `owner`, which has ended, are about to be given back: send them now."""
        self.planner.send_ended(owner)

    def settle(self) -> None:
        """Wait until everything under way has ended."""
        started = perf_counter()
        while self.planner.busy:
            self._submit()
            self._engine.wait(self.planner.under_way)
            self._observe(None)
        waited = perf_counter() - started
        self._stall += waited
        self.overhead.leave_out(waited)

    # -- the pass ----------------------------------------------------------------------------------

    def before_forward(self) -> None:
        """Begin what has been planned; wait for what the forward overwrites or must have."""
        with self.overhead:
            self._submit()
        waited = self._worker.wait()
        self._stall += waited
        began = perf_counter()
        if self._launched:  # the last one has taken until now
            past = began - self._began - self._stalled - waited
            self._seconds = past if self._began else None
        self._began, self._stalled = began, 0.0

    def _submit(self) -> None:
        if not self.planner.busy:
            return
        self.planner.send_idle()
        orders, owners = self.planner.orders()
        waited = set(orders.wait)
        self._loads += tuple(i for i in owners if i not in waited)
        self._worker.submit(orders, self._stream)

    def wait_layer(self, layer: int) -> None:
        """Wait until what the forward needs of a layer has been loaded."""
        if self._loads:
            self._stalled += self._worker.wait_regions(self._loads, _REGIONS * (layer + 1))

    def after_forward(self) -> tuple[Hashable, ...]:
        """End the loads of a forward that has been given to the device.

        Returns
        -------
        tuple of Hashable
            Owners whose tokens did not arrive: what the forward has made of them means nothing.
        """
        if not self._launched:
            self._seconds = perf_counter() - self._began - self._stalled
        if self._loads:
            # A forward that did not ask for some layer in Python goes no further without it.
            self._stalled += self._worker.wait_regions(self._loads, _REGIONS * self._layers)
            self._engine.wait(self._loads)
            self._loads = ()
        self._stall += self._stalled
        with self.overhead:
            self._observe(self._seconds)
            lost, self._lost = self._lost, ()
        return lost

    def tick(self) -> None:
        """Go on while there is nothing to run."""
        self._began = 0.0
        if self.planner.busy:
            self._submit()
            self._observe(None)

    def _observe(self, seconds: float | None) -> None:
        under_way = self.planner.under_way
        if not under_way and not self._alone:
            return  # no rank has anything to tell; nobody reduces
        report = self._worker.report(step_seconds=seconds)
        self._lost += self.planner.observe(self._reports.reduce(report, under_way))

    # -- reports -----------------------------------------------------------------------------------

    def stats(self) -> SwapStats:
        """Counters so far."""
        stats = self.planner.stats()
        stats.tokens_lost = self._recomputed
        stats.stall_seconds = self._stall
        stats.overhead_seconds = self.overhead.seconds
        return stats

    def held_pages(self) -> list[int]:
        """Pages that transfers hold, one entry for each hold (for tests)."""
        return self.planner.holds()

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves (for tests)."""
        self.planner.check_integrity()
        self._pages.check_integrity(self.held_pages())

    def close(self) -> None:
        """End all transfers, then give the memory back. May be called again."""
        self._engine.close()


class LayerWaits:
    """What SGLang's KV cache asks before a layer is read (its ``layer_transfer_counter``)."""

    consumer_index = -1

    def __init__(self, switching: Switching) -> None:
        self.wait_until = switching.wait_layer

    def set_consumer(self, index: int) -> None:
        """Do nothing: there is one forward at a time."""

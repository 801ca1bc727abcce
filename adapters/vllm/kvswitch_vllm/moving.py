"""The connector's half in each worker: the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kvswitch.errors import ConfigError
from kvswitch.hooks import make_backend
from kvswitch.messages import decode_orders, encode
from kvswitch.switch import SwapWorker
from kvswitch.transfer import Layout, TransferEngine, layout_of
from kvswitch_vllm.settings import Settings
from kvswitch_vllm.wire import Load, StepOrders, WorkerReports

__all__ = ["Moving", "cache_layout"]

_KEPT = 4096  # failed swap-outs that are remembered
_MOMENT = 1e-3  # seconds that a step without a forward waits for what is under way


class Moving:
    """Carries out the orders on one rank.

    Parameters
    ----------
    kv_caches : mapping of str to tensor
        What vLLM registers: a tensor for each layer.
    settings : Settings
    num_blocks, block_bytes, host_blocks : int
        As the scheduler's half has them.
    rank : int

    Raises
    ------
    ConfigError
        The KV cache is not laid out in blocks as the scheduler's half expects, or there is not
        enough host memory.
    """

    def __init__(
        self,
        kv_caches: Mapping[str, Any],
        settings: Settings,
        *,
        num_blocks: int,
        block_bytes: int,
        host_blocks: int,
        rank: int,
    ) -> None:
        self._rank = rank
        self._kv_caches = kv_caches  # the memory that the layout points to
        layout = cache_layout(kv_caches, num_blocks)
        if layout.block_bytes != block_bytes:
            raise ConfigError(
                f"kvswitch: rank {rank} has blocks of {layout.block_bytes} bytes, the scheduler "
                f"counts {block_bytes}: this model's KV cache is not supported"
            )
        first = next(iter(kv_caches.values()), None)
        backend = make_backend(settings.backend, layout, on_cuda=getattr(first, "is_cuda", False))
        self._engine = TransferEngine.open(
            backend, layout, host_blocks, window_bytes=settings.window_bytes
        )
        self._worker = SwapWorker(self._engine, backend)
        self._loads: dict[int, Load] = {}
        self._sources: dict[int, tuple[int, ...]] = {}  # swap-outs whose bytes a load reads
        self._failed: set[int] = set()  # swap-outs
        self._received: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._idle = False
        self._stall = 0.0
        self._reports: list[tuple[int, bytes, float]] = []

    def before_forward(self, step: StepOrders) -> None:
        """Begin what is ordered; wait for what the forward is going to overwrite or read."""
        for load in step.lost:
            self._fail(load)
        self._idle = step.idle
        if step.orders is None:
            return
        orders = decode_orders(step.orders)
        self._loads.update(step.loads)
        self._sources.update({t.id: t.after for t in orders.transfers if t.id in step.loads})
        self._worker.submit(orders)
        self._stall += self._worker.wait()

    def after_forward(self) -> set[str]:
        """Collect what has ended; the requests whose load has."""
        if self._idle:
            # Else an engine in the same process, stepping on and on, would keep Python from those
            # who copy: they would take ten times as long.
            with suppress(TimeoutError):
                self._engine.drain(_MOMENT)
        report = self._worker.report()
        self._failed.update(transfer for transfer in report.failed if transfer not in self._loads)
        for transfer in (*report.completed, *report.failed):
            load = self._loads.pop(transfer, None)
            if load is None:
                continue
            # What never got to the host was not brought back by a copy that went well.
            if transfer in report.failed or not self._failed.isdisjoint(self._sources[transfer]):
                self._fail(load)
            elif load.request is not None:
                self._received.add(load.request)
            del self._sources[transfer]
        if len(self._failed) > _KEPT:
            # A load may name a failed swap-out until the scheduler's half has heard of it from all
            # ranks; by then some more may have failed, but not thousands.
            self._failed = set(sorted(self._failed)[-_KEPT // 2 :])
        if report.completed or report.failed or self._stall:
            self._reports.append((self._rank, encode(report), self._stall))
            self._stall = 0.0
        received, self._received = self._received, set()
        return received

    def _fail(self, load: Load) -> None:
        self._bad_blocks.update(load.blocks)
        if load.request is not None:
            self._received.add(load.request)  # vLLM wants to hear of failed ones, too

    def take_bad_blocks(self) -> set[int]:
        """Device blocks whose load has failed since the last call."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def take_reports(self) -> WorkerReports | None:
        """What the scheduler's half is to know."""
        if not self._reports:
            return None
        reports, self._reports = self._reports, []
        return WorkerReports(reports)

    def close(self) -> None:
        """End all transfers, then give the memory back."""
        self._engine.close()


def cache_layout(kv_caches: Mapping[str, Any], num_blocks: int) -> Layout:
    """Where the blocks of vLLM's KV cache lie, whatever order its dimensions are in memory.

    Parameters
    ----------
    kv_caches : mapping of str to tensor
        For each layer a tensor with the block, or K and V and then the block, as first dimension;
        or one of smaller blocks, several to a block of vLLM's.
    num_blocks : int

    Raises
    ------
    ConfigError
        It is none of these.
    """
    arrays, seen = [], set()
    for name, cache in kv_caches.items():
        if not hasattr(cache, "data_ptr"):
            raise ConfigError(f"kvswitch: the KV cache of {name} is no single tensor")
        if cache.data_ptr() in seen:
            continue  # layers that share their KV cache
        seen.add(cache.data_ptr())
        if cache.shape[0] == num_blocks:
            parts = [cache]
        elif cache.ndim > 1 and cache.shape[0] == 2 and cache.shape[1] == num_blocks:
            parts = [cache[0], cache[1]]
        elif cache.shape[0] and cache.shape[0] % num_blocks == 0:
            parts = [cache.unflatten(0, (num_blocks, -1))]
        else:
            raise ConfigError(
                f"kvswitch: the KV cache of {name} has shape {tuple(cache.shape)}, in which "
                f"{num_blocks} blocks cannot be made out"
            )
        arrays += parts
    return layout_of(arrays).merged()

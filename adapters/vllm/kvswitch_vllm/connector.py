"""The KV connector that vLLM loads: hands every call to the half that its process has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger

from kvswitch_vllm import checks
from kvswitch_vllm.metrics import SwitchMetrics, SwitchStats
from kvswitch_vllm.moving import Moving
from kvswitch_vllm.planning import Planning
from kvswitch_vllm.wire import StepOrders, WorkerReports

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # before 0.32
    CacheHitSource = None

__all__ = ["KVSwitchConnector"]

log = init_logger("vllm.kvswitch")

T = TypeVar("T")


def _timed(call: Callable[..., T]) -> Callable[..., T]:
    """Count the time spent in a method of the scheduler's side."""

    @functools.wraps(call)
    def timed(self: KVSwitchConnector, *args: Any, **kwargs: Any) -> T:
        started = perf_counter()
        try:
            return call(self, *args, **kwargs)
        finally:
            self._planning.overhead_seconds += perf_counter() - started

    return timed


class KVSwitchConnector(KVConnectorBase_V1, SupportsHMA):
    """Preemption as a context switch, and the end of a turn as one, too.

    Every override takes more arguments than it knows, since vLLM adds some from version to version.
    """

    if CacheHitSource is not None:
        _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any, *args: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config, *args)
        self._settings = checks.settings_of(vllm_config)
        self._block_bytes = checks.check_cache(vllm_config, kv_cache_config)
        self._ranks = checks.num_ranks(vllm_config)
        self._host_blocks = checks.host_blocks(self._settings, self._block_bytes, self._ranks)
        self.planning: Planning | None = None
        self._moving: Moving | None = None
        if role == KVConnectorRole.SCHEDULER:
            self.planning = Planning(
                self._settings,
                host_blocks=self._host_blocks,
                block_tokens=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
                block_bytes=self._block_bytes,
                num_ranks=self._ranks,
                asynchronous=bool(vllm_config.scheduler_config.async_scheduling),
                alone=vllm_config.parallel_config.data_parallel_size == 1,
                log=log,
            )

    @property
    def requires_kv_delivery(self) -> bool:
        """A preempted request may finish: nothing of it has to be handed to anybody."""
        return False

    # -- scheduler -------------------------------------------------------------------------------

    @property
    def _planning(self) -> Planning:
        assert self.planning is not None
        return self.planning

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Block groups go into its pool."""
        super().bind_kv_cache_manager(kv_cache_manager)
        self._planning.bind(kv_cache_manager)

    def on_new_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """A request has come."""
        self._planning.arrived(request)

    @_timed
    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[int | None, bool]:
        """What the host has of it; asked again in each step while it waits, so cheap and pure."""
        return self._planning.matched(request, num_computed_tokens)

    @_timed
    def update_state_after_alloc(
        self, request: Any, blocks: Any, num_external_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """It has blocks: swap in."""
        self._planning.allocated(request, blocks, num_external_tokens)

    @_timed
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """The step's orders."""
        return self._planning.step(scheduler_output)

    @_timed
    def update_connector_output(self, connector_output: Any) -> None:
        """What has ended."""
        self._planning.observe(connector_output)

    @_timed
    def request_finished(
        self, request: Any, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its turn is over. The blocks are vLLM's to free at once: those read are held."""
        self._planning.finished(request, block_ids)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[Sequence[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`; there is one group."""
        return self.request_finished(request, block_ids[0])

    def has_pending_push_work(self) -> bool:
        """Completions travel only with steps."""
        return self.planning is not None and self.planning.busy

    def reset_cache(self) -> bool | None:
        """No copy may be used again."""
        if self.planning is not None:
            self.planning.reset()
        return True

    # -- worker ----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Get the host memory, and know the device's."""
        if self._settings.preemption != "switch":
            return
        self._moving = Moving(
            kv_caches,
            self._settings,
            num_blocks=self._kv_cache_config.num_blocks,
            block_bytes=self._block_bytes,
            host_blocks=self._host_blocks,
            rank=checks.own_rank() % self._ranks,
        )

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Before anything is written in this step."""
        if self._moving is not None and isinstance(kv_connector_metadata, StepOrders):
            self._moving.before_forward(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Everything was started in `handle_preemptions`."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are waited for whole, or not at all."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """What is read is held: nothing to wait for."""

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose load has ended."""
        if self._moving is None:
            return None, None
        return None, self._moving.after_forward() or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks whose load has failed; vLLM recomputes them."""
        return set() if self._moving is None else self._moving.take_bad_blocks()

    def build_connector_worker_meta(self) -> WorkerReports | None:
        """What has ended on this rank."""
        return None if self._moving is None else self._moving.take_reports()

    def shutdown(self) -> None:
        """End all transfers."""
        if self._moving is not None:
            self._moving.close()
            self._moving = None

    # -- both ------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> SwitchStats | None:
        """What was counted since the last step (scheduler's side only)."""
        counted = None if self.planning is None else self.planning.take_counters()
        return None if counted is None else SwitchStats(data=dict(counted))

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> SwitchStats:
        """Stats out of what was sent to the front end."""
        return SwitchStats(data=data or {})

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> SwitchMetrics:
        """`kvswitch_*` metrics."""
        return SwitchMetrics(*args, **kwargs)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """All layers of a block together where the backend can: then a run is one copy."""
        return checks.wanted_layout()

    def take_events(self) -> Iterable[Any]:
        """None: vLLM's own events tell of its prefix cache."""
        return ()

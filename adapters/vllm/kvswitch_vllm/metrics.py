"""Counters on vLLM's own metrics endpoint and log line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvswitch.switch import SwapStats

__all__ = ["Counters", "SwitchMetrics", "SwitchStats"]

# Name of a counter -> what it counts. All but the gauges only ever grow.
COUNTERS = {
    "switches_out": "Requests that were preempted with their KV cache kept",
    "switches_in": "Swap-ins: preempted requests, and new ones whose prefix the host had",
    "bytes_out": "Bytes swapped out, device to host",
    "bytes_in": "Bytes swapped in, host to device",
    "blocks_out": "Blocks swapped out",
    "blocks_in": "Blocks swapped in",
    "blocks_spared": "Blocks that were not sent, because the host had them",
    "copies_out": "Contiguous copies swapped out; blocks_out / copies_out is the granularity",
    "copies_in": "Contiguous copies swapped in; blocks_in / copies_in is the granularity",
    "idle_copies": "Finished requests that were copied while nothing else went out",
    "stall_seconds": "Time in which the batch waited for transfers",
    "overhead_seconds": "Time inside kvswitch in the scheduler, without transfers",
    "conflicts": "Waits for a transfer whose blocks were needed",
    "transfers_failed": "Transfers that failed",
    "contaminated_blocks": "Host copies lost to more important ones",
    "recomputed_tokens": "Tokens of preempted requests that had to be recomputed",
}
GAUGES = {
    "host_usage": "Share of host blocks that hold a copy under way or in use, 0 to 1",
    "held_blocks": "Device blocks that swap-outs still hold",
}


class Counters:
    """Turns the planner's totals into what has changed since the last look."""

    def __init__(self) -> None:
        self._before = dict.fromkeys(COUNTERS, 0.0)
        self._gauges = dict.fromkeys(GAUGES, 0.0)

    def take(
        self, stats: SwapStats, block_bytes: int, host_usage: float, held_blocks: int
    ) -> dict[str, float] | None:
        """Differences of the counters, and the gauges; None if nothing has changed."""
        now: dict[str, float] = {
            "switches_out": stats.preemptions,
            "switches_in": stats.resumptions,
            "bytes_out": stats.blocks_out * block_bytes,
            "bytes_in": stats.blocks_in * block_bytes,
            "blocks_out": stats.blocks_out,
            "blocks_in": stats.blocks_in,
            "blocks_spared": stats.blocks_spared,
            "copies_out": stats.copies_out,
            "copies_in": stats.copies_in,
            "idle_copies": stats.idle_copies,
            "stall_seconds": stats.stall_seconds,
            "overhead_seconds": stats.overhead_seconds,
            "conflicts": stats.conflicts,
            "transfers_failed": stats.transfers_failed,
            "contaminated_blocks": stats.contaminated_blocks,
            "recomputed_tokens": stats.tokens_lost,
        }
        gauges: dict[str, float] = {"host_usage": host_usage, "held_blocks": held_blocks}
        quiet = all(
            now[name] == self._before[name] for name in COUNTERS if name != "overhead_seconds"
        )
        if quiet and gauges == self._gauges:
            return None
        changed = {name: now[name] - self._before[name] for name in COUNTERS}
        self._before, self._gauges = now, gauges
        return {**changed, **gauges}


@dataclass
class SwitchStats(KVConnectorStats):
    """What was counted since the last report; the gauges are the newest."""

    def reset(self) -> None:
        """Begin anew."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add the counters of a later report."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """The line in vLLM's log, for the interval since the last one."""
        data: dict[str, Any] = self.data
        line: dict[str, int | float] = {
            "switches out": int(data.get("switches_out", 0)),
            "in": int(data.get("switches_in", 0)),
            "MB out": round(data.get("bytes_out", 0) / 1e6, 1),
            "MB in": round(data.get("bytes_in", 0) / 1e6, 1),
            "blocks spared": int(data.get("blocks_spared", 0)),
            "recomputed tokens": int(data.get("recomputed_tokens", 0)),
            "stall s": round(data.get("stall_seconds", 0.0), 3),
            "host usage": round(data.get("host_usage", 0.0), 3),
        }
        if data.get("copies_in"):
            line["blocks per copy in"] = round(data["blocks_in"] / data["copies_in"], 1)
        return line

    def is_empty(self) -> bool:
        """Whether there is nothing to report."""
        return not self.data


class SwitchMetrics(KVConnectorPromMetrics):
    """`kvswitch_*` on vLLM's Prometheus endpoint."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        _unregister()  # an earlier engine's in this process, as vLLM does with its own
        self._metrics: dict[str, dict[int, Any]] = {}
        for names, kind, more in (
            (COUNTERS, self._counter_cls, {}),
            (GAUGES, self._gauge_cls, {"multiprocess_mode": "mostrecent"}),
        ):
            for name, documentation in names.items():
                metric = kind(
                    name=f"kvswitch_{name}",
                    documentation=documentation,
                    labelnames=labelnames,
                    **more,
                )
                self._metrics[name] = {
                    engine: metric.labels(*values)
                    for engine, values in per_engine_labelvalues.items()
                }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Take in a report."""
        for name, value in transfer_stats_data.items():
            metric = self._metrics[name][engine_idx]
            if name in GAUGES:
                metric.set(value)
            elif value > 0:
                metric.inc(value)


def _unregister() -> None:
    from prometheus_client import REGISTRY

    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("kvswitch_"):
            REGISTRY.unregister(collector)

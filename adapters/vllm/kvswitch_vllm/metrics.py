"""Counters on vLLM's own metrics endpoint and log line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from kvswitch.switch import COUNTERS, GAUGES

__all__ = ["SwitchMetrics", "SwitchStats"]


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

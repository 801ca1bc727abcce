"""`kvswitch_*` on SGLang's Prometheus endpoint."""

from __future__ import annotations

from time import monotonic
from typing import Any

from kvswitch.switch import COUNTERS, GAUGES, Counters
from kvswitch_sglang.switching import Switching

__all__ = ["Metrics"]

_INTERVAL = 1.0  # seconds between two updates


class Metrics:
    """Exports the counters of one rank.

    Parameters
    ----------
    cache : KVSwitchRadixCache
    switching : Switching
    """

    def __init__(self, cache: Any, switching: Switching) -> None:
        from prometheus_client import Counter, Gauge
        from sglang.srt.layers.dp_attention import is_dp_attention_enabled
        from sglang.srt.observability.metrics_collector import radix_cache_metric_labels
        from sglang.srt.runtime_context import get_observability, get_parallel

        labels = radix_cache_metric_labels(
            type(cache).__name__, get_parallel(), is_dp_attention_enabled()
        )
        labels.update(get_observability().extra_metric_labels or {})
        names = list(labels)
        _unregister()
        self._metrics: dict[str, Any] = {
            name: Counter(f"kvswitch_{name}", text, names).labels(**labels)
            for name, text in COUNTERS.items()
        }
        self._metrics |= {
            name: Gauge(f"kvswitch_{name}", text, names, multiprocess_mode="mostrecent").labels(
                **labels
            )
            for name, text in GAUGES.items()
        }
        self._switching = switching
        self._counters = Counters()
        self._next = 0.0

    def update(self) -> None:
        """Export what has changed, at most once a second."""
        if (now := monotonic()) < self._next:
            return
        self._next = now + _INTERVAL
        switching = self._switching
        pool = switching.planner.copies.pool
        changed = self._counters.take(
            switching.stats(),
            switching.page_bytes,
            1 - pool.free_blocks / pool.num_blocks,
            switching.planner.held_blocks,
        )
        for name, value in (changed or {}).items():
            if name in GAUGES:
                self._metrics[name].set(value)
            elif value > 0:
                self._metrics[name].inc(value)


def _unregister() -> None:
    """Forget an earlier scheduler's metrics in this process."""
    from prometheus_client import REGISTRY

    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith("kvswitch_"):
            REGISTRY.unregister(collector)

"""What an engine's metrics endpoint shows of switching: the same names on every engine."""

from __future__ import annotations

from kvswitch.switch.stats import SwapStats

__all__ = ["COUNTERS", "GAUGES", "Counters"]

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

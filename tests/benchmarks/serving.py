"""What the planner makes of real workloads, in virtual time: `python tests/benchmarks/serving.py`.

Prints plain tables and writes them to bench-results/serving.json. Everything is deterministic: the
figures depend on the code and the seeds, not on the machine that computes them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import msgspec
from free_list import FreeListPool
from serving_workloads import (
    FEW_LONG,
    MANY_SHORT,
    SHAREGPT,
    Machine,
    Workload,
    make_engine,
)

from kvswitch.blocks import BlockGroupPool
from kvswitch.scheduling import PriorityTrace
from kvswitch.sim.engine import SimEngine
from kvswitch.sim.memory import SwitchMemory
from kvswitch.switch import SwapStats

__all__ = ["Served", "free_lists", "granularity", "main", "serve"]

EPOCHS = 4096  # length of a priority trace; it starts anew at its end
INSTANT = 1e18  # bytes per second: transfers take no time, so that all runs switch alike

Row = dict[str, str | int | float]
Table = list[Row]


def serve(
    workload: Workload,
    seed: int = 0,
    *,
    count: int = 600,
    policy: str = "random",
    warm_up: int = 0,
    iterations: int | None = None,
    **machine: Any,
) -> Served:
    """Serve `count` conversations; what `iterations` after the first `warm_up` did (all if None).

    `machine` replaces settings of the workload's machine.
    """
    trace = getattr(PriorityTrace, policy)(seed, count, EPOCHS)
    scripts = workload.scripts(seed, count)
    engine, memory = make_engine(replace(workload.machine, **machine), scripts, trace)
    engine.serve(warm_up)
    before = Served.so_far(engine, memory)
    engine.serve(iterations)
    served = Served.so_far(engine, memory).since(before)
    engine.close()
    return served


@dataclass(frozen=True)
class Served:
    """What some iterations did; `needed` is the sum over them of device blocks in need."""

    tokens: int
    recomputed: int
    turns: int
    iterations: int
    seconds: float
    stall: float
    needed: int
    blocks: int
    stats: SwapStats

    @classmethod
    def so_far(cls, engine: SimEngine, memory: SwitchMemory) -> Served:
        """Since the start."""
        recorder = engine.recorder
        return cls(
            tokens=sum(recorder._tokens),
            recomputed=recorder.tokens_recomputed,
            turns=recorder.turns,
            iterations=engine.iterations,
            seconds=engine.now,
            stall=sum(recorder._stalls) + recorder._idle_stall,
            needed=recorder._needed,
            blocks=memory.planner.device.num_blocks,
            stats=replace(memory.stats),
        )

    def since(self, before: Served) -> Served:
        """What came after `before`."""
        mine, theirs = asdict(self), asdict(before)
        swaps = {name: value - theirs["stats"][name] for name, value in mine.pop("stats").items()}
        counts = {name: value - theirs[name] for name, value in mine.items()}
        return Served(**{**counts, "blocks": self.blocks, "stats": SwapStats(**swaps)})

    @property
    def throughput(self) -> float:
        """New tokens per virtual second."""
        return self.tokens / self.seconds

    @property
    def occupancy(self) -> float:
        """Mean share of device blocks that were needed."""
        return self.needed / max(self.iterations, 1) / self.blocks


@contextmanager
def free_lists() -> Iterator[None]:
    """Give planners made meanwhile lists of free blocks in place of block groups."""
    users = [
        name
        for name, module in sys.modules.items()
        if name.startswith("kvswitch.") and vars(module).get("BlockGroupPool") is BlockGroupPool
    ]
    patches = [patch(f"{name}.BlockGroupPool", FreeListPool) for name in users]
    for each in patches:
        each.start()
    try:
        yield
    finally:
        for each in patches:
            each.stop()


def granularity(blocks: int, copies: int) -> float:
    """Blocks per copy; 0 if there were none."""
    return blocks / copies if copies else 0.0


# -- what is measured --------------------------------------------------------------------------


def _saturated(seed: int, **settings: Any) -> Served:
    """Serve ShareGPT; what was done from when all memory is taken and requests queue."""
    return serve(SHAREGPT, seed, warm_up=2500, iterations=4000, **settings)


def _runs(seeds: Iterable[int], name: str, **settings: Any) -> Row:
    """Granularity of a setting, as median and range over seeds."""
    runs = [_saturated(seed, **settings) for seed in seeds]
    stats = [run.stats for run in runs]
    return {
        "setting": name,
        "occupancy": _spread([run.occupancy for run in runs], 3),
        "in": _spread([granularity(s.blocks_in, s.copies_in) for s in stats], 1),
        "out, full": _spread([granularity(s.blocks_out_full, s.copies_out_full) for s in stats], 1),
        "out, increment": _spread(
            [granularity(s.blocks_out_incremental, s.copies_out_incremental) for s in stats], 2
        ),
        "tokens/s": _spread([run.throughput for run in runs], 0),
    }


def contiguity(seeds: Sequence[int]) -> Table:
    """Blocks per copy, block groups against lists of free blocks."""
    rows = []
    for policy in ("random", "markov"):
        for reuse in (True, False):
            name = f"{policy}, reuse {'on' if reuse else 'off'}"
            for headroom in (0.06, 0.15):
                settings = {"policy": policy, "reuse": reuse, "headroom": headroom}
                rows.append(_runs(seeds, f"{name}, headroom {headroom:.0%}", **settings))
            with free_lists():
                rows.append(_runs(seeds[:1], f"{name}, free list", policy=policy, reuse=reuse))
    return rows


def reuse(seeds: Sequence[int]) -> Table:
    """Swap-outs with and without reuse, for the same switches (the paper's Table 1)."""
    rows: Table = []
    for seed in seeds:
        for on in (False, True):
            stats = _saturated(seed, reuse=on, strategy="sync", bandwidth=INSTANT).stats
            rows.append(
                {
                    "seed": seed,
                    "reuse": "on" if on else "off",
                    "switched out": stats.preemptions + stats.evictions,
                    "blocks": stats.blocks_out,
                    "copies": stats.copies_out,
                    "blocks/copy": round(granularity(stats.blocks_out, stats.copies_out), 2),
                    "share": round(stats.blocks_out / int(rows[-1]["blocks"]), 3) if on else 1.0,
                }
            )
    return rows


def strategies(seeds: Sequence[int]) -> Table:
    """New tokens per second of each strategy, and adaptive against the better of the others."""
    rows: Table = []
    for workload, count in ((MANY_SHORT, 400), (FEW_LONG, 60)):
        runs = {
            mode: [serve(workload, seed, count=count, strategy=mode) for seed in seeds]
            for mode in ("async", "sync", "adaptive")
        }
        speed = {mode: [run.throughput for run in of] for mode, of in runs.items()}
        for mode, of in runs.items():
            best = [max(a, s) for a, s in zip(speed["async"], speed["sync"], strict=True)]
            share = [mine / other for mine, other in zip(speed[mode], best, strict=True)]
            rows.append(
                {
                    "workload": workload.name,
                    "strategy": mode,
                    "tokens/s": _spread(speed[mode], 1),
                    "of the better": _spread(share, 3),
                    "stall": _spread([run.stall / run.seconds for run in of], 3),
                }
            )
    return rows


def sensitivity(seeds: Sequence[int]) -> Table:
    """Granularity against the size of the first group, and without headroom."""
    rows = [
        _runs(seeds, f"first group {blocks}", first_group=blocks)
        for blocks in (4, 16, 60, 100, 190)
    ]
    rows.append(_runs(seeds, "headroom 0", headroom=0.0))
    return rows


def host_memory(seeds: Sequence[int]) -> Table:
    """What is left of reuse and granularity when host memory is short."""
    rows: Table = []
    for blocks in (28_610, 16_000, 12_000, 8_000, 4_000, 1_350):
        run = _saturated(seeds[0], host_blocks=blocks)
        stats = run.stats
        rows.append(
            {
                "host blocks": blocks,
                "in": round(granularity(stats.blocks_in, stats.copies_in), 1),
                "out": round(granularity(stats.blocks_out, stats.copies_out), 2),
                "spared": round(stats.share_spared, 3),
                "contaminated": stats.contaminated_blocks,
                "recomputed": run.recomputed,
                "tokens/s": round(run.throughput),
            }
        )
    return rows


PARTS: Mapping[str, Callable[[Sequence[int]], Table]] = {
    "contiguity": contiguity,
    "reuse": reuse,
    "strategies": strategies,
    "sensitivity": sensitivity,
    "host memory": host_memory,
}


# -- report --------------------------------------------------------------------------------------


def _spread(values: Sequence[float], digits: int) -> str:
    """Median and, of several values, the range."""
    text = f"{median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f}-{max(values):.{digits}f})"
    return text


def _print(title: str, table: Table) -> None:
    print(f"\n{title}")
    lines = [list(table[0]), *([str(value) for value in row.values()] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    """Measure all parts, or those named."""
    parser = argparse.ArgumentParser(description="Serving benchmarks in virtual time.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default 3)")
    parser.add_argument("--output", type=Path, default=Path("bench-results/serving.json"))
    arguments = parser.parse_args()
    if unknown := [part for part in arguments.parts if part not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    seeds = list(range(arguments.seeds))
    tables = {}
    for name in arguments.parts or PARTS:
        tables[name] = PARTS[name](seeds)
        _print(PARTS[name].__doc__ or name, tables[name])
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python tests/benchmarks/serving.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.platform()}",
        "versions": {
            "kvswitch": version("kvswitch"),
            "numpy": version("numpy"),
            "python": platform.python_version(),
        },
        "seeds": seeds,
        "served by": asdict(Machine()),
        "tables": tables,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    print(f"\nWritten to {arguments.output}")


if __name__ == "__main__":
    main()

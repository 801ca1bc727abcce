"""A workload served by the real SGLang scheduler in this process, in real time."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison import Outcome
from workloads import Item

sys.path.insert(0, str(Path(__file__).parents[2] / "engines/sglang"))
from harness import Server

__all__ = ["WARM", "Server", "serve", "warm_up"]

WARM = 2  # requests of `warm_up`
_PATIENCE = 2000  # passes without a new token


def warm_up(server: Server) -> None:
    """What is compiled or allocated once is not measured."""
    for length in (600, 1):
        server.run([server.submit(f"warm{length}", [7] * length, 4, priority=0)])
    server.scheduler.flush_cache()


def serve(server: Server, items: Sequence[Item]) -> Outcome:
    """Serve `items` as they come."""
    counted = _counters(server)
    outcome = Outcome()
    waiting = sorted((i for i in items if i.after is None), key=lambda item: item.arrival)
    followers = {item.after: item for item in items if item.after is not None}
    prompts: dict[str, list[int]] = {}
    live: dict[str, Any] = {}
    idle = 0  # passes without a new token
    last = start = time.perf_counter()
    while waiting or live:
        now = time.perf_counter() - start
        while waiting and waiting[0].arrival <= now:
            item = waiting.pop(0)
            before = [] if item.after is None else prompts[item.after] + outcome.tokens[item.after]
            prompts[item.name] = before + item.prompt
            outcome.arrived[item.name] = item.arrival
            outcome.times[item.name], outcome.tokens[item.name] = [], []
            live[item.name] = server.submit(item.name, prompts[item.name], item.output, priority=0)
        if not live:
            time.sleep(0.001)
            last = time.perf_counter()
            continue
        server.step()
        idle += 1
        if idle > _PATIENCE:
            raise RuntimeError(f"{len(live)} requests do not get on: {sorted(live)}")
        now = time.perf_counter()
        outcome.inversion += (now - last) * _inverted(list(live.values()))
        last = now
        for name, request in list(live.items()):
            new = len(request.output_ids) - len(outcome.times[name])
            idle = 0 if new > 0 else idle
            outcome.times[name] += [now - start] * new
            if request.finished():
                outcome.tokens[name] = list(request.output_ids)
                outcome.preemptions += request.retraction_count
                del live[name]
                if (follower := followers.pop(name, None)) is not None:
                    arrival = now - start + follower.arrival
                    waiting.append(Item(**{**vars(follower), "arrival": arrival}))
                    waiting.sort(key=lambda item: item.arrival)
    outcome.seconds = time.perf_counter() - start
    outcome.counters = {name: n - counted[name] for name, n in _counters(server).items()}
    return outcome


def _counters(server: Server) -> dict[str, float]:
    switching = getattr(server.cache, "switching", None)
    return {} if switching is None else asdict(switching.stats())


def _inverted(requests: Sequence[Any]) -> int:
    """How many wait who are more important than one that runs."""
    lowest = min((r.priority or 0 for r in requests if r.kv.holds_kv), default=float("inf"))
    waiting = (r for r in requests if not r.kv.holds_kv and not r.finished())
    return sum((r.priority or 0) > lowest for r in waiting)

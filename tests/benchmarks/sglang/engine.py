"""A workload served by the real SGLang scheduler in this process, in real time."""

from __future__ import annotations

import csv
import gzip
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kvswitch.sim
from kvswitch.hooks import make_policy

sys.path.insert(0, str(Path(__file__).parents[2] / "engines/sglang"))
from harness import Server

_LENGTHS = Path(kvswitch.sim.__file__).parent / "data/sharegpt_turns.csv.gz"
_VOCABULARY = 48000


@dataclass(frozen=True)
class Item:
    """A request, and when it comes."""

    name: str
    arrival: float
    prompt: list[int]
    output: int


@dataclass
class Outcome:
    """What a run was like.

    Attributes
    ----------
    ttft, between : list of float
        Seconds to each request's first token, and between any two tokens of one.
    inversion : float
        Seconds, summed over requests, in which one waited while a less important one ran.
    passes : int
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    ttft: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    seconds: float = 0.0
    inversion: float = 0.0
    passes: int = 0
    retractions: int = 0
    counters: dict[str, float] = field(default_factory=dict)


def workload(seed: int, requests: int, rate: float) -> list[Item]:
    """Requests of 200 to 1000 prompt and 40 to 250 output tokens, Poisson arrivals.

    The lengths are those of real ShareGPT conversations; the tokens are random.
    """
    rng = np.random.default_rng(seed)
    with gzip.open(_LENGTHS, "rt") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    lengths = [
        (int(row["prompt_tokens"]), int(row["output_tokens"]))
        for row in rows
        if int(row["turn"]) == 0
        and 200 <= int(row["prompt_tokens"]) <= 1000
        and 40 <= int(row["output_tokens"]) <= 250
    ]
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    return [
        Item(
            f"r{i}",
            float(arrivals[i]),
            rng.integers(3, _VOCABULARY, lengths[k][0]).tolist(),
            lengths[k][1],
        )
        for i, k in enumerate(rng.integers(0, len(lengths), requests).tolist())
    ]


def serve(server: Server, items: list[Item]) -> Outcome:
    """Serve `items` as they come."""
    for length in (600, 1):  # what is compiled or allocated once is not measured
        server.run([server.submit(f"warm{length}", [7] * length, 4, priority=0)])
    server.scheduler.flush_cache()
    outcome = Outcome()
    waiting = sorted(items, key=lambda item: item.arrival)
    live: dict[str, tuple[Any, Item]] = {}
    last: dict[str, tuple[int, float]] = {}
    began = before = time.perf_counter()
    first_pass = server.passes
    while waiting or live:
        now = time.perf_counter() - began
        while waiting and waiting[0].arrival <= now:
            item = waiting.pop(0)
            live[item.name] = server.submit(item.name, item.prompt, item.output, priority=0), item
        if not live:
            time.sleep(min(0.01, max(0.0, waiting[0].arrival - now)))
            continue
        server.step()
        now = time.perf_counter() - began
        _note_inversion(outcome, [req for req, _ in live.values()], now - before)
        before = now
        for name, (req, item) in list(live.items()):
            count = len(req.output_ids)
            if name not in last:
                if count:
                    outcome.ttft.append(now - item.arrival)
                    last[name] = count, now
            elif count > last[name][0]:
                outcome.between.append(now - last[name][1])
                last[name] = count, now
            if req.finished():
                outcome.tokens[name] = list(req.output_ids)
                outcome.retractions += req.retraction_count
                del live[name]
    outcome.seconds = time.perf_counter() - began
    outcome.passes = server.passes - first_pass
    if getattr(server.cache, "switching", None) is not None:
        outcome.counters = asdict(server.switching.stats())
    return outcome


def _note_inversion(outcome: Outcome, requests: list[Any], seconds: float) -> None:
    running = [r.priority for r in requests if r.kv.holds_kv and r.priority is not None]
    if running:
        lowest = min(running)
        waiting = sum(not r.kv.holds_kv and (r.priority or 0) > lowest for r in requests)
        outcome.inversion += waiting * seconds


def policy_settings(seed: int, requests: int) -> dict[str, Any]:
    """Priorities drawn anew every few passes, the same in every mode."""
    settings = {"seed": seed, "sequences": requests + 2, "epochs": 2000}
    make_policy("random", **settings)
    return settings

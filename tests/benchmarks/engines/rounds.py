"""Engines that serve the same small workloads in turns: for differences of a few percent.

Each engine has a process of its own and all of them stay, so that a round lasts seconds and what
the machine does to one it does to all. The first mode has two engines: how far these two are apart
is what cannot be told from nothing.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing as mp
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import workloads

__all__ = ["interval", "play", "report", "workload_of"]

_WARM = 2  # rounds that do not count

Seconds = dict[str, list[float]]  # by mode, one of each round


def _player(
    pipe: Connection, start: Callable[..., Any], mode: str, options: argparse.Namespace, log: Path
) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sequences = len(workloads.items(options, 0)) * (options.rounds + _WARM)
    serve = start(mode, options.first_seed, sequences, options)
    pipe.send("ready")
    while True:
        pipe.send(serve(pipe.recv()).seconds)


def play(
    start: Callable[..., Any], modes: Sequence[str], options: argparse.Namespace, log: Path
) -> Seconds:
    """Let an engine of each mode, and one more of the first, serve the rounds' workloads."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for name, mode in ((f"{modes[0]} again", modes[0]), *((mode, mode) for mode in modes)):
            pipes[name], theirs = context.Pipe()
            process = context.Process(target=_player, args=(theirs, start, mode, options, log))
            process.start()
            theirs.close()
            processes.append(process)
            pipes[name].recv()
        seconds: Seconds = {name: [] for name in pipes}
        for turn in range(options.rounds + _WARM):
            items = workload_of(options, turn)
            for name in pipes if turn % 2 else reversed(pipes):
                pipes[name].send(items)
                took = pipes[name].recv()
                if turn >= _WARM:
                    seconds[name].append(took)
            print(f"round {turn + 1} of {options.rounds + _WARM}", file=sys.stderr, flush=True)
    except EOFError:
        raise SystemExit(f"an engine has ended, {log} says why") from None
    finally:
        for process in processes:
            process.terminate()
    return seconds


def workload_of(options: argparse.Namespace, turn: int) -> list[workloads.Item]:
    """A round's workload, all of it there from the start: engines are not to wait for arrivals."""

    def named(name: str | None) -> str | None:
        return name and f"{turn}-{name}"

    return [
        replace(item, name=f"{turn}-{item.name}", after=named(item.after), arrival=0.0)
        for item in workloads.items(options, options.first_seed + turn)
    ]


def report(seconds: Mapping[str, Sequence[float]]) -> str:
    """Each mode's speed as a share of the first one's: median over rounds and its interval."""
    (_, first, *_) = seconds
    lines = [
        f"| {len(seconds[first])} rounds | speed / {first} | 95% confidence |",
        "|---" * 3 + "|",
    ]
    for name, times in seconds.items():
        if name != first:
            ratios = [a / b for a, b in zip(seconds[first], times, strict=True)]
            low, high = interval(ratios)
            lines.append(f"| {name} | {median(ratios):.3f} | {low:.3f} to {high:.3f} |")
    return "\n".join(lines)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Where the true median is, whatever the values' distribution (sign test)."""
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0  # k values left out on each side
    while k < n // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - confidence:
        outside += math.comb(n, k) / 2**n
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]

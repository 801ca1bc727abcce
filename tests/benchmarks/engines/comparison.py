"""The same workloads served in several modes, and what came of it side by side: for any engine.

Each mode of each seed runs in a process of its own, modes in turn and every other seed backwards,
so that what is compared shares the machine's state. Ratios are taken within a seed. For differences
of a few percent that is too coarse: `--rounds` keeps an engine of each mode (rounds.py).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import numpy as np
import rounds
import workloads

Figures: TypeAlias = dict[str, float]
Results: TypeAlias = dict[str, dict[str, Figures]]  # by seed and mode


@dataclass
class Outcome:
    """What became of the requests of one run.

    Attributes
    ----------
    tokens, arrived, times : dict
        Of each request: its tokens, when it came, and when each token did, in seconds.
    inversion : float
        Seconds, summed over requests, in which one waited while a less important one ran.
    preemptions : float
        Requests preempted or retracted.
    counters : dict
        kvswitch's `SwapStats`; empty without it.
    """

    tokens: dict[str, list[int]] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    inversion: float = 0.0
    preemptions: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)

    def figures(self) -> Figures:
        """What is reported of it."""
        first = [times[0] - self.arrived[name] for name, times in self.times.items()]
        between = [gap for times in self.times.values() for gap in np.diff(times).tolist()]
        counted = self.counters
        copies = counted.get("copies_in", 0)
        sent = counted.get("blocks_out_full", 0) + counted.get("blocks_out_incremental", 0)
        spared = counted.get("blocks_spared", 0)
        return {
            "throughput": sum(map(len, self.tokens.values())) / self.seconds,
            "ttft_p50": float(np.quantile(first, 0.5)),
            "ttft_p95": float(np.quantile(first, 0.95)),
            "between_p50": float(np.quantile(between, 0.5)),
            "between_p99": float(np.quantile(between, 0.99)),
            "inversion": self.inversion,
            "seconds": self.seconds,
            "preemptions": self.preemptions,
            "recomputed": counted.get("tokens_lost", 0),
            "blocks_per_copy_in": counted.get("blocks_in", 0) / copies if copies else 0.0,
            "spared": spared / (sent + spared) if sent + spared else 0.0,
            "stall": counted.get("stall_seconds", 0.0),
            "overhead_share": counted.get("overhead_seconds", 0.0) / self.seconds,
        }


Serve: TypeAlias = Callable[[Sequence[workloads.Item]], Outcome]
Start: TypeAlias = Callable[[str, int, int, argparse.Namespace], Serve]


def settings(
    mode: str, seed: int, sequences: int, options: argparse.Namespace
) -> dict[str, Any] | None:
    """kvswitch's settings in a mode, for so many sequences in all; None without it."""
    if mode in ("stock", "never"):
        return None
    common: dict[str, Any] = {
        "host_memory": "1GiB",
        "epoch": options.epoch,
        "quantum": min(5, options.epoch // 2),
    }
    if mode == "calm":
        return common
    return {
        **common,
        "preemption": "recompute" if mode == "recompute" else "switch",
        "policy": "random",
        "policy_settings": {"seed": seed, "sequences": sequences, "epochs": 2000},
    }


ROWS = {
    "throughput": ("throughput, tokens/s", 1),
    "ttft_p50": ("TTFT p50, s", 2),
    "ttft_p95": ("TTFT p95, s", 2),
    "between_p50": ("time between tokens p50, s", 3),
    "between_p99": ("time between tokens p99, s", 2),
    "inversion": ("priority inversion, request-seconds", 1),
    "preemptions": ("preemptions", 0),
    "recomputed": ("recomputed tokens", 0),
    "blocks_per_copy_in": ("blocks per copy, swap-ins", 1),
    "spared": ("blocks that need not be sent, share", 2),
    "stall": ("stall, s", 2),
    "overhead_share": ("time inside kvswitch, share", 4),
}
# What is divided by what; above 1 is better.
RATIOS = (
    ("throughput", "kvswitch", "recompute"),
    ("ttft_p95", "recompute", "kvswitch"),
    ("between_p99", "recompute", "kvswitch"),
    ("inversion", "recompute", "kvswitch"),
    ("throughput", "alone", "never"),
    ("throughput", "calm", "never"),
)


def report(results: Results, modes: Sequence[str]) -> str:
    """A table of medians with ranges, and ratios within seeds."""
    seeds = sorted(results, key=int)
    lines = [f"| {len(seeds)} seeds, median (range) | " + " | ".join(modes) + " |"]
    lines.append("|---" * (len(modes) + 1) + "|")
    for key, (name, digits) in ROWS.items():
        cells = [spread([results[seed][mode][key] for seed in seeds], digits) for mode in modes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for key, over, under in RATIOS:
        if over in modes and under in modes:
            ratios = [results[s][over][key] / max(results[s][under][key], 1e-9) for s in seeds]
            lines.append(f"{ROWS[key][0]}, {over} / {under}: {spread(ratios, 3)}")
    if len(seeds) > 1:
        # Each pair is as likely below the true median as above it: all on one side is rare.
        confidence = 1 - 2.0 ** (1 - len(seeds))
        lines.append(
            f"The range of {len(seeds)} pairs holds the true median with {confidence:.0%}."
        )
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and range where there is more than one value."""
    text = f"{median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def same_tokens(folder: Path, modes: Sequence[str], seeds: Sequence[str]) -> str:
    """How many requests have the same tokens in all modes."""
    same = total = 0
    for seed in seeds:
        runs = [json.loads((folder / f"tokens-{mode}-{seed}.json").read_text()) for mode in modes]
        total += len(runs[0])
        same += sum(all(run[name] == runs[0][name] for run in runs) for name in runs[0])
    return f"{same} of {total} requests have identical tokens in all modes"


def plot(results: Results, modes: Sequence[str], path: Path) -> None:
    """Bars: one panel for each of the main figures, a dot for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    keys = ("throughput", "ttft_p95", "between_p99", "inversion")
    figure, axes = plt.subplots(1, len(keys), figsize=(3.2 * len(keys), 3.2))
    for axis, key in zip(axes, keys, strict=True):
        for i, mode in enumerate(modes):
            values = [run[mode][key] for run in results.values()]
            axis.bar(i, median(values), color=f"C{i}", alpha=0.6)
            axis.plot([i] * len(values), values, "k.", markersize=4)
        axis.set_xticks(range(len(modes)), modes, rotation=30)
        axis.set_title(ROWS[key][0], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(engine: str, modes: Mapping[str, str], start: Start) -> None:
    """Run what the command line asks for, print the table, write results.json and plot.png.

    Parameters
    ----------
    engine : str
        Its distribution.
    modes : mapping
        Those there are, and what each is.
    start : callable
        Start the engine in a mode, in this process: the mode, a seed, how many sequences there will
        be in all, the command line's options. What it returns serves workloads, one after another.
    """
    described = "; ".join(f"{mode}: {what}" for mode, what in modes.items())
    parser = argparse.ArgumentParser(description=f"Compare {engine} with and without kvswitch.")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--modes", default="stock,recompute,kvswitch", help=described)
    parser.add_argument("--workload", choices=["single", "turns", "short"], default="single")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second")
    parser.add_argument("--epoch", type=int, default=10, help="iterations between priorities")
    parser.add_argument("--dtype", default="bfloat16", help="float32 for identical tokens")
    parser.add_argument("--models", default=".venv/models", help="folder with smollm2")
    parser.add_argument("--output", default=f"bench-results/{engine}")
    parser.add_argument(
        "--rounds",
        type=int,
        default=0,
        help="keep an engine of each mode, and a second one of the first mode as a control; let "
        "them serve one small workload after another, in turns, so many times",
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)  # MODE:SEED, in this process
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        mode, seed = options.one.split(":")
        items = workloads.items(options, int(seed))
        outcome = start(mode, int(seed), len(items), options)(items)
        (folder / f"tokens-{mode}-{seed}.json").write_text(json.dumps(outcome.tokens))
        (folder / f"run-{mode}-{seed}.json").write_text(json.dumps(outcome.figures()))
        sys.stdout.flush()
        os._exit(0)  # an engine's own threads and sockets need not be waited for
    if 0 < options.rounds < 6:
        parser.error("fewer than 6 rounds say nothing with 95% confidence")
    chosen = options.modes.split(",")
    if unknown := set(chosen) - set(modes):
        parser.error(f"no mode {', '.join(sorted(unknown))}; there are {', '.join(modes)}")
    results: Results = {}
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        engine: version(engine),
        "options": {k: v for k, v in vars(options).items() if k not in ("one", "output")},
    }
    if options.rounds:
        seconds = rounds.play(start, chosen, options, folder / "log")
        (folder / "rounds.json").write_text(json.dumps({**about, "seconds": seconds}, indent=1))
        print(rounds.report(seconds))
        print(f"\n{about['date']}, {about['machine']}, {engine} {about[engine]}")
        return
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        runs = {}
        for mode in chosen if seed % 2 == 0 else reversed(chosen):
            print(f"seed {seed}, {mode} ...", file=sys.stderr, flush=True)
            command = [sys.executable, *sys.argv, "--one", f"{mode}:{seed}"]
            with (folder / "log").open("a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
            runs[mode] = json.loads((folder / f"run-{mode}-{seed}.json").read_text())
        results[str(seed)] = runs
        (folder / "results.json").write_text(json.dumps({**about, "seeds": results}, indent=1))
    print(f"{report(results, chosen)}\n\n{same_tokens(folder, chosen, list(results))}")
    plot(results, chosen, folder / "plot.png")
    print(f"\n{about['date']}, {about['machine']}, {engine} {about[engine]}")
    print(f"{folder}/results.json, {folder}/plot.png")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()

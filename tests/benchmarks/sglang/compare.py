"""SGLang as it is, with recomputation under the same priorities, and with kvswitch: side by side.

    python compare.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--output FOLDER]

Each seed is served by every mode in turn, each in a process of its own; ratios are taken within a
seed, and their median and range over the seeds are printed. Writes results.json and plot.png.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

MODES = {
    "stock": "SGLang as it is, first come first served: no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch; KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "never": "memory and slots for all, without priorities: stock SGLang",
    "calm": "as `never`, with kvswitch: what it costs where it cannot help",
}
TOKENS = 3072  # of KV cache

ROWS = {
    "throughput": ("throughput, tokens/s", 1),
    "ttft_p50": ("TTFT p50, s", 2),
    "ttft_p95": ("TTFT p95, s", 2),
    "between_p50": ("time between tokens p50, s", 3),
    "between_p99": ("time between tokens p99, s", 2),
    "inversion": ("priority inversion, s", 1),
    "retractions": ("preemptions and retractions", 0),
    "recomputed": ("recomputed tokens", 0),
    "blocks_per_copy_in": ("pages per copy, swap-ins", 1),
    "spared": ("pages that need not be sent, share", 2),
    "stall": ("stall, s", 2),
    "overhead_share": ("time inside kvswitch, share", 4),
}
RATIOS = (
    ("throughput", "kvswitch", "recompute"),
    ("ttft_p95", "recompute", "kvswitch"),
    ("between_p99", "recompute", "kvswitch"),
    ("throughput", "calm", "never"),
)


def measure(mode: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Serve one workload in one mode, in this process."""
    import engine
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one is the copies'
    switch = mode in ("recompute", "kvswitch", "calm")
    scarce = mode not in ("never", "calm")
    settings: dict[str, Any] = {"host_memory": "1GiB", "epoch": 10, "quantum": 5}
    if mode in ("recompute", "kvswitch"):
        settings["policy"] = "random"
        settings["policy_settings"] = engine.policy_settings(seed, options.requests)
    if mode == "recompute":
        settings["preemption"] = "recompute"
    os.environ["KVSWITCH_CONFIG"] = json.dumps(settings)
    server = engine.Server(
        str(Path(options.model)),
        kvswitch=switch,
        overlap=True,
        dtype=options.dtype,
        max_total_tokens=TOKENS if scarce else 16 * TOKENS,
        max_running_requests=16 if scarce else 64,
        context_length=2048,
        enable_priority_scheduling=mode != "stock",
        **({"retraction_policy": "priority"} if mode != "stock" else {}),
    )
    outcome = engine.serve(server, engine.workload(seed, options.requests, options.rate))
    folder = Path(options.output, "tokens")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{mode}-{seed}.json").write_text(json.dumps(outcome.tokens))
    counted = outcome.counters
    copies_in = counted.get("copies_in", 0)
    sent = counted.get("blocks_out_full", 0) + counted.get("blocks_out_incremental", 0)
    spared = counted.get("blocks_spared", 0)
    tokens = sum(map(len, outcome.tokens.values()))
    return {
        "throughput": tokens / outcome.seconds,
        "ttft_p50": float(np.quantile(outcome.ttft, 0.5)),
        "ttft_p95": float(np.quantile(outcome.ttft, 0.95)),
        "between_p50": float(np.quantile(outcome.between, 0.5)),
        "between_p99": float(np.quantile(outcome.between, 0.99)),
        "inversion": outcome.inversion,
        "seconds": outcome.seconds,
        "retractions": outcome.retractions,
        "recomputed": counted.get("tokens_lost", 0),
        "blocks_per_copy_in": counted.get("blocks_in", 0) / copies_in if copies_in else 0.0,
        "spared": spared / (sent + spared) if sent + spared else 0.0,
        "stall": counted.get("stall_seconds", 0.0),
        "overhead_share": counted.get("overhead_seconds", 0.0) / outcome.seconds,
    }


def report(results: dict[str, dict[str, dict[str, float]]], modes: Sequence[str]) -> str:
    """A table of medians with ranges, and ratios within seeds."""
    seeds = sorted(results, key=int)
    lines = [f"| {len(seeds)} seeds, median (range) | " + " | ".join(modes) + " |"]
    lines.append("|---" * (len(modes) + 1) + "|")
    for key, (name, digits) in ROWS.items():
        cells = [spread([results[s][mode][key] for s in seeds], digits) for mode in modes]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for key, over, under in RATIOS:
        if over in modes and under in modes:
            ratios = [results[s][over][key] / max(results[s][under][key], 1e-9) for s in seeds]
            what = f"{over} over {under}"
            lines.append(f"{ROWS[key][0]}, {what}: {spread(ratios, 2)}")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and range where there is more than one value."""
    text = f"{median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def same_tokens(folder: Path, modes: Sequence[str], seeds: Sequence[int]) -> str:
    """How many requests have the same tokens in all modes."""
    same = total = 0
    for seed in seeds:
        runs = [json.loads((folder / f"tokens/{mode}-{seed}.json").read_text()) for mode in modes]
        total += len(runs[0])
        same += sum(all(run[name] == runs[0][name] for run in runs) for name in runs[0])
    return f"{same} of {total} requests have identical tokens in all modes"


def plot(results: dict[str, dict[str, dict[str, float]]], modes: Sequence[str], path: Path) -> None:
    """One panel for each of the main figures, a dot for each seed."""
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


def main() -> None:
    """Run what is asked for; each mode of each seed in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--modes", default="stock,recompute,kvswitch", help=", ".join(MODES))
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second")
    parser.add_argument("--dtype", default="bfloat16", help="float32 for identical tokens")
    parser.add_argument("--model", default=".venv/models/smollm2")
    parser.add_argument("--output", default="bench-results/sglang")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # MODE:SEED, in this process
    options = parser.parse_args()
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if options.one:
        mode, seed = options.one.split(":")
        found = measure(mode, int(seed), options)
        (folder / f"run-{mode}-{seed}.json").write_text(json.dumps(found))
        sys.stdout.flush()
        os._exit(0)  # SGLang's own threads and sockets need not be waited for
    modes = options.modes.split(",")
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for seed in seeds:
        results[str(seed)] = {}
        for mode in modes:
            print(f"seed {seed}, {mode} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], "--one", f"{mode}:{seed}"]
            with (folder / "log").open("a") as log:
                subprocess.run(command, check=True, stdout=log, stderr=log)
            run = json.loads((folder / f"run-{mode}-{seed}.json").read_text())
            results[str(seed)][mode] = run
    print(f"{report(results, modes)}\n\n{same_tokens(folder, modes, seeds)}")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "sglang": version("sglang"),
        "options": {k: v for k, v in vars(options).items() if k != "one"},
    }
    (folder / "results.json").write_text(json.dumps({**about, "seeds": results}, indent=1))
    plot(results, modes, folder / "plot.png")
    print(f"\n{about['date']}, {about['machine']}, SGLang {about['sglang']}; {folder}/results.json")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()

"""vLLM as it is, with recomputation under the same priorities, and with kvswitch: side by side.

    python compare.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--output FOLDER]

Each seed is served by every mode in turn, in one process, so that what is compared shares the
machine's state; ratios are taken within a seed, and their median and range over the seeds are
printed. Writes results.json and plot.png.
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

sys.path.insert(0, str(Path(__file__).parent))

import engine as vllm_engine
import workloads
from engine import Outcome

MODES = {
    "stock": "vLLM as it is, first come first served: no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch; KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "alone": "memory for all, the same priorities: nobody has to leave for lack of it",
    "never": "memory and slots for all, without priorities: stock vLLM",
}
BLOCKS = 96  # of 32 tokens: 3072


def settings(mode: str, seed: int, requests: int) -> dict[str, Any] | None:
    """kvswitch's settings; None without it."""
    if mode in ("stock", "never"):
        return None
    return {
        "host_memory": "1GiB",
        "preemption": "recompute" if mode == "recompute" else "switch",
        "policy": "random",
        "policy_settings": {"seed": seed, "sequences": requests, "epochs": 2000},
        "epoch": 10,
        "quantum": 5,
    }


def measure(mode: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Serve one workload in one mode."""
    if options.workload == "turns":
        items = workloads.conversations(seed)
    else:
        items = workloads.single_turns(seed, options.requests, options.rate)
    llm = vllm_engine.make_llm(
        "smollm2",
        blocks=None if mode in ("alone", "never") else BLOCKS,
        settings=settings(mode, seed, len(items)),
        dtype=options.dtype,
    )
    try:
        outcome = vllm_engine.serve(llm, items)
    finally:
        vllm_engine.close(llm)
    Path(options.output, "tokens").mkdir(parents=True, exist_ok=True)
    Path(options.output, "tokens", f"{options.workload}-{mode}-{seed}.json").write_text(
        json.dumps(outcome.tokens)
    )
    return figures(outcome)


def figures(outcome: Outcome) -> dict[str, float]:
    """What is reported of a run."""
    import numpy as np

    counted = outcome.counters
    copies_in = counted.get("copies_in", 0)
    sent = counted.get("blocks_out_full", 0) + counted.get("blocks_out_incremental", 0)
    spared = counted.get("blocks_spared", 0)
    return {
        "throughput": outcome.throughput,
        "ttft_p50": float(np.quantile(outcome.ttft, 0.5)),
        "ttft_p95": float(np.quantile(outcome.ttft, 0.95)),
        "between_p50": float(np.quantile(outcome.between, 0.5)),
        "between_p99": float(np.quantile(outcome.between, 0.99)),
        "inversion": outcome.inversion,
        "seconds": outcome.seconds,
        "switches": counted.get("preemptions", 0),
        "recomputed": counted.get("tokens_lost", 0),
        "blocks_per_copy_in": counted.get("blocks_in", 0) / copies_in if copies_in else 0.0,
        "spared": spared / (sent + spared) if sent + spared else 0.0,
        "stall": counted.get("stall_seconds", 0.0),
        "overhead_share": counted.get("overhead_seconds", 0.0) / outcome.seconds,
    }


ROWS = {
    "throughput": ("throughput, tokens/s", 1),
    "ttft_p50": ("TTFT p50, s", 2),
    "ttft_p95": ("TTFT p95, s", 2),
    "between_p50": ("time between tokens p50, s", 3),
    "between_p99": ("time between tokens p99, s", 2),
    "inversion": ("priority inversion, s", 1),
    "switches": ("preemptions", 0),
    "recomputed": ("recomputed tokens", 0),
    "blocks_per_copy_in": ("blocks per copy, swap-ins", 1),
    "spared": ("blocks that need not be sent, share", 2),
    "stall": ("stall, s", 2),
    "overhead_share": ("time inside kvswitch, share", 4),
}
RATIOS = {
    "throughput": ("kvswitch", "recompute"),
    "ttft_p95": ("recompute", "kvswitch"),
    "between_p99": ("recompute", "kvswitch"),
    "inversion": ("recompute", "kvswitch"),
}


def report(results: dict[str, dict[str, dict[str, float]]], modes: Sequence[str]) -> str:
    """A table of medians with ranges, and ratios within seeds."""
    seeds = sorted(results, key=int)
    lines = [f"| {len(seeds)} seeds, median (range) | " + " | ".join(modes) + " |"]
    lines.append("|---" * (len(modes) + 1) + "|")
    for key, (name, digits) in ROWS.items():
        cells = []
        for mode in modes:
            values = [results[seed][mode][key] for seed in seeds if mode in results[seed]]
            cells.append(spread(values, digits) if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for key, (over, under) in RATIOS.items():
        if over in modes and under in modes:
            ratios = [results[s][over][key] / max(results[s][under][key], 1e-9) for s in seeds]
            better = "higher" if key == "throughput" else "lower"
            lines.append(f"{ROWS[key][0]}: {spread(ratios, 2)} times {better} with kvswitch")
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and range where there is more than one value."""
    text = f"{median(values):.{digits}f}"
    if len(values) > 1:
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    return text


def compare_tokens(folder: Path, workload: str, modes: Sequence[str], seeds: Sequence[int]) -> str:
    """How many requests have the same tokens in all modes."""
    same = total = 0
    for seed in seeds:
        runs = [
            json.loads((folder / "tokens" / f"{workload}-{mode}-{seed}.json").read_text())
            for mode in modes
        ]
        total += len(runs[0])
        same += sum(all(run[name] == runs[0][name] for run in runs) for name in runs[0])
    return f"{same} of {total} requests have identical tokens in all modes"


def plot(results: dict[str, dict[str, dict[str, float]]], modes: Sequence[str], path: Path) -> None:
    """Bars: one panel for each of the main figures, a dot for each seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    keys = ("throughput", "ttft_p95", "between_p99", "inversion")
    figure, axes = plt.subplots(1, len(keys), figsize=(3.2 * len(keys), 3.2))
    for axis, key in zip(axes, keys, strict=True):
        for i, mode in enumerate(modes):
            values = [run[mode][key] for run in results.values() if mode in run]
            axis.bar(i, median(values), color=f"C{i}", alpha=0.6)
            axis.plot([i] * len(values), values, "k.", markersize=4)
        axis.set_xticks(range(len(modes)), modes, rotation=30)
        axis.set_title(ROWS[key][0], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is asked for; each seed in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--modes", default="stock,recompute,kvswitch", help=", ".join(MODES))
    parser.add_argument("--workload", choices=["single", "turns"], default="single")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second")
    parser.add_argument("--dtype", default="bfloat16", help="float32 for identical tokens")
    parser.add_argument("--output", default="bench-results/vllm")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # a single seed, in here
    options = parser.parse_args()
    modes = options.modes.split(",")
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    if options.one is not None:
        found = {mode: measure(mode, options.one, options) for mode in modes}
        (folder / f"seed-{options.one}.json").write_text(json.dumps(found))
        return
    seeds = list(range(options.first_seed, options.first_seed + options.seeds))
    for seed in seeds:
        print(f"seed {seed} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", str(seed)], check=True)
    results = {
        path.stem.removeprefix("seed-"): json.loads(path.read_text())
        for path in sorted(folder.glob("seed-*.json"))
    }
    text = report(results, modes)
    same = compare_tokens(folder, options.workload, modes, [int(seed) for seed in results])
    print(f"{text}\n\n{same}")
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "vllm": version("vllm"),
        "options": {k: v for k, v in vars(options).items() if k != "one"},
    }
    (folder / "results.json").write_text(json.dumps({**about, "seeds": results}, indent=1))
    plot(results, modes, folder / "plot.png")
    print(f"\n{about['date']}, {about['machine']}, vLLM {about['vllm']}; {folder}/results.json")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


if __name__ == "__main__":
    main()

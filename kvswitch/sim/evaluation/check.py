"""The simulator checked: set to the machine on which `kvswitch demo` was measured.

For each seed, two constants are fitted, the time of an iteration and of a prompt token in it, to
what the demo's reference and recompute modes measured in all; everything else is the demo's own
settings. Compared are figures that were not fitted, above all ratios between modes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

from kvswitch.config import parse_bytes
from kvswitch.errors import ConfigError
from kvswitch.sim.cost import LinearSteps
from kvswitch.sim.engine import EngineLimits, SimEngine
from kvswitch.sim.evaluation.figure import Figure, Table
from kvswitch.sim.link import Pricing, VirtualLink
from kvswitch.sim.memory import SwitchMemory
from kvswitch.sim.metrics import Result
from kvswitch.sim.systems import SYSTEMS
from kvswitch.sim.workload import Script, load_lengths
from kvswitch_demo.workload import Workload

__all__ = ["Comparison", "Measured", "compare", "figure", "read_measured", "simulate_mode"]

_LAYERS = 30  # SmolLM2-135M
_BLOCK_BYTES = 2 * _LAYERS * 3 * 64 * 4 * 16  # K and V, layers, KV heads, dimensions, float32
_MODES = {
    "recompute": replace(SYSTEMS["kvswitch"], name="recompute", swap=False, reuse=False),
    # One synchronous copy for every block, layer, and K or V; turns stay until somebody needs room.
    "per-block": replace(SYSTEMS["vllm-swap"], name="per-block", next_turn="keep", headroom=0.06),
    "kvswitch": SYSTEMS["kvswitch"],
}


class Mode(msgspec.Struct, kw_only=True):
    """What the demo measured in one mode (kvswitch_demo/results.py); times in seconds."""

    iterations: int
    forward: float
    throughput_tokens_per_s: float
    recomputed_tokens: int
    preemptions: int
    ttft_p50: float
    ttft_p95: float
    tbt_p50: float
    tbt_p99: float
    blocks_out: int
    blocks_in: int


class Modes(msgspec.Struct, kw_only=True):
    """By mode."""

    reference: Mode
    recompute: Mode
    per_block: Mode = msgspec.field(name="per-block")
    kvswitch: Mode


class Where(msgspec.Struct, kw_only=True):
    """The machine that it was measured on."""

    cpu: str
    cores: int


class Measured(msgspec.Struct, kw_only=True):
    """One run of the demo."""

    date: str
    seed: int
    machine: Where
    workload: Workload
    modes: Modes

    def mode(self, name: str) -> Mode:
        """What was measured in a mode."""
        mode: Mode = getattr(self.modes, name.replace("-", "_"))
        return mode


def read_measured(path: Path) -> list[Measured]:
    """Read what `kvswitch demo` measured: a seeds.json (`--seeds`), or a summary.json.

    Raises
    ------
    ConfigError
        It cannot be read, or something is missing; names the field.
    """
    try:
        data = path.read_bytes()
        reports = (
            msgspec.json.decode(data, type=list[Measured])
            if data.lstrip().startswith(b"[")
            else [msgspec.json.decode(data, type=Measured)]
        )
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"cannot read the demo's results {path}: {error}") from error
    if not reports:
        raise ConfigError(f"{path}: there is no run in it")
    return reports


def _fitted_steps(report: Measured) -> LinearSteps:
    """The two constants."""
    reference, recompute = report.modes.reference, report.modes.recompute
    scripts = _scripts(report)
    prompts = sum(prompt for script in scripts for prompt, _ in script.turns)
    more = recompute.recomputed_tokens
    # forward = iterations * base + prefilled * token, twice
    scale = recompute.iterations / reference.iterations
    token = (recompute.forward - scale * reference.forward) / ((prompts + more) - scale * prompts)
    base = (reference.forward - prompts * token) / reference.iterations
    return LinearSteps(base, token)


def _scripts(report: Measured) -> list[Script]:
    demo = report.workload.scripts(load_lengths(), lambda conversation, turn, n: [0] * n)
    return [
        Script(s.arrival, list(zip(map(len, s.prompts), s.outputs, strict=True)), s.pauses)
        for s in demo
    ]


def simulate_mode(report: Measured, mode: str) -> Result:
    """What a mode of the demo would have done."""
    workload = report.workload
    settings, system = workload.engine, _MODES[mode]
    demo = workload.scripts(load_lengths(), lambda conversation, turn, n: [0] * n)
    blocks = workload.device_blocks(demo)
    pricing = Pricing(
        bandwidth=float(parse_bytes(settings.bandwidth, "bandwidth")),
        block_bytes=_BLOCK_BYTES,
        pieces=2 * _LAYERS,
        merge=system.groups,
    )
    memory = SwitchMemory(
        system,
        VirtualLink(pricing, duplex=not system.serial),
        blocks=blocks,
        host_blocks=parse_bytes(settings.host_memory, "host_memory") // _BLOCK_BYTES,
        block_tokens=settings.block_tokens,
        headroom=0.06,
    )
    limits = EngineLimits(
        blocks=blocks,
        block_tokens=settings.block_tokens,
        slots=settings.slots,
        prefill_tokens=settings.prefill_tokens,
        epoch=workload.priorities.epoch,
        quantum=workload.priorities.quantum,
        headroom=0.06,
    )
    engine = SimEngine(_scripts(report), workload.trace(), memory, _fitted_steps(report), limits)
    engine.serve()
    swaps = {name: getattr(memory.stats, name) for name in memory.stats.__slots__}
    engine.close()
    return engine.recorder.result(
        makespan=engine.now,
        blocks=blocks,
        inversion=(engine.inversion.seconds, engine.inversion.request_seconds),
        overhead=0.0,
        link_seconds={},
        swaps=swaps,
        real_seconds=0.0,
    )


_Measure = tuple[str, Callable[[Mode], float], Callable[[Result], float]]
_MEASURES: tuple[_Measure, ...] = (
    ("throughput, tokens/s", lambda m: m.throughput_tokens_per_s, lambda r: r.throughput),
    ("iterations", lambda m: m.iterations, lambda r: r.iterations),
    ("recomputed tokens", lambda m: m.recomputed_tokens, lambda r: r.recomputed),
    ("preemptions", lambda m: m.preemptions, lambda r: r.swaps["preemptions"]),
    ("TTFT P50, s", lambda m: m.ttft_p50, lambda r: r.ttft["0.5"]),
    ("TTFT P95, s", lambda m: m.ttft_p95, lambda r: r.ttft["0.95"]),
    ("TBT P50, s", lambda m: m.tbt_p50, lambda r: r.tbt["0.5"]),
    ("TBT P99, s", lambda m: m.tbt_p99, lambda r: r.tbt["0.99"]),
    (
        "blocks out",
        lambda m: m.blocks_out,
        lambda r: r.swaps["blocks_out_full"] + r.swaps["blocks_out_incremental"],
    ),
    ("blocks in", lambda m: m.blocks_in, lambda r: r.swaps["blocks_in"]),
)


class Comparison(NamedTuple):
    """A figure as measured and as simulated, one of each for every seed."""

    measured: list[float]
    simulated: list[float]

    @property
    def off(self) -> float:
        """How far the simulated median is from the measured one, as a share of it."""
        measured, simulated = median(self.measured), median(self.simulated)
        if not measured:
            return 0.0 if not simulated else float("inf")
        return simulated / measured - 1


def compare(reports: list[Measured]) -> dict[tuple[str, str], Comparison]:
    """(mode, what) -> measured and simulated; mode "kvswitch / recompute" for their ratios."""
    values: dict[tuple[str, str], Comparison] = {}
    for report in reports:
        for key, (measured, simulated) in _compare_seed(report).items():
            both = values.setdefault(key, Comparison([], []))
            both.measured.append(measured)
            both.simulated.append(simulated)
    return values


def _compare_seed(report: Measured) -> dict[tuple[str, str], tuple[float, float]]:
    simulated = {mode: simulate_mode(report, mode) for mode in _MODES}
    values = {
        (mode, name): (float(theirs(report.mode(mode))), float(ours(result)))
        for mode, result in simulated.items()
        for name, theirs, ours in _MEASURES
    }
    for name in ("throughput, tokens/s", "TTFT P95, s", "TBT P99, s"):
        pairs = zip(values["kvswitch", name], values["recompute", name], strict=True)
        measured, ours = (a / b for a, b in pairs)
        values["kvswitch / recompute", name.split(",")[0]] = (measured, ours)
    return values


def figure(path: Path) -> Figure:
    """The comparison as a part of the report."""
    reports = read_measured(path)
    rows = [
        [
            mode,
            name,
            _spread(both.measured),
            _spread(both.simulated),
            f"{both.off:+.0%}" if any(both.measured) else "–",
        ]
        for (mode, name), both in compare(reports).items()
    ]
    first, seeds = reports[0], [str(report.seed) for report in reports]
    return Figure(
        "check",
        "The simulator checked against a measured machine",
        f"What `kvswitch demo` measured on {first.date[:10]} ({first.machine.cpu}, "
        f"{first.machine.cores} cores; seeds: {', '.join(seeds)}), and what the simulator "
        "says of the same workloads, priorities and memory: medians over seeds, and ranges. For "
        "each seed two constants were fitted, an iteration's time and a prompt token's, to the "
        "totals of the modes reference and recompute.",
        tables=[
            Table("Measured and simulated", ["mode", "", "measured", "simulated", "off"], rows)
        ],
    )


def _spread(values: list[float]) -> str:
    numbers = (median(values), min(values), max(values))
    middle, low, high = (f"{n:,.0f}" if n >= 1000 else f"{n:.3g}" for n in numbers)
    return middle if low == high else f"{middle} ({low}–{high})"

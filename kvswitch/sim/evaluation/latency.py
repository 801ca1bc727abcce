"""Figures 1, 2, 4 and 8: what stalls cost, what is asked, latency and throughput."""

from __future__ import annotations

from statistics import median

import numpy as np

from kvswitch.sim.evaluation.book import (
    LATENCIES,
    MODELS,
    PAPER,
    SINGLE,
    UNITS,
    Book,
    Measure,
    at,
    frequency,
    known,
    text,
)
from kvswitch.sim.evaluation.figure import Figure, Plot, Row, Table
from kvswitch.sim.evaluation.jobs import Job
from kvswitch.sim.evaluation.plan import (
    BASELINE,
    COMPARED,
    OURS,
    PATTERNS,
    READINGS,
    SETTINGS,
)
from kvswitch.sim.metrics import QUANTILES
from kvswitch.sim.run import Pattern
from kvswitch.sim.systems import SYSTEMS
from kvswitch.sim.workload import Reading, load_lengths, sample

__all__ = ["figure1", "figure2", "figure4", "figure8"]


def figure1(book: Book) -> Figure:
    """Latency breakdown by percentile."""
    rows, plots = [], []
    for reading in READINGS:
        job = book.plan.motivation(BASELINE, 100, 1000, reading)
        unit = UNITS[reading]
        rows += [
            Row(
                f"iteration P99 / P50, {unit}",
                SINGLE["latency_p99_to_p50"],
                known([book.value(job, lambda r: r.latency["0.99"] / r.latency["0.5"])]),
            ),
            Row(
                f"swap stall / inference time at P99, {unit}",
                SINGLE["stall_share_p99"],
                known([book.value(job, lambda r: r.swap_latency["0.99"] / r.step_latency["0.99"])]),
            ),
            Row(
                f"iteration / inference time at P99.9, {unit}",
                SINGLE["latency_p999"],
                known(
                    [
                        book.value(
                            job, lambda r: 1 + r.swap_latency["0.999"] / r.step_latency["0.999"]
                        )
                    ]
                ),
            ),
        ]
        plots.append(
            Plot(
                f"Iteration by percentile, vLLM, {unit}",
                "percentile",
                "seconds",
                [f"P{q * 100:g}" for q in QUANTILES],
                {
                    "inference": [book.value(job, at("step_latency", q)) for q in QUANTILES],
                    "swap stall": [book.value(job, at("swap_latency", q)) for q in QUANTILES],
                },
                kind="bars",
            )
        )
    return Figure(
        "figure1",
        "Figure 1: latency breakdown across percentiles",
        "vLLM with swapping, LLaMA-8B on an A10, "
        f"{book.plan.scale.conversations:,} conversations, priorities (Markov) updated "
        "every 100 iterations. Stall and inference time are means over the iterations around that "
        "percentile.",
        rows,
        plots=plots,
    )


def figure2(book: Book) -> Figure:
    """Share of requests that wait for their KV cache."""
    jobs = {UNITS[r]: book.plan.motivation("manager", 50, 500, r) for r in READINGS}
    return Figure(
        "figure2",
        "Figure 2: share of requests that wait for their KV cache, per iteration",
        "Markov, priorities updated every 50 iterations (the paper's f = 0.02), "
        f"{min(500, book.plan.scale.conversations)} conversations, swap manager without reuse: who "
        "has blocks, but is still arriving, of all in the batch. The paper: small in most "
        "iterations.",
        [
            Row(f"share at P50, {unit}", None, known([book.value(j, lambda r: r.waiting["0.5"])]))
            for unit, j in jobs.items()
        ],
        plots=[
            Plot(
                "Share of the batch that waits for its KV cache",
                "percentile over iterations",
                "share",
                [f"P{q * 100:g}" for q in QUANTILES],
                {
                    unit: [book.value(job, at("waiting", q)) for q in QUANTILES]
                    for unit, job in jobs.items()
                },
                kind="bars",
            )
        ],
    )


def figure4(book: Book) -> Figure:
    """Turns and lengths of ShareGPT."""
    lengths = load_lengths()
    turns = np.array([len(conversation) for conversation in lengths])
    tokens = np.array([sum(map(sum, conversation)) for conversation in lengths])
    edges = [1, 2, 3, 5, 10, 20, 50]
    share = [
        float(((turns >= low) & (turns < high)).mean())
        for low, high in zip(edges, [*edges[1:], 10**9], strict=True)
    ]
    workloads = []
    for model, (_, name, _) in SETTINGS.items():
        job = book.plan.latency(model, "markov", "conversations", OURS)
        context = job.machine().model.context
        for reading in READINGS:
            w = sample(
                lengths,
                seed=0,
                count=book.plan.scale.conversations,
                rate=job.rate,
                think=job.think,
                context=context,
                reading=reading,
            )
            fast = book.value(
                book.plan.latency(model, "markov", "conversations", OURS), lambda r: r.throughput
            )
            workloads.append(
                [
                    f"{MODELS[model]} ({name})",
                    UNITS[reading],
                    str(len(w.scripts)),
                    str(w.excluded),
                    f"{w.turns / len(w.scripts):.1f}",
                    f"{w.turns / w.span:.2f}",
                    f"{w.offered():,.0f}",
                    "-" if fast is None else f"{w.offered() / fast:.2f}",
                ]
            )
    return Figure(
        "figure4",
        "Figure 4: turns and lengths of ShareGPT, and what is asked of the machines",
        "The 6,000 conversations that come with the package. Below, seed 0 of the workload: "
        "conversations over the model's context are left out and counted. Utilisation is what is "
        "asked for over what kvswitch delivers when it is overloaded (1 conversation/s).",
        [
            Row("multi-turn share", SINGLE["multi_turn"], [float((turns > 1).mean())]),
            Row("mean turns", SINGLE["mean_turns"], [float(turns.mean())]),
        ],
        [
            Table(
                "Workload",
                [
                    "setting",
                    "reading",
                    "conversations",
                    "left out",
                    "turns each",
                    "turns/s",
                    "output tokens/s asked",
                    "utilisation",
                ],
                workloads,
            ),
            Table(
                "Tokens of a conversation",
                ["P50", "P90", "P99", "mean"],
                [
                    [
                        *(f"{np.quantile(tokens, q):,.0f}" for q in (0.5, 0.9, 0.99)),
                        f"{tokens.mean():,.0f}",
                    ]
                ],
            ),
        ],
        [
            Plot(
                "Turns of a conversation",
                "turns",
                "share",
                ["1", "2", "3-4", "5-9", "10-19", "20-49", "50+"],
                {"ShareGPT": share},
                kind="bars",
            )
        ],
    )


def figure8(book: Book) -> list[Figure]:
    """Latency (a to d) and throughput (e, f)."""
    figures = []
    for reading in READINGS:
        rows, plots = [], []
        for model in SETTINGS:
            for pattern in PATTERNS:
                paper = PAPER["latency"][f"{model}-{pattern}"]["paper"]
                speedups = []
                for (label, measure), theirs in zip(LATENCIES, paper, strict=True):
                    pairs = [
                        (
                            book.plan.latency(model, pattern, reading, BASELINE, seed),
                            book.plan.latency(model, pattern, reading, OURS, seed),
                        )
                        for seed in range(book.plan.scale.seeds)
                    ]
                    row = Row(
                        f"{MODELS[model]}, {pattern.capitalize()}: {label}",
                        theirs,
                        book.ratios(pairs, measure),
                        aim=theirs,
                        unit="x",
                    )
                    rows.append(row)
                    speedups.append(row.ours)
                plots.append(
                    Plot(
                        f"{MODELS[model]}, {pattern.capitalize()}",
                        "",
                        "times faster than vLLM",
                        [label for label, _ in LATENCIES],
                        {"paper": paper, "kvswitch": speedups},
                        kind="bars",
                    )
                )
        figures.append(
            Figure(
                f"figure8-{reading}",
                f"Figure 8 a-d: latency, {UNITS[reading]}",
                f"kvswitch against vLLM with swapping, {book.plan.scale.conversations:,} "
                f"conversations, the paper's request rate read as {UNITS[reading]}. Speed-ups "
                "are ratios within a seed; medians and ranges over seeds.",
                rows,
                [
                    *(_compared(book, model, reading) for model in SETTINGS),
                    _recomputed(book, reading),
                ],
                plots,
            )
        )
    return [*figures, _throughput(book)]


def _recomputed(book: Book, reading: Reading) -> Table:
    def millions(model: str, pattern: Pattern, system: str) -> str:
        jobs = (
            book.plan.latency(model, pattern, reading, system, seed)
            for seed in range(book.plan.scale.seeds)
        )
        values = known(book.value(job, lambda r: r.recomputed / 1e6) for job in jobs)
        return text(median(values) if values else None)

    return Table(
        f"Tokens recomputed, millions, {UNITS[reading]}, median over seeds",
        ["setting", SYSTEMS[BASELINE].title, SYSTEMS[OURS].title],
        [
            [
                f"{MODELS[model]}, {pattern.capitalize()}",
                *(millions(model, pattern, system) for system in (BASELINE, OURS)),
            ]
            for model in SETTINGS
            for pattern in PATTERNS
        ],
    )


def _compared(book: Book, model: str, reading: Reading) -> Table:
    rows = []
    for name in (BASELINE, *COMPARED, OURS):
        job = book.plan.latency(model, "markov", reading, name)

        def each(measure: Measure, digits: int = 2, job: Job = job) -> str:
            return text(book.value(job, measure), digits)

        rows.append(
            [
                SYSTEMS[name].title,
                each(lambda r: r.throughput, 0),
                each(lambda r: r.ttft["0.5"]),
                each(lambda r: r.ttft["0.95"]),
                each(lambda r: r.ttft["0.99"]),
                each(lambda r: r.ttft["0.999"]),
                each(lambda r: r.tbt["0.5"] * 1000, 0),
                each(lambda r: r.tbt["0.99"]),
                each(lambda r: r.tbt["0.999"]),
                each(lambda r: 100 * r.stall_share, 1),
                each(lambda r: r.recomputed / 1e6, 2),
                each(lambda r: 100 * r.inversion / r.makespan, 0),
                each(lambda r: r.inversion_requests / r.makespan, 1),
            ]
        )
    return Table(
        f"{MODELS[model]}, Markov, {UNITS[reading]}, seed 0: all systems",
        [
            "system",
            "tokens/s",
            "TTFT P50, s",
            "P95",
            "P99",
            "P99.9",
            "TBT P50, ms",
            "P99, s",
            "P99.9, s",
            "stall, %",
            "recomputed, M",
            "inverted, % of time",
            "requests inverted, mean",
        ],
        rows,
    )


def _throughput(book: Book) -> Figure:
    rows, plots = [], []
    epochs = book.plan.scale.epochs[1::2]
    for model in SETTINGS:
        series: dict[str, list[float | None]] = {}
        best: list[float] = []
        for pattern in PATTERNS:
            for system in (BASELINE, OURS):
                jobs = [
                    book.plan.sweep(system, model=model, pattern=pattern, epoch=e) for e in epochs
                ]
                series[f"{SYSTEMS[system].title}, {pattern}"] = [
                    book.value(job, lambda r: r.throughput) for job in jobs
                ]
            ratios = known(
                book.ratio(
                    book.plan.sweep(OURS, model=model, pattern=pattern, epoch=e),
                    book.plan.sweep(BASELINE, model=model, pattern=pattern, epoch=e),
                    lambda r: r.throughput,
                )
                for e in epochs
            )
            best += ratios
        paper = PAPER["throughput"][model]
        rows.append(
            Row(
                f"{MODELS[model]}: throughput, up to",
                paper,
                [max(best)] if best else [],
                aim=paper,
                unit="x",
            )
        )
        plots.append(
            Plot(
                f"Throughput, {MODELS[model]}",
                "priority-update frequency",
                "new tokens a second",
                [frequency(e) for e in epochs],
                series,
                log="x",
            )
        )
    return Figure(
        "figure8-throughput",
        "Figure 8 e-f: throughput against the priority-update frequency",
        f"{book.plan.scale.fewer} conversations at 1 conversation/s, more than the machines can "
        "serve: at 1 turn/s every system delivers what is asked for.",
        rows,
        plots=plots,
    )

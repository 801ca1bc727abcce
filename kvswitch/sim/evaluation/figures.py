"""The paper's figures and Table 1, made of simulations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np

from kvswitch.sim.evaluation.figure import Figure, Plot, Row, Table
from kvswitch.sim.evaluation.jobs import Job, Results
from kvswitch.sim.evaluation.plan import (
    BASELINE,
    COMPARED,
    OURS,
    PATTERNS,
    READINGS,
    SETTINGS,
    STAGES,
    Plan,
)
from kvswitch.sim.metrics import QUANTILES, Result
from kvswitch.sim.systems import SYSTEMS
from kvswitch.sim.workload import load_lengths, sample

__all__ = ["make_figures"]

_PAPER: dict[str, Any] = msgspec.toml.decode(
    (files("kvswitch.sim") / "data" / "paper.toml").read_bytes()
)
_SINGLE: dict[str, float] = _PAPER["single"]
_UNITS = {
    "turns": "1 turn/s",
    "conversations": "1 conversation/s",
}
_MODELS = {"llama": "LLaMA-8B, A10", "qwen": "Qwen-32B, A100"}
_LATENCIES: tuple[tuple[str, Callable[[Result], float]], ...] = (
    ("TTFT P95", lambda r: r.ttft["0.95"]),
    ("TTFT P99", lambda r: r.ttft["0.99"]),
    ("TTFT P99.9", lambda r: r.ttft["0.999"]),
    ("TBT P99.9", lambda r: r.tbt["0.999"]),
)


class Book:
    """The results at hand, asked for by job."""

    def __init__(self, plan: Plan, results: Results) -> None:
        self.plan = plan
        self._results = results

    def value(self, job: Job, measure: Callable[[Result], float]) -> float | None:
        """Measure a result; None if it is not there."""
        result = self._results.get(job)
        return None if result is None else measure(result)

    def ratio(self, upper: Job, lower: Job, measure: Callable[[Result], float]) -> float | None:
        """Measure two results, the first over the second."""
        above, below = self.value(upper, measure), self.value(lower, measure)
        return above / below if above is not None and below else None

    def ratios(
        self, pairs: Iterable[tuple[Job, Job]], measure: Callable[[Result], float]
    ) -> list[float]:
        """The ratios that are there."""
        values = [self.ratio(upper, lower, measure) for upper, lower in pairs]
        return [value for value in values if value is not None]


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _frequency(epoch: int) -> float:
    return round(1 / epoch, 4)


# -- figures 1, 2, 4 -----------------------------------------------------------------------------


def figure1(book: Book) -> Figure:
    """Latency breakdown by percentile."""
    rows, plots = [], []
    for reading in READINGS:
        job = book.plan.motivation(BASELINE, 100, 1000, reading)
        unit = _UNITS[reading]

        def inference(r: Result, q: float) -> float:
            return r.latency[str(q)] - r.swap_latency[str(q)]

        rows += [
            Row(
                f"iteration P99 / P50, {unit}",
                _SINGLE["latency_p99_to_p50"],
                _known([book.value(job, lambda r: r.latency["0.99"] / r.latency["0.5"])]),
            ),
            Row(
                f"swap stall / inference time at P99, {unit}",
                _SINGLE["stall_share_p99"],
                _known([book.value(job, lambda r: r.swap_latency["0.99"] / inference(r, 0.99))]),
            ),
            Row(
                f"iteration / inference time at P99.9, {unit}",
                _SINGLE["latency_p999"],
                _known([book.value(job, lambda r: r.latency["0.999"] / inference(r, 0.999))]),
            ),
        ]
        plots.append(
            Plot(
                f"Iteration by percentile, vLLM, {unit}",
                "percentile",
                "seconds",
                [f"P{q * 100:g}" for q in QUANTILES],
                {
                    "inference": [
                        book.value(job, lambda r, q=q: inference(r, q))  # type: ignore[misc]
                        for q in QUANTILES
                    ],
                    "swap stall": [
                        book.value(job, lambda r, q=q: r.swap_latency[str(q)])  # type: ignore[misc]
                        for q in QUANTILES
                    ],
                },
                kind="bars",
            )
        )
    return Figure(
        "figure1",
        "Figure 1: latency breakdown across percentiles",
        "vLLM with swapping, LLaMA-8B on an A10, 1,000 conversations, priorities (Markov) updated "
        "every 100 iterations. The stall is the mean around the percentile of the iteration.",
        rows,
        plots=plots,
    )


def figure2(book: Book) -> Figure:
    """Share of requests that wait for their KV cache."""
    jobs = {_UNITS[r]: book.plan.motivation("manager", 50, 500, r) for r in READINGS}
    return Figure(
        "figure2",
        "Figure 2: share of requests that wait for their KV cache, per iteration",
        "Markov, f = 0.02, 500 conversations, swap manager without reuse: who has blocks, but is "
        "still arriving, of all in the batch. The paper: small in most iterations.",
        [
            Row(f"share at P50, {unit}", None, _known([book.value(j, lambda r: r.waiting["0.5"])]))
            for unit, j in jobs.items()
        ],
        plots=[
            Plot(
                "Share of the batch that waits for its KV cache",
                "percentile over iterations",
                "share",
                [f"P{q * 100:g}" for q in QUANTILES],
                {
                    unit: [
                        book.value(job, lambda r, q=q: r.waiting[str(q)])  # type: ignore[misc]
                        for q in QUANTILES
                    ]
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
                    f"{_MODELS[model]} ({name})",
                    _UNITS[reading],
                    str(len(w.scripts)),
                    str(w.excluded),
                    f"{w.turns / len(w.scripts):.1f}",
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
            Row("multi-turn share", _SINGLE["multi_turn"], [float((turns > 1).mean())]),
            Row("mean turns", _SINGLE["mean_turns"], [float(turns.mean())]),
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


# -- figure 8 ------------------------------------------------------------------------------------


def figure8(book: Book) -> list[Figure]:
    """Latency (a to d) and throughput (e, f)."""
    figures = []
    for reading in READINGS:
        rows, plots = [], []
        for model in SETTINGS:
            for pattern in PATTERNS:
                paper = _PAPER["latency"][f"{model}-{pattern}"]["paper"]
                speedups = []
                for (label, measure), theirs in zip(_LATENCIES, paper, strict=True):
                    pairs = [
                        (
                            book.plan.latency(model, pattern, reading, BASELINE, seed),
                            book.plan.latency(model, pattern, reading, OURS, seed),
                        )
                        for seed in range(book.plan.scale.seeds)
                    ]
                    row = Row(
                        f"{_MODELS[model]}, {pattern.capitalize()}: {label}",
                        theirs,
                        book.ratios(pairs, measure),
                        aim=theirs,
                        unit="x",
                    )
                    rows.append(row)
                    speedups.append(row.ours)
                plots.append(
                    Plot(
                        f"{_MODELS[model]}, {pattern.capitalize()}",
                        "",
                        "times faster than vLLM",
                        [label for label, _ in _LATENCIES],
                        {"paper": paper, "kvswitch": speedups},
                        kind="bars",
                    )
                )
        figures.append(
            Figure(
                f"figure8-{reading}",
                f"Figure 8 a-d: latency, {_UNITS[reading]}",
                f"kvswitch against vLLM with swapping, {book.plan.scale.conversations:,} "
                f"conversations, the paper's request rate read as {_UNITS[reading]}. Speed-ups "
                "are ratios within a seed; medians and ranges over seeds.",
                rows,
                [_compared(book, model, reading) for model in SETTINGS],
                plots,
            )
        )
    return [*figures, _throughput(book)]


def _compared(book: Book, model: str, reading: Any) -> Table:
    rows = []
    for name in (BASELINE, *COMPARED, OURS):
        job = book.plan.latency(model, "markov", reading, name)

        def each(measure: Callable[[Result], float], digits: int = 2, job: Job = job) -> str:
            return _text(book.value(job, measure), digits)

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
        f"{_MODELS[model]}, Markov, {_UNITS[reading]}, seed 0: all systems",
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
            ratios = _known(
                book.ratio(
                    book.plan.sweep(OURS, model=model, pattern=pattern, epoch=e),
                    book.plan.sweep(BASELINE, model=model, pattern=pattern, epoch=e),
                    lambda r: r.throughput,
                )
                for e in epochs
            )
            best += ratios
        paper = _PAPER["throughput"][model]
        rows.append(
            Row(
                f"{_MODELS[model]}: throughput, up to",
                paper,
                [max(best)] if best else [],
                aim=paper,
                unit="x",
            )
        )
        plots.append(
            Plot(
                f"Throughput, {_MODELS[model]}",
                "priority-update frequency",
                "new tokens a second",
                [_frequency(e) for e in epochs],
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


# -- figures 9 to 13, Table 1 --------------------------------------------------------------------


def _by_frequency(
    book: Book, systems: Sequence[str], measure: Callable[[Result], float]
) -> dict[str, list[float | None]]:
    return {
        SYSTEMS[system].title: [
            book.value(book.plan.sweep(system, epoch=e), measure) for e in book.plan.scale.epochs
        ]
        for system in systems
    }


def figure9(book: Book) -> Figure:
    """Call-stack overhead."""
    epochs = book.plan.scale.epochs
    series = _by_frequency(book, STAGES[1:], lambda r: 100 * r.overhead_share)
    worst = _known(value for values in series.values() for value in values)
    ours = _known(series[SYSTEMS[OURS].title])
    return Figure(
        "figure9",
        "Figure 9: call-stack overhead",
        "Real CPU time in planner and scheduler, in pure Python on the machine that simulated, "
        "over the simulated time of the iterations; "
        f"{book.plan.scale.fewer} conversations at 1 conversation/s, Markov.",
        [
            Row(
                "kvswitch, highest of all frequencies, %",
                100 * _SINGLE["call_stack"],
                [max(ours)] if ours else [],
                aim=100 * _SINGLE["call_stack_aim"],
                lower=True,
            ),
            Row(
                "any stage, highest, %",
                100 * _SINGLE["call_stack"],
                [max(worst)] if worst else [],
                aim=100 * _SINGLE["call_stack"],
                lower=True,
            ),
        ],
        plots=[
            Plot(
                "Call-stack overhead",
                "priority-update frequency",
                "% of iteration time",
                [_frequency(e) for e in epochs],
                series,
                log="x",
            )
        ],
    )


def figure10(book: Book) -> Figure:
    """Context-switch overhead."""
    epochs = book.plan.scale.epochs
    series = _by_frequency(book, STAGES, lambda r: 100 * r.stall_share)

    def less(system: str) -> list[float]:
        return _known(
            book.ratio(
                book.plan.sweep(BASELINE, epoch=e),
                book.plan.sweep(system, epoch=e),
                lambda r: r.stall_share,
            )
            for e in epochs
        )

    groups, full = less("groups"), less(OURS)
    return Figure(
        "figure10",
        "Figure 10: context-switch overhead",
        "Swap stall over end-to-end time against vLLM with swapping, by frequency. Block groups "
        "alone, synchronous, and the stages after it.",
        [
            Row(
                "block groups alone, up to, times less",
                _SINGLE["context_switch"],
                [max(groups)] if groups else [],
                aim=_SINGLE["context_switch"],
                unit="x",
            ),
            Row("block groups alone, least, times less", None, [min(groups)] if groups else []),
            Row("kvswitch as it is, up to, times less", None, [max(full)] if full else []),
        ],
        plots=[
            Plot(
                "Context-switch overhead",
                "priority-update frequency",
                "% of end-to-end time",
                [_frequency(e) for e in epochs],
                series,
                log="x",
            )
        ],
    )


def figure11(book: Book) -> Figure:
    """Sensitivity to the size of the first block group."""
    sizes, epochs = book.plan.scale.groups, book.plan.scale.epochs[1::2]
    spreads, plots = [], []
    for direction, name in (("in", "swap-in"), ("out", "swap-out")):
        series = {}
        for epoch in epochs:
            values = [
                book.value(
                    book.plan.sweep("fastswitch", epoch=epoch, first_group=size),
                    lambda r, d=direction: r.granularity(d),  # type: ignore[misc]
                )
                for size in sizes
            ]
            known = _known(values)
            least = min(known) if known else 1.0
            series[f"f = {_frequency(epoch)}"] = [v / least if v else None for v in values]
            if len(known) == len(sizes):
                spreads.append(max(known) / least - 1)
        plots.append(
            Plot(
                f"Mean {name} granularity, minimum = 1",
                "tokens of the first group",
                "relative granularity",
                [size * 16 for size in sizes],
                series,
                log="x",
            )
        )
    return Figure(
        "figure11",
        "Figure 11: sensitivity to the size of the first block group",
        "Largest difference in mean granularity between first groups of 64 to 3,000 tokens at one "
        "frequency, both directions (FastSwitch).",
        [
            Row(
                "largest spread, %",
                100 * _SINGLE["group_spread"],
                [100 * max(spreads)] if spreads else [],
                aim=100 * _SINGLE["group_spread"],
                lower=True,
            )
        ],
        plots=plots,
    )


def figure12(book: Book) -> Figure:
    """Token generation efficiency."""
    quantiles = [str(q) for q in QUANTILES]
    base, manager = book.plan.sweep(BASELINE), book.plan.sweep("manager")
    ratio = {
        q: book.ratio(manager, base, lambda r, q=q: r.interval_rate[q])  # type: ignore[misc]
        for q in quantiles
    }
    names = (BASELINE, "groups", "manager", OURS)
    return Figure(
        "figure12",
        "Figure 12: new tokens a second in intervals of 5 iterations",
        "Swap manager (on block groups) against vLLM with swapping, by quantile over intervals.",
        [
            Row(
                f"P{float(q) * 100:g}",
                {"0.99": _SINGLE["rate_p99"], "0.999": _SINGLE["rate_p999"]}.get(q),
                _known([value]),
                aim=1.0,
                unit="x",
            )
            for q, value in ratio.items()
        ],
        plots=[
            Plot(
                "New tokens a second in intervals of 5 iterations",
                "quantile over intervals",
                "tokens/s",
                [f"P{q * 100:g}" for q in QUANTILES],
                {
                    SYSTEMS[name].title: [
                        book.value(
                            book.plan.sweep(name),
                            lambda r, q=q: r.interval_rate[q],  # type: ignore[misc]
                        )
                        for q in quantiles
                    ]
                    for name in names
                },
            )
        ],
    )


_KNEE = 1.1
"""The knee is the smallest host memory with a makespan within 10% of the best."""


def figure13(book: Book) -> Figure:
    """Sensitivity to host memory."""
    sizes = book.plan.scale.memory
    jobs = {
        name: [book.plan.sweep(name, host_memory=gb) for gb in sizes]
        for name in ("fastswitch", OURS)
    }

    def knee(name: str) -> list[float]:
        spans = [book.value(job, lambda r: r.makespan) for job in jobs[name]]
        known = _known(spans)
        if len(known) < len(sizes):
            return []
        enough = [gb for gb, s in zip(sizes, known, strict=True) if s <= _KNEE * min(known)]
        return [min(enough)]

    def overhead(r: Result) -> float:
        # What is recomputed beside the batch costs a share of it: tokens at the rate of prefills.
        return 100 * r.recomputed / max(r.prefilled, 1)

    return Figure(
        "figure13",
        "Figure 13: host memory",
        f"{book.plan.scale.fewer} conversations at 1 conversation/s; the knee is the smallest "
        "memory with which all is served within 10% of the shortest time. Lost copies cost "
        "recomputation here, not stall, so both are shown.",
        [
            Row("knee, FastSwitch, GB", _SINGLE["knee"], knee("fastswitch")),
            Row("knee, kvswitch, GB", _SINGLE["knee"], knee(OURS)),
        ],
        plots=[
            Plot(
                "Recomputed tokens",
                "GB for copies",
                "% of prefilled tokens",
                sizes,
                {
                    SYSTEMS[n].title: [book.value(job, overhead) for job in js]
                    for n, js in jobs.items()
                },
                log="x",
            ),
            Plot(
                "Throughput",
                "GB for copies",
                "new tokens a second",
                sizes,
                {
                    SYSTEMS[n].title: [book.value(job, lambda r: r.throughput) for job in js]
                    for n, js in jobs.items()
                },
                log="x",
            ),
        ],
    )


def table1(book: Book) -> Figure:
    """Swap-out with and without reuse."""
    paper = _PAPER["table1"]
    without, with_ = book.plan.sweep("manager"), book.plan.sweep("fastswitch")

    def outs(r: Result) -> float:
        return r.swaps["preemptions"] + r.swaps["evictions"]

    def blocks(r: Result) -> float:
        return r.swaps["blocks_out_full"] + r.swaps["blocks_out_incremental"]

    def operations(r: Result) -> float:
        return r.swaps["copies_out_full"] + r.swaps["copies_out_incremental"]

    measures: list[tuple[str, Callable[[Result], float], list[float] | None, int]] = [
        ("switched out", outs, None, 0),
        ("blocks", blocks, paper["blocks"], 0),
        ("operations", operations, paper["operations"], 0),
        ("granularity", lambda r: r.granularity("out"), paper["granularity"], 2),
        ("link time, s", lambda r: r.link_seconds["out"], paper["latency"], 1),
    ]

    def per_switch(r: Result) -> float:
        return blocks(r) / max(outs(r), 1)

    ratio = book.ratio(with_, without, per_switch)
    return Figure(
        "table1",
        "Table 1: swap-outs with and without reuse",
        "Stages with and without reuse on the same trace, 60 GB. The number of swap-outs differs a "
        "little between two runs, so blocks are compared for each sequence switched out.",
        [
            Row(
                "blocks fewer, %",
                100 * (1 - paper["blocks"][1] / paper["blocks"][0]),
                [100 * (1 - ratio)] if ratio is not None else [],
                aim=100 * paper["less_aim"],
            )
        ],
        [
            Table(
                "Swap-outs",
                ["", "paper, without", "paper, with", "without reuse", "with reuse"],
                [
                    [
                        name,
                        *(["-", "-"] if theirs is None else [f"{v:,}" for v in theirs]),
                        _text(book.value(without, measure), digits),
                        _text(book.value(with_, measure), digits),
                    ]
                    for name, measure, theirs, digits in measures
                ],
            )
        ],
    )


def granularity(book: Book) -> Figure:
    """Blocks a copy."""
    epochs = book.plan.scale.epochs
    rows = []
    for title, system, direction, aim in (
        ("swap-ins, block groups without reuse", "manager", "in", True),
        ("swap-outs of whole contexts, without reuse", "manager", "out_full", True),
        ("swap-ins, FastSwitch", "fastswitch", "in", False),
        ("swap-ins, kvswitch", OURS, "in", False),
        ("incremental swap-outs, kvswitch", OURS, "out_incremental", False),
    ):
        values = _known(
            book.value(
                book.plan.sweep(system, epoch=e),
                lambda r, d=direction: r.granularity(d),  # type: ignore[misc]
            )
            for e in epochs
        )
        mean = [float(np.mean(values))] if values else []
        rows.append(
            Row(
                f"{title}, mean over frequencies",
                _SINGLE["granularity"] if aim else None,
                mean,
                aim=_SINGLE["granularity_aim"] if aim else None,
                unit=" blocks",
            )
        )
    return Figure(
        "granularity",
        "Section 3.1: granularity of whole-context swaps",
        f"Blocks a copy over {len(epochs)} frequencies.",
        rows,
        plots=[
            Plot(
                "Swap-in granularity",
                "priority-update frequency",
                "blocks a copy",
                [_frequency(e) for e in epochs],
                _by_frequency(book, STAGES[1:], lambda r: r.granularity("in")),
                log="x",
            )
        ],
    )


# -- beside the paper ----------------------------------------------------------------------------


def load(book: Book) -> Figure:
    """Latency against load."""
    rates = book.plan.scale.rates
    names = (BASELINE, "vllm-v1", OURS)

    def over_rates(measure: Callable[[Result], float]) -> dict[str, list[float | None]]:
        return {
            SYSTEMS[n].title: [book.value(book.plan.load(n, rate), measure) for rate in rates]
            for n in names
        }

    rows = [
        [
            f"{rate:g}",
            *(
                _text(book.ratio(book.plan.load(BASELINE, rate), book.plan.load(OURS, rate), m), 1)
                for _, m in _LATENCIES
            ),
            _text(
                book.ratio(
                    book.plan.load(OURS, rate),
                    book.plan.load(BASELINE, rate),
                    lambda r: r.throughput,
                )
            ),
        ]
        for rate in rates
    ]
    return Figure(
        "load",
        "How much depends on the load",
        f"LLaMA-8B on an A10, Markov, {book.plan.scale.fewer} conversations: turns a second, from "
        "idle to overloaded, since the paper does not say what its 1 request/s counts.",
        [],
        [
            Table(
                "kvswitch against vLLM with swapping, times better",
                ["turns/s", *(label for label, _ in _LATENCIES), "throughput"],
                rows,
            )
        ],
        [
            Plot(
                "TTFT P95",
                "turns a second",
                "seconds",
                rates,
                over_rates(lambda r: r.ttft["0.95"]),
                log="xy",
            ),
            Plot(
                "Throughput",
                "turns a second",
                "new tokens a second",
                rates,
                over_rates(lambda r: r.throughput),
                log="x",
            ),
        ],
    )


def sensitivity(book: Book) -> Figure:
    """What the speed-ups make of other constants."""
    tables = []
    for reading in READINGS:
        base, ours = (book.plan.sweep(s, reading=reading) for s in (BASELINE, OURS))
        pairs = [("as committed", base, ours)] + [
            (variant.label, variant.of(base), variant.of(ours)) for variant in book.plan.variants()
        ]
        rows = [
            [
                label,
                *(_text(book.ratio(upper, lower, measure), 1) for _, measure in _LATENCIES),
                _text(book.ratio(lower, upper, lambda r: r.throughput)),
            ]
            for label, upper, lower in pairs
        ]
        tables.append(
            Table(
                f"{_UNITS[reading]}: kvswitch against vLLM with swapping, times better",
                ["constant (committed value)", *(label for label, _ in _LATENCIES), "throughput"],
                rows,
            )
        )
    return Figure(
        "sensitivity",
        "What the results rest on: each uncertain constant with another value",
        f"LLaMA-8B on an A10, Markov, {book.plan.scale.fewer} conversations, seed 0; one constant "
        "at a time.",
        [],
        tables,
    )


def make_figures(plan: Plan, results: Results) -> list[Figure]:
    """Make all figures of the results at hand."""
    book = Book(plan, results)
    figures = [figure1(book), figure2(book), figure4(book), *figure8(book)]
    others = (figure9, figure10, figure11, figure12, figure13, table1, granularity, load)
    return [*figures, *(make(book) for make in others), sensitivity(book)]

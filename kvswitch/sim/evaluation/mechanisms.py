"""Figures 9 to 13, Table 1 and section 3.1: what each mechanism does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvswitch.sim.evaluation.book import (
    PAPER,
    SINGLE,
    Book,
    Measure,
    at,
    frequency,
    granularity_of,
    known,
    text,
)
from kvswitch.sim.evaluation.figure import Figure, Plot, Row, Table
from kvswitch.sim.evaluation.plan import (
    BASELINE,
    OURS,
    STAGES,
)
from kvswitch.sim.metrics import QUANTILES, Result
from kvswitch.sim.systems import SYSTEMS

__all__ = [
    "figure9",
    "figure10",
    "figure11",
    "figure12",
    "figure13",
    "granularity",
    "table1",
]


def _by_frequency(
    book: Book, systems: Sequence[str], measure: Measure
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
    worst = known(value for values in series.values() for value in values)
    ours = known(series[SYSTEMS[OURS].title])
    busiest = book.plan.latency("llama", "random", "conversations", OURS)
    return Figure(
        "figure9",
        "Figure 9: call-stack overhead",
        "Real CPU time in planner and scheduler, in pure Python on the machine that simulated, "
        "over the simulated time of the iterations; "
        f"{book.plan.scale.fewer} conversations at 1 conversation/s, Markov.",
        [
            Row(
                "kvswitch, highest of all frequencies, %",
                100 * SINGLE["call_stack"],
                [max(ours)] if ours else [],
                aim=100 * SINGLE["call_stack_aim"],
                lower=True,
            ),
            Row(
                f"kvswitch, Random, every 25 iterations, {book.plan.scale.conversations:,} "
                "conversations, %",
                None,
                known([book.value(busiest, lambda r: 100 * r.overhead_share)]),
                aim=100 * SINGLE["call_stack_aim"],
                lower=True,
            ),
            Row(
                "any stage, highest, %",
                100 * SINGLE["call_stack"],
                [max(worst)] if worst else [],
                aim=100 * SINGLE["call_stack"],
                lower=True,
            ),
        ],
        plots=[
            Plot(
                "Call-stack overhead",
                "priority-update frequency",
                "% of iteration time",
                [frequency(e) for e in epochs],
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
        return known(
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
                SINGLE["context_switch"],
                [max(groups)] if groups else [],
                aim=SINGLE["context_switch"],
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
                [frequency(e) for e in epochs],
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
                    granularity_of(direction),
                )
                for size in sizes
            ]
            there = known(values)
            least = min(there) if there else 1.0
            series[f"f = {frequency(epoch)}"] = [v / least if v else None for v in values]
            if len(there) == len(sizes):
                spreads.append(max(there) / least - 1)
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
                100 * SINGLE["group_spread"],
                [100 * max(spreads)] if spreads else [],
                aim=100 * SINGLE["group_spread"],
                lower=True,
            )
        ],
        plots=plots,
    )


def figure12(book: Book) -> Figure:
    """Token generation efficiency."""
    quantiles = [str(q) for q in QUANTILES]
    base, manager = book.plan.sweep(BASELINE), book.plan.sweep("manager")
    ratio = {q: book.ratio(manager, base, at("interval_rate", q)) for q in quantiles}
    names = (BASELINE, "groups", "manager", OURS)
    return Figure(
        "figure12",
        "Figure 12: new tokens a second in intervals of 5 iterations",
        "Swap manager (on block groups) against vLLM with swapping, by quantile over intervals.",
        [
            Row(
                f"P{float(q) * 100:g}",
                {"0.99": SINGLE["rate_p99"], "0.999": SINGLE["rate_p999"]}.get(q),
                known([value]),
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
                            at("interval_rate", q),
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
        there = known(spans)
        if len(there) < len(sizes):
            return []
        enough = [gb for gb, s in zip(sizes, there, strict=True) if s <= _KNEE * min(there)]
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
            Row("knee, FastSwitch, GB", SINGLE["knee"], knee("fastswitch")),
            Row("knee, kvswitch, GB", SINGLE["knee"], knee(OURS)),
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
    paper = PAPER["table1"]
    without, with_ = book.plan.sweep("manager"), book.plan.sweep("fastswitch")

    def outs(r: Result) -> float:
        return r.swaps["preemptions"] + r.swaps["evictions"]

    def blocks(r: Result) -> float:
        return r.swaps["blocks_out_full"] + r.swaps["blocks_out_incremental"]

    def operations(r: Result) -> float:
        return r.swaps["copies_out_full"] + r.swaps["copies_out_incremental"]

    measures: list[tuple[str, Measure, list[float] | None, int]] = [
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
                        text(book.value(without, measure), digits),
                        text(book.value(with_, measure), digits),
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
        values = known(
            book.value(
                book.plan.sweep(system, epoch=e),
                granularity_of(direction),
            )
            for e in epochs
        )
        mean = [float(np.mean(values))] if values else []
        rows.append(
            Row(
                f"{title}, mean over frequencies",
                SINGLE["granularity"] if aim else None,
                mean,
                aim=SINGLE["granularity_aim"] if aim else None,
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
                [frequency(e) for e in epochs],
                _by_frequency(book, STAGES[1:], lambda r: r.granularity("in")),
                log="x",
            )
        ],
    )

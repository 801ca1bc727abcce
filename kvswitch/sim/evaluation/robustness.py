"""Beside the paper: how much depends on the load, and on each uncertain constant."""

from __future__ import annotations

from kvswitch.sim.evaluation.book import (
    LATENCIES,
    UNITS,
    Book,
    Measure,
    text,
)
from kvswitch.sim.evaluation.figure import Figure, Plot, Table
from kvswitch.sim.evaluation.plan import (
    BASELINE,
    OURS,
    READINGS,
)
from kvswitch.sim.systems import SYSTEMS

__all__ = ["load", "sensitivity"]


def load(book: Book) -> Figure:
    """Latency against load."""
    rates = book.plan.scale.rates
    names = (BASELINE, "vllm-v1", OURS)

    def over_rates(measure: Measure) -> dict[str, list[float | None]]:
        return {
            SYSTEMS[n].title: [book.value(book.plan.load(n, rate), measure) for rate in rates]
            for n in names
        }

    rows = [
        [
            f"{rate:g}",
            *(
                text(book.ratio(book.plan.load(BASELINE, rate), book.plan.load(OURS, rate), m), 1)
                for _, m in LATENCIES
            ),
            text(
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
                ["turns/s", *(label for label, _ in LATENCIES), "throughput"],
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
                *(text(book.ratio(upper, lower, measure), 1) for _, measure in LATENCIES),
                text(book.ratio(lower, upper, lambda r: r.throughput)),
            ]
            for label, upper, lower in pairs
        ]
        tables.append(
            Table(
                f"{UNITS[reading]}: kvswitch against vLLM with swapping, times better",
                ["constant (committed value)", *(label for label, _ in LATENCIES), "throughput"],
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

"""What a simulation measures, and the figures made of it (definitions: docs/evaluation.md)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

__all__ = ["QUANTILES", "Recorder", "Result", "quantile", "weighted_quantile"]

FloatArray: TypeAlias = npt.NDArray[np.float64]

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
INTERVAL = 5
"""Iterations of an interval of figure 12."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one simulation; times in (virtual) seconds unless said otherwise.

    Attributes
    ----------
    turns, output_tokens, prefilled, recomputed, iterations : int
        What was done; recomputed tokens are part of `prefilled`.
    makespan, throughput : float
        Until the last token; new tokens a second.
    ttft, tbt : dict
        By quantile, "0.99" and so on, and "max".
    stall, stall_share : float
        Time in which the batch waited for swapping, and its share of the makespan.
    latency : dict
        Duration of an iteration by quantile.
    swap_latency, step_latency : dict
        Stall and forward of the iterations around that quantile, in the mean.
    waiting : dict
        Share of the batch that waits for its KV cache, by quantile over iterations.
    interval_rate : dict
        New tokens a second in intervals of 5 iterations, by quantile.
    inversion, inversion_requests : float
        See `InversionMeter`.
    occupancy : float
        Mean share of device blocks that were needed.
    overhead : float
        Real CPU seconds spent in planner and scheduler.
    overhead_share : float
        `overhead` against `busy`.
    link_seconds : dict
        Time that transfers took, "out" and "in".
    swaps : dict
        The planner's counters (`SwapStats`).
    busy : float
        Time spent in iterations: stalls and forwards.
    real_seconds : float
        What the simulation took.
    """

    turns: int
    output_tokens: int
    prefilled: int
    recomputed: int
    iterations: int
    makespan: float
    throughput: float
    ttft: dict[str, float]
    tbt: dict[str, float]
    stall: float
    stall_share: float
    latency: dict[str, float]
    swap_latency: dict[str, float]
    step_latency: dict[str, float]
    waiting: dict[str, float]
    interval_rate: dict[str, float]
    inversion: float
    inversion_requests: float
    occupancy: float
    overhead: float
    overhead_share: float
    link_seconds: dict[str, float]
    swaps: dict[str, float]
    busy: float
    real_seconds: float

    def granularity(self, direction: str) -> float:
        """Blocks a copy: "in", "out", "out_full" or "out_incremental"; 0 without copies."""
        if direction == "out":
            blocks = self.swaps["blocks_out_full"] + self.swaps["blocks_out_incremental"]
            copies = self.swaps["copies_out_full"] + self.swaps["copies_out_incremental"]
        else:
            blocks, copies = self.swaps[f"blocks_{direction}"], self.swaps[f"copies_{direction}"]
        return blocks / copies if copies else 0.0


class Recorder:
    """Takes notes of a simulation, in flat arrays."""

    def __init__(self) -> None:
        self.turns = 0
        self.tokens_prefilled = 0
        self.tokens_recomputed = 0
        self.ttft = array("d")
        self._gaps = array("d")
        self._gap_counts = array("l")
        self._durations = array("d")
        self._stalls = array("d")
        self._tokens = array("l")
        self._waiting = array("d")
        self._needed = 0
        self._idle_stall = 0.0

    def gaps(self, seconds: float, count: int) -> None:
        """`count` sequences waited `seconds` between two tokens."""
        self._gaps.append(seconds)
        self._gap_counts.append(count)

    def first_token(self, seconds: float) -> None:
        """A turn waited `seconds` for its first token."""
        self.ttft.append(seconds)

    def prefilled(self, tokens: int, recomputed: int) -> None:
        """Prompt tokens were computed, some of them not for the first time."""
        self.tokens_prefilled += tokens
        self.tokens_recomputed += recomputed

    def iteration(
        self,
        *,
        stall: float,
        step: float,
        tokens: int,
        running: int,
        arriving: int,
        needed: int,
    ) -> None:
        """An iteration that had a forward."""
        self._durations.append(stall + step)
        self._stalls.append(stall)
        self._tokens.append(tokens)
        self._waiting.append(arriving / running if running else 0.0)
        self._needed += needed

    def idle(self, stall: float) -> None:
        """An iteration without one."""
        self._idle_stall += stall

    def result(
        self,
        *,
        makespan: float,
        blocks: int,
        inversion: tuple[float, float],
        overhead: float,
        link_seconds: dict[str, float],
        swaps: dict[str, Any],
        real_seconds: float,
    ) -> Result:
        """Make figures of the notes."""
        durations, stalls = np.array(self._durations), np.array(self._stalls)
        iterations = len(durations)
        tokens = int(np.sum(self._tokens))
        latency = _quantiles(durations)
        stall = float(stalls.sum()) + self._idle_stall
        busy = float(durations.sum()) + self._idle_stall
        return Result(
            turns=self.turns,
            output_tokens=tokens,
            prefilled=self.tokens_prefilled,
            recomputed=self.tokens_recomputed,
            iterations=iterations,
            makespan=makespan,
            throughput=tokens / makespan if makespan else 0.0,
            ttft=_quantiles(np.array(self.ttft)),
            tbt=_weighted(np.array(self._gaps), np.array(self._gap_counts, np.float64)),
            stall=stall,
            stall_share=stall / makespan if makespan else 0.0,
            latency=latency,
            swap_latency=_around(durations, stalls),
            step_latency=_around(durations, durations - stalls),
            waiting=_quantiles(np.array(self._waiting)),
            interval_rate=_quantiles(_rates(np.array(self._tokens, np.float64), durations)),
            inversion=inversion[0],
            inversion_requests=inversion[1],
            occupancy=self._needed / max(iterations, 1) / blocks,
            overhead=overhead,
            overhead_share=overhead / busy if busy else 0.0,
            link_seconds=link_seconds,
            swaps=swaps,
            busy=busy,
            real_seconds=real_seconds,
        )


def quantile(values: FloatArray, q: float) -> float:
    """The smallest value that at least a share `q` of the values does not exceed; 0 of none."""
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else 0.0


def weighted_quantile(values: FloatArray, weights: FloatArray, q: float) -> float:
    """`quantile` of values that each stand for `weights` equal ones."""
    if not len(values):
        return 0.0
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, q * total[-1])])


def _named(values: Iterable[float]) -> dict[str, float]:
    return dict(zip([str(q) for q in QUANTILES], values, strict=True))


def _quantiles(values: FloatArray) -> dict[str, float]:
    named = _named(quantile(values, q) for q in QUANTILES)
    return named | {"max": float(values.max()) if len(values) else 0.0}


def _weighted(values: FloatArray, weights: FloatArray) -> dict[str, float]:
    named = _named(weighted_quantile(values, weights, q) for q in QUANTILES)
    return named | {"max": float(values.max()) if len(values) else 0.0}


def _around(durations: FloatArray, values: FloatArray) -> dict[str, float]:
    """Mean value of the iterations whose duration lies around each quantile."""
    by_duration = values[np.argsort(durations, kind="stable")]
    size = len(by_duration)

    def mean(q: float) -> float:
        width = (1 - q) / 2
        low, high = int((q - width) * size), int(np.ceil((q + width) * size))
        return float(by_duration[low : max(high, low + 1)].mean()) if size else 0.0

    return _named(mean(q) for q in QUANTILES)


def _rates(tokens: FloatArray, durations: FloatArray) -> FloatArray:
    """New tokens a second in intervals of 5 iterations."""
    whole = len(tokens) // INTERVAL * INTERVAL
    made = tokens[:whole].reshape(-1, INTERVAL).sum(axis=1)
    took = durations[:whole].reshape(-1, INTERVAL).sum(axis=1)
    rates: FloatArray = made / took
    return rates

"""What one run of the engine leaves behind, and the figures drawn from it.

Definitions (paper section 4.3): TTFT is per turn, from its arrival to its first token, queueing
included. Time between tokens is every gap between two consecutive tokens of a turn, time switched
out included, all turns pooled. Throughput counts new output tokens over the makespan; recomputed
tokens never count. A quantile q is given only where 10 / (1 - q) samples support it, the 95th
percentile where there are 100: the default workload has about as many turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from kvswitch.switch import SwapStats

__all__ = [
    "IterationRecord",
    "RunResult",
    "Switched",
    "TransferRecord",
    "TurnRecord",
    "figures",
    "first_token_times",
    "quantile",
    "token_gaps",
]

_ENOUGH = {0.95: 100}  # samples; 10 / (1 - q) elsewhere


class TurnRecord(msgspec.Struct):
    """One turn of a conversation; times in seconds since the run began."""

    conversation: int
    turn: int
    arrival: float
    prompt_tokens: int
    token_times: list[float] = msgspec.field(default_factory=list)


class IterationRecord(msgspec.Struct):
    """One iteration of the engine; times in seconds since the run began.

    ``begin`` to ``ready`` is scheduling, planning, preparing the batch, and ``stall``, waiting for
    transfers; ``ready`` to ``end`` is the forward of ``decoding`` sequences and ``prefilled``
    prompt tokens. ``overhead`` is scheduling and planning alone. ``recomputed`` counts the tokens
    computed that had been computed before.
    """

    begin: float
    ready: float
    end: float
    stall: float
    overhead: float
    decoding: int
    prefilled: int
    preempted: int
    resumed: int
    epoch: int
    recomputed: int = 0


class TransferRecord(msgspec.Struct):
    """One transfer; times in seconds since the run began, `out` is device to host."""

    out: bool
    started: float
    ended: float
    blocks: int
    copies: int
    nbytes: int


class Switched(msgspec.Struct, frozen=True):
    """A conversation was switched out or in, when it had so many tokens."""

    conversation: int
    out: bool
    tokens: int
    seconds: float


class RunResult(msgspec.Struct):
    """One mode's run over the workload."""

    mode: str
    seconds: float
    turns: list[TurnRecord]
    iterations: list[IterationRecord]
    transfers: list[TransferRecord]
    stats: SwapStats
    block_bytes: int
    recomputed_tokens: int
    inversion_seconds: float
    inversion_request_seconds: float
    tokens: dict[int, list[int]]
    """Every conversation's token ids, prompts and answers."""


def quantile(samples: Sequence[float], q: float) -> float | None:
    """The q-quantile, or None if there are too few samples for it."""
    # round: 10 / (1 - 0.9) is a little more than 100
    if len(samples) < _ENOUGH.get(q, round(10 / (1 - q))):
        return None
    return float(np.quantile(samples, q))


def first_token_times(run: RunResult) -> list[float]:
    """TTFT of every turn, in seconds."""
    return [turn.token_times[0] - turn.arrival for turn in run.turns if turn.token_times]


def token_gaps(run: RunResult) -> list[float]:
    """Time between every two consecutive tokens of a turn, in seconds."""
    return [gap for turn in run.turns for gap in np.diff(turn.token_times).tolist()]


def figures(run: RunResult) -> dict[str, Any]:
    """All figures of one run, by name; seconds unless the name says otherwise."""
    ttft, gaps = first_token_times(run), token_gaps(run)
    tokens = sum(len(turn.token_times) for turn in run.turns)
    iterations = run.iterations
    whole = sum(i.end - i.begin for i in iterations)
    stats = run.stats
    return {
        "turns": len(run.turns),
        "output_tokens": tokens,
        "makespan": run.seconds,
        "throughput_tokens_per_s": tokens / run.seconds,
        "ttft_p50": quantile(ttft, 0.5),
        "ttft_p90": quantile(ttft, 0.9),
        "ttft_p95": quantile(ttft, 0.95),
        "ttft_p99": quantile(ttft, 0.99),
        "ttft_max": max(ttft, default=None),
        "tbt_p50": quantile(gaps, 0.5),
        "tbt_p99": quantile(gaps, 0.99),
        "tbt_p999": quantile(gaps, 0.999),
        "tbt_max": max(gaps, default=None),
        "preemptions": stats.preemptions,
        "recomputed_tokens": run.recomputed_tokens,
        "blocks_out": stats.blocks_out,
        "blocks_in": stats.blocks_in,
        "bytes_out": stats.blocks_out * run.block_bytes,
        "bytes_in": stats.blocks_in * run.block_bytes,
        "copies_out": sum(t.copies for t in run.transfers if t.out),
        "copies_in": sum(t.copies for t in run.transfers if not t.out),
        "blocks_per_copy_in": _ratio(stats.blocks_in, stats.copies_in),
        "blocks_per_copy_out_full": _ratio(stats.blocks_out_full, stats.copies_out_full),
        "blocks_per_copy_out_incremental": _ratio(
            stats.blocks_out_incremental, stats.copies_out_incremental
        ),
        "share_spared": stats.share_spared if stats.blocks_out else None,
        "stall": sum(i.stall for i in iterations),
        "stall_share": sum(i.stall for i in iterations) / whole,
        "inversion": run.inversion_seconds,
        "inversion_request_seconds": run.inversion_request_seconds,
        "iterations": len(iterations),
        "iteration_mean": whole / len(iterations),
        "forward": sum(i.end - i.ready for i in iterations),
        "overhead": sum(i.overhead for i in iterations),
        "overhead_share": sum(i.overhead for i in iterations) / whole,
        "conflicts": stats.conflicts,
        "contaminated_blocks": stats.contaminated_blocks,
    }


def _ratio(blocks: int, copies: int) -> float | None:
    return blocks / copies if copies else None

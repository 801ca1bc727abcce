"""The figures drawn from a run."""

from __future__ import annotations

import pytest

from kvswitch import SwapStats
from kvswitch_demo.results import (
    IterationRecord,
    RunResult,
    TransferRecord,
    TurnRecord,
    figures,
    quantile,
)


def run_of(*turns: TurnRecord, stats: SwapStats | None = None) -> RunResult:
    return RunResult(
        mode="kvswitch",
        seconds=4.0,
        turns=list(turns),
        iterations=[
            IterationRecord(0.0, 0.4, 1.0, 0.3, 0.1, 1, 16, 1, 0, 0),
            IterationRecord(1.0, 1.1, 2.0, 0.0, 0.1, 2, 0, 0, 1, 1),
        ],
        transfers=[
            TransferRecord(True, 0.0, 0.3, 5, 2, 5000),
            TransferRecord(True, 0.5, 0.6, 1, 1, 1000),
            TransferRecord(False, 1.0, 1.2, 6, 1, 6000),
        ],
        stats=stats or SwapStats(),
        block_bytes=1000,
        recomputed_tokens=7,
        inversion_seconds=0.5,
        inversion_request_seconds=1.5,
        tokens={0: [1, 2, 3]},
    )


@pytest.mark.parametrize(
    ("q", "enough"), [(0.5, 20), (0.9, 100), (0.95, 100), (0.99, 1_000), (0.999, 10_000)]
)
def test_quantile_needs_samples_to_support_it(q: float, enough: int) -> None:
    samples = [float(i) for i in range(enough)]
    assert quantile(samples, q) == pytest.approx(q * (enough - 1))
    assert quantile(samples[1:], q) is None


def test_ttft_counts_from_the_turns_arrival_and_gaps_stay_within_a_turn() -> None:
    first = TurnRecord(0, 0, arrival=0.5, prompt_tokens=8, token_times=[1.0, 1.5, 2.5])
    second = TurnRecord(0, 1, arrival=3.0, prompt_tokens=8, token_times=[3.25, 3.5])
    values = figures(run_of(first, second))
    assert (values["turns"], values["output_tokens"]) == (2, 5)
    assert values["throughput_tokens_per_s"] == 1.25
    assert (values["ttft_max"], values["tbt_max"]) == (0.5, 1.0)
    assert values["ttft_p50"] is values["tbt_p50"] is None


def test_a_turn_without_a_token_yet_has_no_ttft() -> None:
    values = figures(run_of(TurnRecord(0, 0, 0.5, 8)))
    assert values["output_tokens"] == 0
    assert values["ttft_max"] is values["tbt_max"] is None


def test_blocks_and_copies_are_counted_by_direction() -> None:
    stats = SwapStats(
        blocks_out_full=40, copies_out_full=2, blocks_out_incremental=6, copies_out_incremental=3,
        blocks_in=60, copies_in=4, blocks_spared=14,
    )  # fmt: skip
    values = figures(run_of(TurnRecord(0, 0, 0.0, 1, [1.0, 2.0]), stats=stats))
    assert (values["blocks_out"], values["bytes_out"], values["copies_out"]) == (46, 46_000, 3)
    assert (values["blocks_in"], values["bytes_in"], values["copies_in"]) == (60, 60_000, 1)
    assert values["blocks_per_copy_out_full"] == 20
    assert values["blocks_per_copy_out_incremental"] == 2
    assert values["blocks_per_copy_in"] == 15
    assert values["share_spared"] == pytest.approx(14 / 60)


def test_what_never_happened_has_no_ratio() -> None:
    values = figures(run_of(TurnRecord(0, 0, 0.0, 1, [1.0, 2.0])))
    assert values["blocks_per_copy_in"] is None
    assert values["blocks_per_copy_out_full"] is None
    assert values["blocks_per_copy_out_incremental"] is None
    assert values["share_spared"] is None


def test_shares_of_an_iteration() -> None:
    values = figures(run_of(TurnRecord(0, 0, 0.0, 1, [1.0, 2.0])))
    assert values["stall"] == pytest.approx(0.3)
    assert values["stall_share"] == pytest.approx(0.15)
    assert values["overhead_share"] == pytest.approx(0.1)
    assert values["forward"] == pytest.approx(1.5)
    assert values["iteration_mean"] == pytest.approx(1.0)

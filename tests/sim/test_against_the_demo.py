"""The simulator against what was measured: `kvswitch demo` on a CPU, five seeds."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from kvswitch.errors import ConfigError
from kvswitch.sim.evaluation.check import compare, figure, read_measured

MEASURED = Path(__file__).parents[2] / "docs" / "benchmarks" / "demo-seeds.json"

# Medians rest on whether, while somebody's context is recomputed, most of the others wait or not.
WIDER = {
    ("recompute", "TTFT P50, s"): 0.5,
    ("kvswitch", "TTFT P50, s"): 0.5,
    ("recompute", "TBT P50, s"): 2.0,
}


def test_what_was_measured_is_what_is_simulated() -> None:
    for what, both in compare(read_measured(MEASURED)).items():
        assert abs(both.off) <= WIDER.get(what, 0.25), what


def test_the_comparison_can_fail() -> None:
    reports = read_measured(MEASURED)[:1]
    reports[0].modes.kvswitch.throughput_tokens_per_s *= 2
    assert abs(compare(reports)["kvswitch / recompute", "throughput"].off) > 0.25


def test_one_run_is_compared_as_many_are(tmp_path: Path) -> None:
    (first, *_) = read_measured(MEASURED)
    file = tmp_path / "summary.json"
    file.write_bytes(msgspec.json.encode(first))
    (table,) = figure(file).tables
    (row,) = [r for r in table.rows if r[:2] == ["kvswitch / recompute", "throughput"]]
    assert row[-1].endswith("%")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "truncated"),
        ("[]", "no run in it"),
        ("[1]", "Expected `object`"),
        (json.dumps({"date": "", "seed": 0}), "field `machine`"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "summary.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"summary\.json.*{complaint}"):
        read_measured(file)

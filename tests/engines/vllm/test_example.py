"""The program that the guide points to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODELS = Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()
PROGRAM = Path(__file__).parents[3] / "examples/vllm_offline.py"


@pytest.mark.slow
def test_the_offline_example_switches() -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(MODELS / "smollm2")],
        env={**os.environ, "VLLM_CPU_NUM_OF_RESERVED_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    counters = dict(line.split() for line in done.stdout.splitlines() if line.startswith("kvs"))
    assert float(counters["kvswitch_switches_out_total"]) > 0
    assert float(counters["kvswitch_recomputed_tokens_total"]) <= float(
        counters["kvswitch_switches_out_total"]
    )

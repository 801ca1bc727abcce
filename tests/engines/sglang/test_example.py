"""The program that the guide points to."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[3] / "examples/sglang_offline.py"
ON_A_CPU = {
    "device": "cpu",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "page_size": 16,
    "mem_fraction_static": 0.3,
    "context_length": 1024,
    "skip_server_warmup": True,
}


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_the_offline_example_switches(models: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(models / "smollm2"), json.dumps(ON_A_CPU)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "urgent: Paris" in done.stdout
    assert "6 stories were still being told" in done.stdout
    preempted = [int(n) for n in re.findall(r"preempted (\d+) times", done.stdout)]
    assert len(preempted) == 6
    assert sum(preempted) > 0

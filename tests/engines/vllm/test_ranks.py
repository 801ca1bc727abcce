"""Tensor parallelism: one decision, both ranks do the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MODELS = Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()


def serve(blocks: int) -> dict[str, Any]:
    program = Path(__file__).with_name("ranks.py")
    done = subprocess.run(
        [sys.executable, str(program), str(MODELS / "tiny"), str(blocks)],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, Any] = json.loads(results[-1].removeprefix("RESULT "))
    return found


@pytest.mark.slow
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a rank needs a core")
def test_two_ranks_switch_alike() -> None:
    alone, pressed = serve(200), serve(25)
    assert pressed["tokens"] == alone["tokens"]
    assert pressed["counters"]["kvswitch_blocks_in_total"] > 0
    assert pressed["counters"]["kvswitch_transfers_failed_total"] == 0
    assert alone["counters"]["kvswitch_switches_out_total"] == 0

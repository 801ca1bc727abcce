"""vLLM as it is, with recomputation under the same priorities, and with kvswitch: side by side.

python compare_vllm.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--help]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import serve_vllm
import workloads

MODES = {
    "stock": "vLLM as it is, first come first served, no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch, KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "never": "vLLM as it is, memory for all",
    "calm": "as `never`, with kvswitch: what it costs where it cannot help",
    "alone": "as `calm`, with the same priority changes as `kvswitch`",
}
BLOCKS = 96  # of 32 tokens: 3072


def settings(mode: str, seed: int, requests: int) -> dict[str, Any] | None:
    """kvswitch's settings; None without it."""
    if mode in ("stock", "never"):
        return None
    common: dict[str, Any] = {"host_memory": "1GiB", "epoch": 10, "quantum": 5}
    if mode == "calm":
        return common
    return {
        **common,
        "preemption": "recompute" if mode == "recompute" else "switch",
        "policy": "random",
        "policy_settings": {"seed": seed, "sequences": requests, "epochs": 2000},
    }


def measure(mode: str, seed: int, options: argparse.Namespace) -> comparison.Outcome:
    """Serve one workload in one mode."""
    items = workloads.items(options, seed)
    llm = serve_vllm.make_llm(
        str(Path(options.models, "smollm2")),
        blocks=BLOCKS if mode in ("stock", "recompute", "kvswitch") else None,
        settings=settings(mode, seed, len(items)),
        dtype=options.dtype,
    )
    return serve_vllm.serve(llm, items)


if __name__ == "__main__":
    comparison.main("vllm", MODES, measure)

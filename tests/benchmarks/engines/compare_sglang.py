"""SGLang as it is, with recomputation under the same priorities, and with kvswitch: side by side.

python compare_sglang.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import workloads

MODES = {
    "stock": "SGLang as it is, first come first served, no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch, KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "never": "SGLang as it is, memory and slots for all",
    "calm": "as `never`, with kvswitch: what it costs where it cannot help",
    "alone": "as `calm`, with the same priority changes as `kvswitch`",
}
TOKENS = 3072  # of KV cache


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
        "policy_settings": {"seed": seed, "sequences": requests + 2, "epochs": 2000},
    }


def measure(mode: str, seed: int, options: argparse.Namespace) -> comparison.Outcome:
    """Serve one workload in one mode."""
    import serve_sglang
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one is the copies'
    items = workloads.items(options, seed)
    chosen = settings(mode, seed, len(items))
    os.environ["KVSWITCH_CONFIG"] = json.dumps(chosen or {})
    scarce = mode in ("stock", "recompute", "kvswitch")
    by_priority = mode not in ("stock", "never")
    server = serve_sglang.Server(
        str(Path(options.models, "smollm2")),
        kvswitch=chosen is not None,
        overlap=True,
        check=False,
        dtype=options.dtype,
        max_total_tokens=TOKENS if scarce else 16 * TOKENS,
        max_running_requests=16 if scarce else 64,
        context_length=2048,
        enable_priority_scheduling=by_priority,
        **({"retraction_policy": "priority"} if by_priority else {}),
    )
    return serve_sglang.serve(server, items)


if __name__ == "__main__":
    comparison.main("sglang", MODES, measure)

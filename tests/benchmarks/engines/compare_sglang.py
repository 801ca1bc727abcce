"""SGLang as it is, with recomputation under the same priorities, and with kvswitch: side by side.

python compare_sglang.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--help]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import comparison

MODES = {
    "stock": "SGLang as it is, first come first served, no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch, KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "never": "SGLang as it is, memory and slots for all",
    "calm": "as `never`, with kvswitch: what it costs where it cannot help",
    "alone": "as `calm`, with the same priority changes as `kvswitch`",
}
TOKENS = 3072  # of KV cache


def start(mode: str, seed: int, sequences: int, options: argparse.Namespace) -> comparison.Serve:
    """Make a server in a mode."""
    import serve_sglang
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))  # one is the copies'
    chosen = comparison.settings(mode, seed, sequences + serve_sglang.WARM, options)
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
    serve_sglang.warm_up(server)
    return functools.partial(serve_sglang.serve, server)


if __name__ == "__main__":
    comparison.main("sglang", MODES, start)

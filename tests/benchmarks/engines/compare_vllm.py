"""vLLM as it is, with recomputation under the same priorities, and with kvswitch: side by side.

python compare_vllm.py [--seeds N] [--modes recompute,kvswitch] [--requests N] [--help]
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import comparison
import serve_vllm

MODES = {
    "stock": "vLLM as it is, first come first served, no priorities",
    "recompute": "the same priorities, scheduler and quantum as kvswitch, KV is thrown away",
    "kvswitch": "KV goes to host memory and comes back",
    "never": "vLLM as it is, memory for all",
    "calm": "as `never`, with kvswitch: what it costs where it cannot help",
    "alone": "as `calm`, with the same priority changes as `kvswitch`",
}
BLOCKS = 96  # of 32 tokens: 3072


def start(mode: str, seed: int, sequences: int, options: argparse.Namespace) -> comparison.Serve:
    """Make an engine in a mode."""
    llm = serve_vllm.make_llm(
        str(Path(options.models, "smollm2")),
        blocks=BLOCKS if mode in ("stock", "recompute", "kvswitch") else None,
        settings=comparison.settings(mode, seed, sequences, options),
        dtype=options.dtype,
    )
    return functools.partial(serve_vllm.serve, llm)


if __name__ == "__main__":
    comparison.main("vllm", MODES, start)

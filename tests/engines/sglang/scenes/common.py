"""What several of them need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Server

TINY = str(Path(os.environ["KVSWITCH_MODELS"]) / "tiny")

Seen = dict[str, torch.Tensor]


class _Known:
    """A copy to the host that has ended."""

    def synchronize(self) -> None:
        pass


def know_pages_late(server: Server) -> None:
    """Let page numbers be known two passes later, as where they come from a GPU."""
    allocator = server.scheduler.token_to_kv_pool_allocator
    allocator.late = True
    allocator.debug_mode = False  # which would ask for all free pages, again and again
    allocator._to_host = lambda ids: (ids.clone(), _Known())


def serve(
    server: Server, given: list[list[int]], tokens: int, first: int = 0, **more: Any
) -> list[Any]:
    """Submit all at once, as "r0", "r1", ..."""
    return [server.submit(f"r{first + i}", p, tokens, **more) for i, p in enumerate(given)]


def reference(
    server: Server, given: list[list[int]], tokens: int, together: int = 8, look: int = 0
) -> tuple[list[list[int]], Seen]:
    """What comes out when nobody is preempted, a few together; then everything is forgotten.

    Also K and V of each when it has come to `look` output tokens.
    """
    found: list[list[int]] = []
    seen: Seen = {}
    for first in range(0, len(given), together):
        requests = serve(server, given[first : first + together], tokens, first)
        found += server.run(requests, each=remember(server, requests, look, seen))
        assert all(r.retraction_count == 0 for r in requests)
    assert server.scheduler.flush_cache()
    return found, seen


def remember(server: Server, requests: list[Any], tokens: int, seen: Seen) -> Callable[[int], None]:
    """Note K and V of every request when it has come to `tokens` output tokens; 0: never."""

    def look(number: int) -> None:
        for r in requests:
            if tokens and r.kv.holds_kv and len(r.output_ids) >= tokens and r.rid not in seen:
                seen[r.rid] = server.kv(r, len(r.origin_input_ids) + tokens - 1)

    return look


def compare(before: Seen, after: Seen) -> dict[str, float]:
    """How far apart K and V are, and which share of the tokens has the very same bits."""
    assert after.keys() == before.keys()
    worst = 0.0
    same = total = 0
    for rid, kv in before.items():
        again = after[rid]
        assert not torch.isnan(again).any()
        worst = max(worst, float((again - kv).abs().max()))
        same += int((again == kv).flatten(2).all(-1).all(0).sum())
        total += kv.shape[1]
    return {"worst": worst, "identical": same / total}

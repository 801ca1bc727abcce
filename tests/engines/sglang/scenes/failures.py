"""What goes wrong, and who goes away."""

from __future__ import annotations

import random
import time
from typing import Any

from harness import RANK, Server, prompts

import kvswitch_sglang.switching
from kvswitch.messages import Direction
from kvswitch.transfer import CpuBackend
from kvswitch_sglang.control import owner_of
from scenes.common import TINY, reference, serve


class FaultyBackend(CpuBackend):
    """Fails windows by chance."""

    def __init__(self, seed: int, out: float = 0.0, back: float = 0.0) -> None:
        super().__init__()
        # Each direction is copied by a thread of its own, with chances of its own.
        self.rngs = {direction: random.Random(f"{seed} {direction}") for direction in Direction}
        self.rates = {Direction.OUT: out, Direction.IN: back}
        self.failed = 0

    def open_queue(self, direction: Direction) -> Any:
        queue = super().open_queue(direction)
        copy = queue.copy

        def faulty(*args: Any) -> None:
            if self.rngs[direction].random() < self.rates[direction]:
                self.failed += 1
                raise ValueError("this window did not make it")
            copy(*args)

        queue.copy = faulty
        return queue


def faults(
    overlap: bool, out: float, back: float, chunk: int | None = None, rank: int = 0
) -> dict[str, Any]:
    """Copies fail in both directions, on one rank: no more than recomputation is lost."""
    backend = FaultyBackend(1)
    kvswitch_sglang.switching.make_backend = lambda *args, **kwargs: backend
    server = Server(TINY, overlap=overlap, **({"chunked_prefill_size": chunk} if chunk else {}))
    given = prompts(8, 11)
    expected, _ = reference(server, given, 60)
    if rank == RANK:
        backend.rates = {Direction.OUT: out, Direction.IN: back}
    requests = serve(server, given, 60)

    def each(number: int) -> None:
        if number % 8 == 6:
            server.retract([0, 1, 2], poison=True)
        server.check()

    found = server.run(requests, each=each)
    assert found == expected
    stats = server.switching.stats()
    server.check_idle()
    server.close()
    return {
        "failed": backend.failed,
        "transfers_failed": stats.transfers_failed,
        "recomputed": stats.tokens_lost,
        "loaded": stats.blocks_in,
    }


def little_host_memory() -> dict[str, Any]:
    """The host holds only a few pages: what it cannot hold is recomputed."""
    server = Server(TINY)
    given = prompts(8, 12)
    expected, _ = reference(server, given, 60)
    requests = serve(server, given, 60)

    def each(number: int) -> None:
        if number in (10, 25, 40):
            server.retract([0, 1, 2, 3], poison=True)

    assert server.run(requests, each=each) == expected
    stats = server.switching.stats()
    server.check_idle()
    server.close()
    return {"recomputed": stats.tokens_lost, "loaded": stats.blocks_in}


def room_for_one(important_first: bool) -> dict[str, Any]:
    """Two leave, and the host has room for one: how many tokens it has of each."""
    server = Server(TINY, enable_priority_scheduling=True)
    requests = [
        server.submit(f"p{priority}", prompt, 20, priority=priority)
        for priority, prompt in zip((5, 1), prompts(2, 3, 90, 91), strict=True)
    ]
    for _ in range(4):
        server.step()
    for request in requests if important_first else requests[::-1]:
        server.retract([server.scheduler.running_batch.reqs.index(request)])
        server.switching.settle()
    reach = {r.rid: server.switching.reach(owner_of(r), ()) for r in requests}
    server.run(requests)
    server.check_idle()
    server.close()
    return reach


def abort_while_away() -> int:
    """One is aborted while it is being sent: how many tokens the next turn finds on the host."""
    backend = CpuBackend(bandwidth=4e6)
    kvswitch_sglang.switching.make_backend = lambda *args, **kwargs: backend
    server = Server(TINY, enable_priority_scheduling=True, max_running_requests=1)
    away, other = serve(server, prompts(2, 5, 90, 91), 40)
    while len(away.output_ids) < 5:
        server.step()
    keys = server.cache._keys_of(
        away, away.full_untruncated_fill_ids, 80 // server.scheduler.page_size
    )
    server.retract([0])
    server.step()
    assert server.switching.planner.under_way
    server.abort(away.rid)
    server.step()
    server.switching.settle()
    found: int = server.switching.reach("next turn", keys)
    server.run([other])
    server.check_idle()
    server.close()
    return found


def aborts() -> dict[str, Any]:
    """Abort while running, waiting, preempted; the others go on, nothing is left of anybody."""
    server = Server(TINY, max_running_requests=4, enable_priority_scheduling=True)
    rng = random.Random(3)
    given = prompts(32, 9)
    expected, _ = reference(server, given, 40, together=4)
    aborted = {"waiting": 0, "preempted": 0, "running": 0}
    live: dict[int, Any] = {}
    coming = list(range(len(given)))
    for number in range(220):
        if coming and number % 3 == 0:
            k = coming.pop()
            live[k] = server.submit(f"a{k:06d}", given[k], 40, priority=rng.randrange(5))
        if number % 5 == 2:
            server.retract([0, 1])
        unfinished = sorted(k for k, r in live.items() if not r.finished())
        if number % 9 == 3 and unfinished:
            victim = live.pop(rng.choice(unfinished))
            if victim.kv.holds_kv:
                aborted["running"] += 1
            else:
                aborted["preempted" if victim.is_retracted else "waiting"] += 1
            server.abort(victim.rid)
        server.step()
        server.check()
    found = server.run(list(live.values()))
    assert found == [expected[k] for k in live]
    server.check_idle()
    server.close()
    return {"survived": len(found), **aborted}


def soak(
    seconds: float, seed: int = 0, overlap: bool = True, page_size: int = 16
) -> dict[str, Any]:
    """Everything at once for a while: traffic, priorities, aborts, retractions, faults."""
    rng = random.Random(seed)
    backend = FaultyBackend(seed, 0.02, 0.02)
    kvswitch_sglang.switching.make_backend = lambda *args, **kwargs: backend
    server = Server(
        TINY,
        overlap=overlap,
        page_size=page_size,
        max_total_tokens=1536,
        enable_priority_scheduling=True,
        retraction_policy="priority",
        chunked_prefill_size=128,
    )
    given = prompts(12, seed, 20, 200)
    expected, _ = reference(server, given, 40, together=4)
    end = time.monotonic() + seconds
    done = number = 0
    while time.monotonic() < end:
        live = []
        for _ in range(30):
            k = rng.randrange(len(given))
            live.append(
                (k, server.submit(f"s{number:06d}", given[k], 40, priority=rng.randrange(6)))
            )
            number += 1
            for _ in range(rng.randrange(4)):
                server.step()
            if rng.random() < 0.1:
                server.retract(rng.sample(range(8), 3))
            if rng.random() < 0.1:
                server.poison()
            if rng.random() < 0.1:
                k, victim = live.pop(rng.randrange(len(live)))
                server.abort(victim.rid)
            if live and rng.random() < 0.2:
                rid = rng.choice(live)[1].rid
                if any(r.rid == rid for r in server.cache.control._requests.values()):
                    server.scheduler.set_request_priority(rid, rng.randrange(6))
            server.check()
        found = server.run([r for _, r in live])
        for (k, _), tokens in zip(live, found, strict=True):
            assert tokens == expected[k]
            done += 1
        server.check_idle()
        if rng.random() < 0.3:
            assert server.scheduler.flush_cache()
    server.close()
    return {"done": done, "failed": backend.failed}

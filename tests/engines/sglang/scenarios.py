"""What the tests do with a real scheduler: ``python scenarios.py NAME '{"argument": ...}'``.

Each function asserts what must hold, and prints what the test is to look at as JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from harness import Server, prompts

from kvswitch.messages import Direction
from kvswitch.transfer import CpuBackend

TINY = str(Path(os.environ["KVSWITCH_MODELS"]) / "tiny")


def serve(server: Server, given: list[list[int]], tokens: int, **more: Any) -> list[Any]:
    """Submit all at once."""
    return [server.submit(f"r{i}", prompt, tokens, **more) for i, prompt in enumerate(given)]


def reference(server: Server, given: list[list[int]], tokens: int) -> list[list[int]]:
    """What comes out when nobody is preempted, a few at a time; then everything is forgotten."""
    found = []
    for first in range(0, len(given), 8):
        requests = serve(server, given[first : first + 8], tokens)
        found += server.run(requests)
        assert all(r.retraction_count == 0 for r in requests)
    assert server.scheduler.flush_cache()
    return found


def remember(server: Server, requests: list[Any], tokens: int) -> Callable[[int], None]:
    """Note K and V of every request when it has come to `tokens` output tokens."""
    server.seen = {}

    def look(number: int) -> None:
        for r in requests:
            if r.kv.holds_kv and len(r.output_ids) >= tokens and r.rid not in server.seen:
                server.seen[r.rid] = server.kv(r, len(r.origin_input_ids) + tokens - 1)

    return look


def forced(page_size: int, overlap: bool, chunk: int | None = None) -> dict[str, Any]:
    """Retract some again and again, with all free pages NaN; tokens and bytes stay the same."""
    server = Server(
        TINY,
        page_size=page_size,
        overlap=overlap,
        **({"chunked_prefill_size": chunk} if chunk else {}),
    )
    given = prompts(8)
    requests = serve(server, given, 60)
    look = remember(server, requests, 40)
    expected = server.run(requests, each=look)
    before, server.seen = server.seen, {}
    assert server.scheduler.flush_cache()

    requests = serve(server, given, 60)
    look = remember(server, requests, 40)

    def each(number: int) -> None:
        if number in (10, 22, 36, 55):
            server.retract([0, 1, 2, 5], poison=True)
            server.check()
        look(number)

    found = server.run(requests, each=each)
    assert found == expected
    worst = 0.0
    same = total = 0
    for rid, kv in before.items():
        again = server.seen[rid]
        assert not torch.isnan(again).any()
        worst = max(worst, float((again - kv).abs().max()))
        same += int((again == kv).flatten(2).all(-1).all(0).sum())
        total += kv.shape[1]
    stats = server.switching.stats()
    result = {
        "retractions": sum(r.retraction_count for r in requests),
        "recomputed": stats.tokens_lost,
        "spared": stats.share_spared,
        "worst": worst,
        "identical": same / total,
        "blocks_per_copy": stats.blocks_in / max(1, stats.copies_in),
        "loaded": stats.blocks_in,
    }
    server.check_idle()
    server.close()
    return result


def exact(page_size: int) -> dict[str, Any]:
    """What is restored is what was there, bit by bit."""
    server = Server(TINY, page_size=page_size)
    requests = serve(server, prompts(6), 40)
    for _ in range(20):
        server.step()
    running = list(server.scheduler.running_batch.reqs)
    before = {r.rid: server.kv(r, r.owned_kv_len()).clone() for r in running}
    server.retract(range(len(running)), poison=True)
    partial = 0
    for _ in range(3):
        server.step()
        if all(r.kv.holds_kv for r in running):
            break
    for r in running:
        kv = before[r.rid]
        partial += kv.shape[1] % page_size != 0
        assert torch.equal(server.kv(r, kv.shape[1]), kv), r.rid
    assert server.switching.stats().tokens_lost == 0
    server.run(requests)
    server.check_idle()
    server.close()
    return {"requests": len(running), "partial": partial}


def wrong_bytes() -> dict[str, Any]:
    """Negative control: other bytes on the host give other tokens."""
    server = Server(TINY)
    given = prompts(4)
    expected = reference(server, given, 40)
    requests = serve(server, given, 40)

    def each(number: int) -> None:
        if number == 12:
            server.retract([0, 1], poison=True)
            host = server.switching._engine.arena.view().view(np.float32)
            host[:] = np.random.default_rng(0).normal(size=host.size)

    found = server.run(requests, each=each)
    return {"same": [a == b for a, b in zip(found, expected, strict=True)]}


def pressure(
    page_size: int, overlap: bool, epoch: int, count: int = 14, tokens: int = 80
) -> dict[str, Any]:
    """Random priorities and too little memory for all; the same tokens as without either."""
    from kvswitch.hooks import make_policy
    from kvswitch.scheduling import RequestPriorities

    server = Server(
        TINY,
        page_size=page_size,
        overlap=overlap,
        max_total_tokens=1024,
        max_running_requests=8,
        enable_priority_scheduling=True,
        retraction_policy="priority",
    )
    given = prompts(count, seed=5)
    expected = reference(server, given, tokens)
    control = server.cache.control
    policy = make_policy("random", seed=epoch, sequences=count, epochs=500)
    control._priorities = RequestPriorities(policy, epoch=epoch, quantum=min(2, epoch - 1))
    control._fixed = False
    stats = server.switching.stats()
    before = (stats.blocks_out, stats.blocks_spared)
    requests = serve(server, given, tokens)
    rng = random.Random(epoch)

    def each(number: int) -> None:
        if rng.random() < 0.1:
            server.poison()
        server.check()

    found = server.run(requests, each=each)
    assert found == expected
    out, spared = stats.blocks_out - before[0], stats.blocks_spared - before[1]
    result = {
        "retractions": sum(r.retraction_count for r in requests),
        "recomputed": server.switching.stats().tokens_lost,
        "spared": spared / max(1, out + spared),
        "passes": server.passes,
        "conflicts": stats.conflicts,
    }
    server.check_idle()
    server.close()
    return result


def preemption_for_memory() -> dict[str, Any]:
    """An important request that does not fit takes memory from others, but not in vain."""
    server = Server(
        TINY,
        max_total_tokens=640,
        max_running_requests=16,
        enable_priority_scheduling=True,
    )
    low = [server.submit(f"low{i}", p, 120, priority=1) for i, p in enumerate(prompts(4, 2))]
    for _ in range(12):
        server.step()
    high = server.submit("high", prompts(1, 3, 200, 201)[0], 60, priority=50)
    for _ in range(3):
        server.step()
    assert high.kv.holds_kv, "it did not get in"
    gone = sum(r.retraction_count for r in low)
    same = server.submit("same", prompts(1, 4, 200, 201)[0], 60, priority=1)
    for _ in range(3):
        server.step()
    again = sum(r.retraction_count for r in low)
    # A priority changed at run time counts from the next pass on.
    server.scheduler.set_request_priority("same", 60)
    for _ in range(3):
        server.step()
    raised = same.kv.holds_kv
    server.run([*low, high, same])
    server.check_idle()
    server.close()
    return {
        "gone": gone,
        "again": again,
        "raised": raised,
        "recomputed": server.switching.stats().tokens_lost,
    }


def preemption_with_a_prefix() -> dict[str, Any]:
    """What the tree has of an important request is not memory that it can have."""
    server = Server(
        TINY,
        max_total_tokens=640,
        max_running_requests=16,
        enable_priority_scheduling=True,
    )
    prefix = prompts(1, 3, 256, 257)[0]
    server.run([server.submit("before", prefix, 2, priority=1)])
    low = [server.submit(f"low{i}", p, 90, priority=1) for i, p in enumerate(prompts(3, 2))]
    for _ in range(12):
        server.step()
    high = server.submit("high", prefix, 60, priority=50)
    for _ in range(3):
        server.step()
    found = {"in": high.kv.holds_kv, "gone": sum(r.retraction_count for r in low)}
    server.run([*low, high])
    server.check_idle()
    server.close()
    return found


def turns(page_size: int) -> dict[str, Any]:
    """The next turn finds the last one on the host, and another request its prefix."""
    server = Server(TINY, page_size=page_size)
    first = prompts(1, 7, 120, 121)[0]
    one = server.submit("one", first, 40)
    (answer,) = server.run([one])
    history = first + answer + prompts(1, 8, 30, 31)[0]
    two = server.submit("fresh", history, 30)
    (expected,) = server.run([two])
    assert server.scheduler.flush_cache()

    one = server.submit("one", first, 40)
    assert server.run([one]) == [answer]
    server.poison()  # evicts all of the tree: what was not on the host is sent now
    before = server.switching.stats().blocks_in
    two = server.submit("two", history, 30)
    assert server.run([two]) == [expected]
    loaded = (server.switching.stats().blocks_in - before) * page_size
    server.poison()
    other = server.submit("other", first + [5] * 20, 10)
    before = server.switching.stats().blocks_in
    server.run([other])
    shared = (server.switching.stats().blocks_in - before) * page_size
    server.poison()
    salted = server.submit("salted", history, 30, extra_key="tenant")
    before = server.switching.stats().blocks_in
    assert server.run([salted]) == [expected]
    foreign = server.switching.stats().blocks_in - before
    same = server.submit("two", prompts(1, 31, 100, 101)[0], 30)  # an id that comes again
    before = server.switching.stats().blocks_in
    server.run([same])
    assert server.switching.stats().blocks_in == before
    assert server.scheduler.flush_cache()
    after = server.submit("after", history, 30)
    before = server.switching.stats().blocks_in
    assert server.run([after]) == [expected]
    flushed = server.switching.stats().blocks_in - before
    server.check_idle()
    server.close()
    return {
        "loaded": loaded,
        "history": len(first) + len(answer),
        "shared": shared,
        "prefix": len(first),
        "foreign": foreign,
        "flushed": flushed,
    }


def aborts() -> dict[str, Any]:
    """Abort while running, waiting, retracted, and loading; nothing is left of anybody."""
    server = Server(TINY, max_total_tokens=1024, enable_priority_scheduling=True)
    rng = random.Random(3)
    given = prompts(24, 9)
    aborted = 0
    live: list[Any] = []
    for number in range(260):
        if given and number % 6 == 0:
            live.append(server.submit(f"a{number:06d}", given.pop(), 40, priority=rng.randrange(5)))
        if number % 11 == 5:
            server.retract([0, 1])
        if number % 7 == 3 and live:
            victim = live.pop(rng.randrange(len(live)))
            if not victim.finished():
                server.abort(victim.rid)
                aborted += 1
        server.step()
        server.check()
    server.run([r for r in live if r in server.scheduler.waiting_queue or r.kv.holds_kv])
    server.check_idle()
    server.close()
    return {"aborted": aborted}


class FaultyBackend(CpuBackend):
    """Fails windows by chance."""

    def __init__(self, seed: int, rates: dict[Direction, float]) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.rates = rates
        self.failed = 0

    def open_queue(self, direction: Direction) -> Any:
        queue = super().open_queue(direction)
        copy = queue.copy

        def faulty(*args: Any) -> None:
            if self.rng.random() < self.rates[direction]:
                self.failed += 1
                raise ValueError("this window did not make it")
            copy(*args)

        queue.copy = faulty
        return queue


def faults(overlap: bool, out: float, back: float, chunk: int | None = None) -> dict[str, Any]:
    """Copies fail in both directions: no more than recomputation is lost."""
    import kvswitch_sglang.switching as module

    backend = FaultyBackend(1, dict.fromkeys(Direction, 0.0))
    module.make_backend = lambda *args, **kwargs: backend
    server = Server(TINY, overlap=overlap, **({"chunked_prefill_size": chunk} if chunk else {}))
    given = prompts(8, 11)
    expected = reference(server, given, 60)
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
    expected = reference(server, given, 60)
    requests = serve(server, given, 60)

    def each(number: int) -> None:
        if number in (10, 25, 40):
            server.retract([0, 1, 2, 3], poison=True)

    assert server.run(requests, each=each) == expected
    stats = server.switching.stats()
    server.check_idle()
    server.close()
    return {"recomputed": stats.tokens_lost, "loaded": stats.blocks_in}


def refused(**arguments: Any) -> dict[str, Any]:
    """Building must fail; with what."""
    try:
        Server(TINY, **arguments)
    except Exception as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return {"kind": "", "message": ""}


def known() -> dict[str, Any]:
    """The installed SGLang must be as it is expected."""
    from kvswitch_sglang import checks

    checks.check_version()
    checks.check_names()
    return {"kind": ""}


def layers() -> dict[str, Any]:
    """A forward begins before its load has ended, and waits layer by layer."""
    import kvswitch_sglang.switching as module

    backend = CpuBackend(bandwidth=2e7)
    module.make_backend = lambda *args, **kwargs: backend
    server = Server(TINY)
    given = prompts(2, 13, 600, 601)
    expected = reference(server, given, 20)
    requests = serve(server, given, 20)
    asked: list[tuple[int, int]] = []
    switching = server.switching
    original = switching.wait_layer

    def wait_layer(layer: int) -> None:
        loads = switching._loads
        original(layer)
        ledger = switching._engine._ledger
        if loads:
            asked.append((layer, sum(i in ledger.under_way for i in loads)))

    server.scheduler.token_to_kv_pool_allocator.get_kvcache().layer_transfer_counter.wait_until = (
        wait_layer
    )

    def each(number: int) -> None:
        if number == 8:
            server.retract([0, 1], poison=True)

    assert server.run(requests, each=each) == expected
    stats = switching.stats()
    server.close()
    return {
        "first": sum(under_way for layer, under_way in asked if layer == 0),
        "asked": len(asked),
        "recomputed": stats.tokens_lost,
        "blocks_per_copy": stats.blocks_in / max(1, stats.copies_in),
    }


def soak(
    seconds: float, seed: int = 0, overlap: bool = True, page_size: int = 16
) -> dict[str, Any]:
    """Everything at once for a while: traffic, priorities, aborts, retractions, faults."""
    import time

    import kvswitch_sglang.switching as module

    rng = random.Random(seed)
    backend = FaultyBackend(seed, {Direction.OUT: 0.02, Direction.IN: 0.02})
    module.make_backend = lambda *args, **kwargs: backend
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
    expected = reference(server, given, 40)
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
    return {"done": done, "failed": backend.failed, "passes": server.passes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # SGLang's own threads and sockets need not be waited for

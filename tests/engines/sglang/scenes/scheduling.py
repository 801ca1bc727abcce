"""Who runs."""

from __future__ import annotations

import random
from typing import Any

from harness import Server, prompts

import kvswitch_sglang.switching
from kvswitch.transfer import CpuBackend
from scenes.common import TINY, Seen, compare, reference, remember, serve


def pressure(
    page_size: int,
    overlap: bool,
    count: int = 14,
    tokens: int = 80,
    bandwidth: float | None = None,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A policy changes priorities, and there is too little memory for all; the same tokens.

    Parameters
    ----------
    bandwidth : float or None
        Bytes a second of a slow link, on which copies are still under way when their pages are
        written again. None: free pages are filled with NaN now and then, which ends all copies.
    arguments : dict, optional
        More of SGLang's.
    """
    if bandwidth is not None:
        slow = CpuBackend(bandwidth=bandwidth)
        kvswitch_sglang.switching.make_backend = lambda *args, **kwargs: slow
    server = Server(
        TINY,
        page_size=page_size,
        overlap=overlap,
        max_total_tokens=1024,
        max_running_requests=8,
        enable_priority_scheduling=True,
        retraction_policy="priority",
        **(arguments or {}),
    )
    given = prompts(count, seed=5)
    expected, before = reference(server, given, tokens, together=4, look=60)
    stats = server.switching.stats()
    conflicts = stats.conflicts
    requests = serve(server, given, tokens)
    rng = random.Random(count)
    after: Seen = {}
    look = remember(server, requests, 60, after)
    priorities: dict[str, set[int]] = {r.rid: set() for r in requests}

    def each(number: int) -> None:
        if bandwidth is None and rng.random() < 0.1:
            server.poison()
        server.check()
        look(number)
        for r in requests:
            priorities[r.rid].add(r.priority)

    found = server.run(requests, each=each)
    assert found == expected
    stats = server.switching.stats()
    result = {
        "retractions": sum(r.retraction_count for r in requests),
        "recomputed": stats.tokens_lost,
        "conflicts": stats.conflicts - conflicts,
        "changed": sum(len(seen) > 2 for seen in priorities.values()),
        **compare(before, after),
    }
    server.check_idle()
    server.close()
    return result


def passes_until_in(
    low: int, high: int, arguments: dict[str, Any] | None = None, beside: int = 0, prompt: int = 40
) -> dict[str, Any]:
    """Somebody runs, and somebody else comes: how many passes that one waits, and who left.

    Parameters
    ----------
    low, high : int
        The priorities of the one who runs and the one who comes.
    arguments : dict, optional
        SGLang's; there is one slot unless they say otherwise.
    beside, prompt : int
        Prompt tokens of a third one, as important as the one who comes, who runs (0: there is
        none), and of the one who comes. All have room for 640 tokens.
    """
    server = Server(
        TINY,
        max_total_tokens=640,
        **{"max_running_requests": 1, "enable_priority_scheduling": True, **(arguments or {})},
    )
    running = [server.submit("one", prompts(1, 2)[0], 60, priority=low)]
    if beside:
        third = prompts(1, 4, beside, beside + 1)[0]
        running.append(server.submit("three", third, 60, priority=high))
    for _ in range(2):
        server.step()
    two = server.submit("two", prompts(1, 3, prompt, prompt + 1)[0], 20, priority=high)
    waited = -1  # longer than we look
    for number in range(14):
        server.step()
        server.check()
        if two.kv.holds_kv:
            waited = number + 1
            break
    left = sum(r.retraction_count for r in running)
    server.run([*running, two])
    server.check_idle()
    server.close()
    return {"waited": waited, "left": left, "recomputed": server.switching.stats().tokens_lost}


def raised_by_ageing() -> dict[str, Any]:
    """Somebody important comes again and again; who waits gets in all the same."""
    server = Server(TINY, max_running_requests=1, enable_priority_scheduling=True)
    given = prompts(40, 6, 20, 30)
    low = server.submit("low", given.pop(), 10, priority=0)
    high: list[Any] = []
    waited = -1
    for number in range(120):
        if sum(not r.finished() for r in high) < 3 and given:
            high.append(server.submit(f"high{number}", given.pop(), 10, priority=3))
        server.step()
        server.check()
        if low.kv.holds_kv:
            waited = number + 1
            break
    server.run([low, *high])
    server.check_idle()
    server.close()
    return {"waited": waited}


def preemption_for_memory() -> dict[str, Any]:
    """An important request that does not fit takes memory from others, but not in vain."""
    server = Server(
        TINY,
        max_total_tokens=640,
        max_running_requests=16,
        enable_priority_scheduling=True,
    )
    given = [*prompts(4, 2), *prompts(1, 3, 200, 201), *prompts(1, 4, 200, 201)]
    expected, _ = reference(server, given, 120, together=1)
    low = [server.submit(f"low{i}", p, 120, priority=1) for i, p in enumerate(given[:4])]
    for _ in range(12):
        server.step()
    high = server.submit("high", given[4], 60, priority=50)
    for _ in range(3):
        server.step()
    assert high.kv.holds_kv, "it did not get in"
    gone = sum(r.retraction_count for r in low)
    same = server.submit("same", given[5], 60, priority=1)
    for _ in range(3):
        server.step()
    again = sum(r.retraction_count for r in low)
    # A priority changed at run time counts from the next pass on.
    server.scheduler.set_request_priority("same", 60)
    for _ in range(3):
        server.step()
    raised = same.kv.holds_kv
    found = server.run([*low, high, same])
    assert found == [tokens[:n] for tokens, n in zip(expected, [120] * 4 + [60] * 2, strict=True)]
    server.check_idle()
    server.close()
    return {
        "gone": gone,
        "again": again,
        "raised": raised,
        "recomputed": server.switching.stats().tokens_lost,
    }


def last_token_under_way() -> dict[str, Any]:
    """An important one comes when one of two that run has its last token under way."""
    server = Server(TINY, overlap=True, max_running_requests=2, enable_priority_scheduling=True)
    given = prompts(3, 23)
    expected, _ = reference(server, given, 30, together=2)
    ending = server.submit("ending", given[0], 15, priority=1)
    going_on = server.submit("going on", given[1], 30, priority=0)
    while len(ending.output_ids) < 14:
        server.step()
    assert ending in server.scheduler.last_batch.reqs
    came = server.submit("came", given[2], 30, priority=5)
    passes = 0
    while not came.kv.holds_kv:
        server.step()
        passes += 1
    found = server.run([ending, going_on, came])
    server.check_idle()
    server.close()
    return {
        "same": found == [expected[0][:15], *expected[1:]],
        "passes": passes,
        "preempted": going_on.retraction_count,
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


def sessions() -> dict[str, Any]:
    """A streaming session keeps its row and its KV: it is not preempted, and leaves nothing."""
    from sglang.srt.managers.io_struct import (
        CloseSessionReqInput,
        OpenSessionReqInput,
        SessionParams,
    )

    server = Server(
        TINY,
        max_total_tokens=640,
        enable_priority_scheduling=True,
        enable_streaming_session=True,
    )
    scheduler = server.scheduler
    scheduler.open_session(
        OpenSessionReqInput(capacity_of_str_len=10000, session_id="s", streaming=True)
    )
    turns = []
    for number, prompt in enumerate(prompts(3, 2, 60, 80)):
        turn = server.submit(
            f"turn{number}", prompt, 40, priority=1, session_params=SessionParams(id="s")
        )
        server.run([turn])
        turns.append(turn)
    kept = len(server.cache.control._owners)
    last = server.submit(
        "last", prompts(1, 4)[0], 30, priority=1, session_params=SessionParams(id="s")
    )
    for _ in range(3):
        server.step()
    high = server.submit("high", prompts(1, 3, 320, 321)[0], 40, priority=9)
    for _ in range(5):
        server.step()
    found = {"kept": kept, "in": high.kv.holds_kv, "left": last.retraction_count}
    while not last.finished():
        server.step()
    scheduler.close_session(CloseSessionReqInput(session_id="s"))
    server.run([high])
    server.check_idle()
    server.close()
    return found


def little_queue() -> dict[str, Any]:
    """Who has run before does not count as one too many in the queue."""
    server = Server(
        TINY, max_total_tokens=640, enable_priority_scheduling=True, max_queued_requests=1
    )
    low = []
    for i, prompt in enumerate(prompts(4, 2, 60, 80)):
        low.append(server.submit(f"low{i}", prompt, 60, priority=1))
        server.step()
    high = server.submit("high", prompts(1, 3, 400, 401)[0], 60, priority=9)
    found = server.run([*low, high])
    left = sum(r.retraction_count > 0 for r in low)
    server.check_idle()
    server.close()
    return {"left": left, "tokens": [len(tokens) for tokens in found]}

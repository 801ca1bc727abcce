"""What leaves and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Server, prompts

from kvswitch.transfer import CpuBackend
from kvswitch_sglang.control import owner_of
from scenes.common import TINY, Seen, compare, know_pages_late, reference, remember, serve


def forced(page_size: int, overlap: bool, late: bool = False) -> dict[str, Any]:
    """Retract some again and again, with all free pages NaN; tokens and bytes stay the same."""
    server = Server(TINY, page_size=page_size, overlap=overlap, check=not late)
    if late:
        know_pages_late(server)
    given = prompts(8)
    expected, before = reference(server, given, 60, look=40)
    requests = serve(server, given, 60)
    after: Seen = {}
    look = remember(server, requests, 40, after)

    def each(number: int) -> None:
        if number in (10, 22, 36, 55):
            server.retract([0, 1, 2, 5], poison=True)
            server.check()
        look(number)

    found = server.run(requests, each=each)
    assert found == expected
    stats = server.switching.stats()
    result = {
        "retractions": sum(r.retraction_count for r in requests),
        "recomputed": stats.tokens_lost,
        "spared": stats.share_spared,
        "loaded": stats.blocks_in,
        **compare(before, after),
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
    expected, _ = reference(server, given, 40)
    requests = serve(server, given, 40)

    def each(number: int) -> None:
        if number == 12:
            server.retract([0, 1], poison=True)
            host = server.switching._engine.arena.view().view(np.float32)
            host[:] = np.random.default_rng(0).normal(size=host.size)

    found = server.run(requests, each=each)
    return {"same": [a == b for a, b in zip(found, expected, strict=True)]}


def known_late() -> dict[str, Any]:
    """Two turns end. One is sent when its pages are known; the other was flushed before that."""
    server = Server(TINY, check=False)  # which would wait for all pages
    know_pages_late(server)
    allocator = server.scheduler.token_to_kv_pool_allocator

    def turn(name: str, prompt: list[int]) -> Any:
        req = server.submit(name, prompt, 10)
        while not req.finished():
            server.step()
        server.step()  # SGLang puts it away
        assert allocator._staged
        return req

    def rest() -> int:
        for _ in range(8):
            server.step()
        server.switching.settle()
        return int(server.switching.stats().idle_copies)

    one, other = prompts(2, 29, 100, 101)
    turn("sent", one)
    sent = rest()
    req = turn("flushed", other)
    keys = server.cache._keys_of(req, req.full_untruncated_fill_ids, 6)
    server.cache._keys.forget(owner_of(req))
    server.cache.reset()
    pending = len(allocator._staged) + len(server.switching.planner._idle)
    assert server.scheduler.flush_cache()
    flushed = rest() - sent
    found = server.switching.reach("another", keys)
    server.check_idle()
    server.close()
    return {"sent": sent, "pending": pending, "flushed": flushed, "found": found}


def ahead() -> dict[str, Any]:
    """Prompts one after another, and a full tree: how many passes had to evict for themselves."""
    server = Server(TINY)
    given = prompts(24, 17, 200, 210)
    allocator = server.scheduler.token_to_kv_pool_allocator
    evict, short = allocator.evict_to_free_tokens, []

    def evict_to_free_tokens(cache: Any, tokens: int) -> Any:
        if allocator.batch is not None:
            short.append(tokens > allocator.available_size())
        return evict(cache, tokens)

    allocator.evict_to_free_tokens = evict_to_free_tokens
    expected, _ = reference(server, given, 4, together=1)
    without = sum(short)
    short.clear()
    know_pages_late(server)
    found = [server.run(serve(server, [prompt], 4, 100 + i))[0] for i, prompt in enumerate(given)]
    server.check_idle()
    server.close()
    return {"same": found == expected, "without": without, "short": sum(short)}


def layers() -> dict[str, Any]:
    """A forward begins before its load has ended, and waits layer by layer."""
    import kvswitch_sglang.switching as module

    backend = CpuBackend(bandwidth=4e6)
    module.make_backend = lambda *args, **kwargs: backend
    server = Server(TINY)
    given = prompts(2, 13, 600, 601)
    expected, _ = reference(server, given, 20)
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


def room() -> dict[str, Any]:
    """Contexts come back to memory that is full of short turns that have ended."""
    server = Server(TINY, max_total_tokens=1024)
    allocator = server.cache._allocator
    take, pages = allocator.alloc_for, allocator.pages
    loads: list[dict[str, int]] = []

    def alloc_for(owner: Any, count: int) -> Any:
        loads.append(
            {
                "count": count,
                "largest": pages._groups.groups().largest,
                "free": pages.available,
                "evictable": server.cache.evictable_size() // server.scheduler.page_size,
            }
        )
        return take(owner, count)

    allocator.alloc_for = alloc_for
    chats = prompts(6, 9, 170, 171)
    first = server.run(serve(server, chats, 4))
    asked = [chat + answer + [7] for chat, answer in zip(chats, first, strict=True)]
    expected, _ = reference(server, asked, 6)
    for chat in chats:
        server.run([server.submit("again", chat, 4)])
    short = prompts(60, 11, 20, 60)
    requests = serve(server, prompts(5, 12, 20, 40), 90, 10)
    second: list[Any] = []

    def each(number: int) -> None:
        server.switching.settle()  # how long a copy takes decides nothing
        if number < len(short):
            server.submit(f"s{number}", short[number], 2)
        elif number % 5 == 0 and len(second) < len(asked):
            second.append(server.submit(f"c{number}", asked[len(second)], 6))

    before = server.switching.stats()
    loaded, copies = before.blocks_in, before.copies_in
    server.run(requests, each=each)
    assert server.run(second) == expected
    after = server.switching.stats()
    server.check_idle()
    server.close()
    return {
        "loads": loads,
        "per_copy": (after.blocks_in - loaded) / (after.copies_in - copies),
        "passes": allocator._pass,
    }


def frequent() -> dict[str, Any]:
    """Everybody is retracted every third pass."""
    server = Server(TINY, max_total_tokens=4096)
    given = prompts(4, 17, 600, 700)
    expected, _ = reference(server, given, 60)
    requests = serve(server, given, 60)

    def each(number: int) -> None:
        if number % 3 == 2:
            server.retract(range(4), poison=True)
            server.check()

    assert server.run(requests, each=each) == expected
    stats = server.switching.stats()
    server.check_idle()
    server.close()
    return {
        "retractions": sum(r.retraction_count for r in requests),
        "spared": stats.share_spared,
        "per_copy": stats.blocks_in / stats.copies_in,
        "recomputed": stats.tokens_lost,
    }


def full_host() -> dict[str, Any]:
    """A chat goes on when host memory has no room for what has to leave the device for it."""
    server = Server(TINY, max_total_tokens=512)
    chat = prompts(1, 21, 126, 127)[0]
    (answer,) = server.run([server.submit("chat", chat, 4)])
    history = chat + answer + [7] * 10
    (expected,) = server.run([server.submit("fresh", history, 10)])
    assert server.scheduler.flush_cache()
    server.run([server.submit("chat", chat, 4)])
    server.poison()
    other = server.submit("other", prompts(1, 22, 400, 401)[0], 4)
    while not other.finished():
        server.step()
    before = server.switching.stats().blocks_in
    assert server.run([server.submit("next", history, 10)]) == [expected]
    server.check_idle()
    server.close()
    return {"loaded": server.switching.stats().blocks_in - before}


def turns(page_size: int, idle: bool = True, late: bool = False) -> dict[str, Any]:
    """The next turn finds the last one on the host, and another request its prefix.

    What has ended is sent when there is nothing else to do (`idle`), or when its pages are needed.
    """
    server = Server(TINY, page_size=page_size, check=not late)
    if late:
        know_pages_late(server)
    first = prompts(1, 7, 120, 121)[0]
    one = server.submit("one", first, 40)
    (answer,) = server.run([one])
    history = first + answer + prompts(1, 8, 30, 31)[0]
    two = server.submit("fresh", history, 30)
    (expected,) = server.run([two])
    assert server.scheduler.flush_cache()

    copies = server.switching.stats().idle_copies
    one = server.submit("one", first, 40)
    if idle:
        assert server.run([one]) == [answer]
    while not one.finished():
        server.step()
    copies = server.switching.stats().idle_copies - copies
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
        "idle_copies": copies,
    }


def adapters(folder: str) -> dict[str, Any]:
    """LoRA: the same prompt comes from the host for the adapter that computed it, and no other."""
    from sglang_plain_cpu.lora import install
    from weights import write_adapter

    install()
    names = ("a1", "a2")
    for seed, name in enumerate(names):
        write_adapter(Path(folder, name), seed)
    server = Server(
        TINY,
        lora_paths={name: str(Path(folder, name)) for name in names},
        max_loras_per_batch=3,
        lora_backend="torch_native",
    )
    manager = server.scheduler.tp_worker.model_runner.lora_manager
    ids = {ref.lora_name: ref.lora_id for ref in manager.lora_refs.values()}
    assert set(ids) == set(names)
    prompt = prompts(1, 5, 150, 151)[0]
    number = 0

    def ask(who: str | None, **more: Any) -> tuple[list[int], int]:
        nonlocal number
        number += 1
        server.poison()
        before = server.switching.stats().blocks_in
        lora = None if who is None else ids[who]
        (tokens,) = server.run([server.submit(f"q{number}", prompt, 30, lora_id=lora, **more)])
        return tokens, server.switching.stats().blocks_in - before

    answers = {who: ask(who) for who in ("a1", "a2", None)}
    again = {who: ask(who) for who in ("a1", "a2", None)}
    assert [again[who][0] for who in answers] == [tokens for tokens, _ in answers.values()]
    # Who gives an adapter's id as a key of its own is somebody else all the same: not so for
    # SGLang's tree, which is emptied therefore.
    _, confused = ask(None, extra_key=ids["a1"])
    assert server.scheduler.flush_cache()

    together = [None, "a1", "a2"] * 2
    requests = [
        server.submit(f"t{i}", prompt, 30, lora_id=None if who is None else ids[who])
        for i, who in enumerate(together)
    ]

    def retract(number: int) -> None:
        if number in (8, 20):
            server.retract([0, 1, 2, 4], poison=True)

    assert server.run(requests, each=retract) == [answers[who][0] for who in together]
    server.check_idle()
    server.close()
    return {
        "answers": len({tuple(tokens) for tokens, _ in answers.values()}),
        "foreign": sum(loaded for _, loaded in answers.values()),
        "own": min(loaded for _, loaded in again.values()),
        "confused": confused,
        "retractions": sum(r.retraction_count for r in requests),
    }

"""Block groups in vLLM's own cache manager, without a model: runs, prefix-cache hits, time."""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvswitch_vllm.block_pool import GroupQueue, VllmPool, install_groups
from kvswitch_vllm.planning import CACHE_SHARE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request

TOKENS = 16


def make_manager(
    blocks: int, *, caching: bool = True, groups: bool = True, headroom: float = 0.06 / CACHE_SHARE
) -> Any:
    init_none_hash(sha256)
    spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=2, head_size=64, dtype=torch.float16)
    config = KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    manager = KVCacheManager(
        config,
        max_model_len=8192,
        scheduler_block_size=TOKENS,
        hash_block_size=TOKENS,
        enable_caching=caching,
    )
    if groups:
        manager.groups = install_groups(manager, first_group=60, headroom=headroom)
    return manager


def make_request(name: str, tokens: list[int]) -> Any:
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        block_hasher=get_request_block_hasher(TOKENS, sha256),
    )


class Chats:
    """Conversations that come back turn by turn, several growing at once, under pressure."""

    def __init__(self, manager: Any, chats: int, seed: int = 0, reserve: int = 0) -> None:
        self.manager = manager
        self.rng = random.Random(seed)
        self.history = [self.random_tokens(200) for _ in range(chats)]
        self.running: deque[tuple[int, Any, int]] = deque()  # chat, request, tokens to come
        self.hits = self.asked = self.turns = 0
        self.runs: list[float] = []
        self.reserve = reserve

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(30_000) for _ in range(count)]

    def admit(self) -> bool:
        busy = {chat for chat, *_ in self.running}
        idle = [c for c in range(len(self.history)) if c not in busy]
        if not idle:
            return False
        chat = self.rng.choice(idle)
        if len(self.history[chat]) > 2000:
            self.history[chat] = self.random_tokens(200)
        request = make_request(f"t{self.turns}", self.history[chat] + self.random_tokens(60))
        found, hits, *_ = self.manager.get_computed_blocks(request)
        free = self.manager.block_pool.get_num_free_blocks()
        if free < self.reserve + -(-request.num_tokens // TOKENS):
            return False
        new = self.manager.allocate_slots(
            request, request.num_tokens - hits, num_new_computed_tokens=hits,
            new_computed_blocks=found,
        )  # fmt: skip
        if new is None:
            return False
        self.turns += 1
        self.hits += hits
        self.asked += request.num_tokens
        request.num_computed_tokens = request.num_tokens
        self.running.append((chat, request, self.rng.randint(40, 300)))
        return True

    def step(self) -> None:
        """Everybody grows by a few tokens; who is done makes room for another turn."""
        for _ in range(len(self.running)):
            chat, request, left = self.running.popleft()
            count = min(left, 8)
            request.append_output_token_ids(self.random_tokens(count))
            if self.manager.allocate_slots(request, count) is None:
                left = count  # vLLM would preempt: end it here
            else:
                request.num_computed_tokens += count
            if left > count:
                self.running.append((chat, request, left - count))
                continue
            (ids,) = self.manager.get_block_ids(request.request_id)
            self.runs.append(len(ids) / (1 + np.count_nonzero(np.diff(ids) != 1)))
            self.history[chat] = list(request.all_token_ids)
            self.manager.free(request)
        while len(self.running) < 24 and self.admit():
            pass

    def run(self, steps: int) -> Chats:
        for _ in range(steps):
            self.step()
        return self


@pytest.mark.parametrize("caching", [True, False])
def test_runs_are_long_and_books_in_order(caching: bool) -> None:
    """At 6% headroom a whole context lies in few runs; vLLM's own queue scatters it."""
    manager = make_manager(2048, caching=caching)
    chats = Chats(manager, 48, reserve=int(2048 * 0.06)).run(250)
    stock = Chats(make_manager(2048, caching=caching, groups=False), 48, reserve=122).run(250)
    manager.groups.check_integrity()
    half = len(chats.runs) // 2
    assert np.mean(chats.runs[half:]) >= 8
    assert np.mean(stock.runs[len(stock.runs) // 2 :]) < 3


def test_prefix_cache_hits_as_often() -> None:
    """Within two points of vLLM's own queue."""
    rates = []
    for groups in (True, False):
        chats = Chats(make_manager(2048, groups=groups), 48, reserve=122).run(400)
        rates.append(chats.hits / chats.asked)
    assert rates[0] > rates[1] - 0.02


@pytest.mark.parametrize("seed", range(5))
def test_free_blocks_are_said_truly(seed: int) -> None:
    """Under all operations, a reset in between, vLLM and the groups count the same."""
    manager = make_manager(300)
    chats = Chats(manager, 16, seed=seed)
    for _ in range(60):
        chats.step()
        manager.groups.check_integrity()
    for _, request, _ in chats.running:
        manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == 299
    assert manager.reset_prefix_cache()
    manager.groups.forget_content()
    manager.groups.check_integrity()


def test_hit_in_room_reserved_for_another() -> None:
    """Content that was given up, but not yet overwritten, is hit where another wants to grow."""
    manager = make_manager(65)
    tokens = list(range(40 * TOKENS))
    first = make_request("a", tokens)
    manager.allocate_slots(first, len(tokens))
    manager.free(first)
    second = make_request("b", [7] * (30 * TOKENS))
    manager.allocate_slots(second, second.num_tokens)  # takes free ones, and cached ones
    again = make_request("c", tokens)
    found, hits, *_ = manager.get_computed_blocks(again)
    assert hits
    manager.allocate_slots(again, 10, num_new_computed_tokens=hits, new_computed_blocks=found)
    manager.groups.check_integrity()


def test_what_a_copy_holds_is_booked_to_nobody() -> None:
    manager = make_manager(64)
    ended, other = (make_request(name, [i] * 3 * TOKENS) for i, name in enumerate("ab"))
    for request in (ended, other):
        manager.allocate_slots(request, request.num_tokens)
        request.num_computed_tokens = request.num_tokens
    (ids,) = manager.get_block_ids("a")
    manager.free(ended)
    pool = VllmPool(manager.block_pool)
    assert pool.keep(ids, ended.block_hashes) == 3
    other.append_output_token_ids([9] * TOKENS)
    manager.allocate_slots(other, TOKENS)
    (mine,) = manager.get_block_ids("b")
    assert manager.groups._groups.table("b").tolist() == mine
    pool.release(ids)
    manager.groups.check_integrity()


def test_what_the_host_has_too_is_given_out_first() -> None:
    """Of two free contexts the younger one goes, if its content is on the host; and can be hit."""
    manager = make_manager(65, headroom=0.0)
    older, younger = (make_request(name, [i] * (20 * TOKENS + 5)) for i, name in enumerate("ab"))
    for request in (older, younger):
        manager.allocate_slots(request, request.num_tokens)
    (ids,) = manager.get_block_ids("b")
    manager.free(older)
    with manager.groups.copied(ids):
        manager.free(younger)
    assert manager.get_computed_blocks(younger)[1] == 20 * TOKENS, "until they are overwritten"
    another = make_request("c", [8] * 40 * TOKENS)
    manager.allocate_slots(another, another.num_tokens)
    assert set(ids) & set(manager.get_block_ids("c")[0])
    assert manager.get_computed_blocks(older)[1] == 20 * TOKENS
    assert manager.get_computed_blocks(younger)[1] == 0
    manager.groups.check_integrity()


def test_what_others_use_is_no_more_free_because_the_host_has_it() -> None:
    """A shared prefix, of which one request leaves, and ends later in the usual order."""
    manager = make_manager(65, headroom=0.0)
    prefix = [1] * 20 * TOKENS
    leaving, staying = make_request("a", prefix + [2] * 20), make_request("b", prefix + [3] * 20)
    for request in (leaving, staying):
        found, hits, *_ = manager.get_computed_blocks(request)
        manager.allocate_slots(
            request, request.num_tokens - hits, num_new_computed_tokens=hits,
            new_computed_blocks=found,
        )  # fmt: skip
    (ids,) = manager.get_block_ids("a")
    with manager.groups.copied(ids):
        manager.free(leaving)
    manager.free(staying)
    assert manager.groups._groups.groups().cached == 21, "the prefix and a full block behind it"


def test_queue_needs_what_it_replaces() -> None:
    manager = make_manager(64, groups=False)
    manager.coordinator.single_type_managers[0].pop_blocks_for_free = None
    before = manager.block_pool.free_block_queue
    with pytest.raises(AttributeError, match="pop_blocks_for_free"):
        install_groups(manager, first_group=60, headroom=0.0)
    assert manager.block_pool.free_block_queue is before
    assert not isinstance(before, GroupQueue)


@pytest.mark.parametrize("groups", [False, True], ids=["stock", "groups"])
def test_bench_allocation(benchmark: Any, groups: bool) -> None:
    """Multi-turn churn through `allocate_slots` and `free`; to be read against each other."""
    chats = Chats(make_manager(2048, groups=groups), 48, reserve=122).run(50)
    inside = timed(chats.manager)
    benchmark.pedantic(chats.run, args=(20,), rounds=5)
    benchmark.extra_info["seconds inside the manager"] = inside()


def timed(manager: Any) -> Callable[[], float]:
    """Seconds spent in `allocate_slots` and `free` from now on."""
    import time

    spent = 0.0
    for name in ("allocate_slots", "free"):
        call = getattr(manager, name)

        def measure(*args: Any, call: Any = call, **kwargs: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent += time.perf_counter() - started

        setattr(manager, name, measure)
    return lambda: spent

"""Preemption by priority for vLLM's schedulers, and KV caches saved when it comes to it.

vLLM itself preempts only when a running request cannot grow. Here a waiting request of higher
priority takes memory and slots from running ones of lower priority, as far as these are not in
their quantum. Everything else is vLLM's scheduler, synchronous or asynchronous.
"""

from __future__ import annotations

import functools
import heapq
import inspect
import time
from collections import Counter
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import PriorityRequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from kvswitch.errors import ConfigError
from kvswitch_vllm.connector import KVSwitchConnector
from kvswitch_vllm.priorities import Priorities
from kvswitch_vllm.switching import Candidates, choose

__all__ = ["AsyncSwitchScheduler", "SwitchScheduler", "make_scheduler"]

log = init_logger("vllm.kvswitch")

_MOST = 64  # waiting requests that are looked at in one iteration


_Scheduler: Any = object  # one of vLLM's schedulers, whichever this is mixed into


class SwitchMixin(_Scheduler):
    """Mixed into vLLM's scheduler classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.connector, KVSwitchConnector) or self.connector.planning is None:
            raise ConfigError("kvswitch's scheduler needs kvswitch's KV connector beside it")
        self._planning = self.connector.planning
        self._planning.attach_scheduler(self)
        self._priorities = Priorities(self._planning.settings)
        # What vLLM leaves free beside whoever it admits.
        self._headroom = int(getattr(self.kv_cache_manager, "watermark_blocks", 0))
        # Tokens of a request in one iteration.
        self._longest_chunk = (
            self.scheduler_config.long_prefill_token_threshold or self.max_num_scheduled_tokens
        )
        self._scheduling = False
        self._in_before: set[str] = set()
        self._copied: set[int] = set()  # in `deferred_frees`, and the host has their content
        manager = self.kv_cache_manager
        manager.allocate_slots = _landed_without_headroom(manager.allocate_slots)

    # -- what vLLM calls -------------------------------------------------------------------------

    def add_request(self, request: Any) -> None:
        """Set the priority before it is queued."""
        if request.request_id not in self.requests:
            self._priorities.add(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Switch by priority, then schedule as ever."""
        started = perf_counter()
        self._begin_iteration()
        self._planning.overhead_seconds += perf_counter() - started
        self._scheduling = True
        # Loads have slots that vLLM does not know of; it would ask all that wait, one by one.
        slots = getattr(self, "max_num_active_reqs", None)
        if slots is not None:
            self.max_num_active_reqs = slots - len(self._planning.loading)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self._scheduling = False
            if slots is not None:
                self.max_num_active_reqs = slots

    def _begin_iteration(self) -> None:
        for request in self.running:
            if request.request_id not in self._in_before:
                self._priorities.entered(request.request_id)
        if self._priorities.begin(self.running, self.requests.values()):
            self._reorder()
            for request in self.requests.values():
                self._planning.planner.set_priority(request.request_id, -request.priority)
        if self.waiting:
            self._switch()
        self._let_grow()
        self._in_before = {request.request_id for request in self.running}

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        started = perf_counter()
        # In the midst of scheduling, vLLM needs the blocks at once: the forward will wait.
        copied = self._planning.preempted(request, hold=not self._scheduling)
        self._planning.overhead_seconds += perf_counter() - started
        with self._planning.freeing(copied):
            super()._preempt_request(request, *args, **kwargs)
        self._copied.update(copied)
        self._note_deferred()

    def _drain_deferred_frees(self) -> None:
        with self._planning.freeing(self._copied):
            super()._drain_deferred_frees()
        self._note_deferred()

    def _note_deferred(self) -> None:
        if self._copied:
            self._copied.intersection_update(block.block_id for block in self._deferred())

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._priorities.remove(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    # -- priorities ------------------------------------------------------------------------------

    def set_request_priority(self, name: str, priority: float) -> int:
        """Change a request's priority; a lower number is more important, as everywhere in vLLM.

        Parameters
        ----------
        name : str
            Its id. The engine's own ids have a random suffix, which may be left out.

        Returns
        -------
        int
            Number of requests that it was changed for.
        """
        found = [
            request
            for one, request in self.requests.items()
            if (one == name or one.rpartition("-")[0] == name) and not request.is_finished()
        ]
        for request in found:
            self._priorities.set_base(request, priority)
            self._planning.planner.set_priority(request.request_id, -request.priority)
        self._reorder()
        return len(found)

    def _reorder(self) -> None:
        for queue in (self.waiting, getattr(self, "kv_holding_waiting", None)):
            if isinstance(queue, PriorityRequestQueue):
                heapq.heapify(queue._heap)

    # -- switching -------------------------------------------------------------------------------

    def _switch(self) -> None:
        """Preempt for waiting requests that are more important than running ones."""
        running = [request for request in self.running if not _is_leaving(request)]
        if not running or not isinstance(self.waiting, PriorityRequestQueue):
            return
        if self._is_paused():
            return  # nobody who waits is admitted
        head = self.waiting.peek_request()
        lowest = max(request.priority for request in running)
        if head.priority >= lowest:
            return
        # Who has blocks already, loaded or being loaded, comes before all others.
        landing = sum(
            request.status != RequestStatus.WAITING_FOR_STREAMING_REQ
            for request in getattr(self, "kv_holding_waiting", ())
        )
        slots = self._slots() - self._streaming() - landing
        reserved = int(self._inflight_prefill_reserved_blocks())
        room = self._room() - reserved
        held = self._referenced()
        taken = self._headroom + reserved - self._soon_free()
        if len(running) < slots and (need := self._need(head, held)) + self._headroom <= room:
            self._planning.planner.give_way(need + taken)
            return  # vLLM admits it; the next one is looked at in the next iteration
        protected = [self._priorities.protected(r) or not _may_leave(r) for r in running]
        if all(protected):
            return
        waiting = [
            request
            for request in heapq.nsmallest(_MOST, self.waiting._heap)
            if request.priority < lowest
            and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        ]
        if not waiting:
            return
        them = [*waiting, *running]
        old = np.arange(len(them)) >= len(waiting)
        leaving, blocks = choose(
            Candidates(
                priority=np.array([r.priority for r in them], np.float64),
                arrival=np.array([r.arrival_time for r in them], np.float64),
                blocks=np.array(
                    [*(self._need(r, held) for r in waiting), *map(self._held, running)], np.int64
                ),
                running=old,
                protected=np.array([False] * len(waiting) + protected),
            ),
            room=room,
            slots=slots,
            headroom=self._headroom,
        )
        for request in [them[i] for i in leaving]:
            self._take_out(request)
        if leaving:
            taken = self._headroom + reserved - self._soon_free()
            self._planning.planner.give_way(blocks + taken)

    def _take_out(self, request: Any) -> None:
        """Preempt a running request."""
        self.running.remove(request)
        self._preempt_request(request, time.monotonic())
        # Its next batch is to be told all of its tokens anew.
        self.prev_step_scheduled_req_ids.discard(request.request_id)

    def slots_are_taken(self) -> bool:
        """Whether requests that run or are being loaded have all slots."""
        taken = len(self.running) + len(self._planning.loading)
        return taken + self._streaming() >= self._slots()

    def _slots(self) -> int:
        most = int(self.max_num_running_reqs)
        if self._scheduling:
            return most  # `schedule` has lowered the other one
        return min(most, getattr(self, "max_num_active_reqs", most))

    def _streaming(self) -> int:
        return int(getattr(self, "num_waiting_for_streaming_input", 0))

    def _room(self) -> int:
        """Blocks that are free, or will be without preempting anybody."""
        return self._soon_free() + self._planning.planner.held_blocks

    def _soon_free(self) -> int:
        """Blocks that are free, or will be when the forward under way has ended."""
        # Those that are read by a swap-out, too, are among the held ones.
        deferred = sum(int(block.ref_cnt == 1) for block in self._deferred())
        ending = sum(self._held(request) for request in self.running if _is_leaving(request))
        return self._planning.pool.free_blocks + deferred + ending

    def _deferred(self) -> list[Any]:
        """Blocks of requests that have left while a forward that writes them is under way."""
        return [block for _, blocks in getattr(self, "deferred_frees", ()) for block in blocks]

    def _referenced(self) -> Counter[int]:
        """Blocks by how often they are referenced by none that goes on running or is loaded."""
        held = Counter(set(self._planning.planner.holds()))
        held.update(block.block_id for block in self._deferred())
        for request in filter(_is_leaving, self.running):
            held.update(self.kv_cache_manager.get_block_ids(request.request_id)[0])
        return held

    def _need(self, request: Any, held: Counter[int]) -> int:
        """Blocks that a waiting request needs of those that are free."""
        blocks = -(-(request.num_tokens + 1) // self.block_size)
        if self.cache_config.enable_prefix_caching and not request.skip_reading_prefix_cache:
            pool = self.kv_cache_manager.block_pool
            for key in request.block_hashes:
                found = pool.get_cached_block(key, [0])
                if found is None:
                    break
                blocks -= found[0].ref_cnt > held[found[0].block_id]  # somebody runs with it
        return max(int(blocks), 1)

    def _held(self, request: Any) -> int:
        """Blocks that would be there if a running request left."""
        (blocks,) = self.kv_cache_manager.get_blocks(request.request_id).blocks
        return sum(int(block.ref_cnt == 1) for block in blocks)

    def _let_grow(self) -> None:
        """Make room for what runs: nobody whose turn it is has to leave, or to stand still."""
        planner = self._planning.planner
        most = 2 * (len(self.running) + self.max_num_scheduled_tokens // self.block_size)
        free = self._planning.pool.free_blocks
        if free >= most:
            return
        planner.give_way(self._growth() - free)
        # While a forward is under way that writes the least important one's blocks, vLLM preempts
        # nobody, and lets all stand still that need some. Without it they are free a step later.
        if getattr(self, "defer_block_free", False) and not self._is_paused():
            while self._growth(steps=2) > self._room():
                others = [*filter(_may_leave, self.running)]
                if self.policy == SchedulingPolicy.PRIORITY:
                    others.sort(key=lambda request: (request.priority, request.arrival_time))
                if len(others) < 2:
                    return
                self._take_out(others[-1])

    def _growth(self, steps: int = 1) -> int:
        """Blocks that running requests need for their next steps."""
        need = 0
        budget = steps * self.max_num_scheduled_tokens
        for request in self.running:
            if _is_ending(request):
                continue
            begin = request.num_computed_tokens
            end = min(
                request.num_tokens_with_spec + request.num_output_placeholders + steps - 1,
                request.num_prompt_tokens + request.max_tokens - 1,  # the last one's KV is not kept
                begin + min(budget, steps * self._longest_chunk),
            )
            budget -= max(0, end - begin)
            have = len(self.kv_cache_manager.get_blocks(request.request_id).blocks[0])
            need += max(0, -(-end // self.block_size) - have)
        return need

    def _is_paused(self) -> bool:
        return getattr(getattr(self, "_pause_state", None), "name", "UNPAUSED") != "UNPAUSED"


def _may_leave(request: Any) -> bool:
    """Whether a running request may be preempted.

    Not if it ends anyway; nor a session of streamed input, which vLLM would lose.
    """
    return not (getattr(request, "resumable", False) or _is_ending(request))


def _is_leaving(request: Any) -> bool:
    """Whether a running request's blocks are free when the forward under way has ended."""
    return _is_ending(request) and not getattr(request, "resumable", False)


def _is_ending(request: Any) -> bool:
    """Whether the forward under way gives a request the last token that it may have."""
    ahead = request.num_output_placeholders
    tokens = request.num_computed_tokens + 2 - ahead  # as vLLM counts them, in `schedule`
    return bool(ahead > 0 and tokens >= request.num_prompt_tokens + request.max_tokens)


def _landed_without_headroom(allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Let those whose load has landed run on: they were admitted beside the headroom once.

    vLLM would ask for it again, and admit nobody else before.
    """

    @functools.wraps(allocate)
    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        waits = request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
        if waits and request.num_computed_tokens and "has_scheduled_reqs" in kwargs:
            kwargs["has_scheduled_reqs"] = False
        return allocate(request, *args, **kwargs)

    return allocate_slots


class SwitchScheduler(SwitchMixin, Scheduler):
    """vLLM's scheduler, with switches by priority."""


class AsyncSwitchScheduler(SwitchMixin, AsyncScheduler):
    """vLLM's asynchronous scheduler, with switches by priority."""


def make_scheduler(*args: Any, **kwargs: Any) -> Any:
    """Make the scheduler for vLLM's engine core: ours, or vLLM's own if that is not as expected."""
    config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
    asynchronous = bool(config.scheduler_config.async_scheduling)
    plain: Callable[..., Any] = AsyncScheduler if asynchronous else Scheduler
    if unexpected := _unexpected():
        log.warning(
            "kvswitch: this vLLM's scheduler is not as expected (%s). Going on as a connector only:"
            " requests that vLLM preempts are still swapped, but a waiting request never preempts a"
            " running one, and priorities do not change at run time.",
            unexpected,
        )
        return plain(*args, **kwargs)
    scheduler = (AsyncSwitchScheduler if asynchronous else SwitchScheduler)(*args, **kwargs)
    if scheduler.policy != SchedulingPolicy.PRIORITY:
        log.warning("kvswitch: scheduling policy is not 'priority': nobody is preempted for others")
    return scheduler


def _unexpected() -> str | None:
    """What of vLLM's scheduler is not as the mixin needs it."""
    parameters = inspect.signature(Scheduler._preempt_request).parameters
    if list(parameters)[1:3] != ["request", "timestamp"]:
        return f"_preempt_request takes {list(parameters)}"
    for name in ("_free_request", "_inflight_prefill_reserved_blocks"):
        if not callable(getattr(Scheduler, name, None)):
            return f"no {name}"
    return None

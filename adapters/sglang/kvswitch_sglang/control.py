"""What SGLang's scheduler does besides with kvswitch: a pass, priorities, preemption, failures.

SGLang preempts for a waiting request only when request slots run out, and never changes a priority.
Here a waiting request of higher priority takes memory and slots from running ones, as far as these
are not in their quantum. All this hangs on hooks that SGLang offers, and does nothing for a
scheduler with another cache.

A request whose load has failed has computed nonsense in the forward that waited for it. It leaves
as if it had been retracted, without copies, once that forward's result has been passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import nullcontext
from itertools import count
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from kvswitch.errors import ConfigError, UnknownSequence
from kvswitch.hooks import make_policy
from kvswitch.scheduling import RequestPriorities

if TYPE_CHECKING:
    from kvswitch_sglang.settings import Settings
    from kvswitch_sglang.switching import Switching

__all__ = ["Control", "install_hooks", "owner_of", "signed"]

_serial = count()


# What is kept on SGLang's requests themselves:
#   kvswitch_owner   whose copies are its
#   kvswitch_queued  when it has come or come back: a serial number, the same on all ranks
#   kvswitch_had     output tokens that it had when it was admitted last


def owner_of(req: Any) -> Hashable:
    """Who a request's copies belong to: itself, for its id may come again with other tokens."""
    owner: Hashable = getattr(req, "kvswitch_owner", None)
    if owner is None:
        owner = req.kvswitch_owner = (req.rid, next(_serial))
    return owner


_LOWEST = -(2.0**53)  # stands for "no priority given", so that ageing can still be added to it


class Control:
    """For one scheduler.

    Parameters
    ----------
    cache : KVSwitchRadixCache
    switching : Switching
    settings : Settings
    overlap : bool
        Whether a batch is planned while the one before it is under way.

    Attributes
    ----------
    running : int
        Requests in the decode batch.
    overhead : Overhead
        Of the cache's `Switching`.
    """

    def __init__(
        self, cache: Any, switching: Switching, settings: Settings, *, overlap: bool
    ) -> None:
        self._cache = cache
        self._switching = switching
        self.overhead = switching.overhead
        self._priorities = RequestPriorities(
            make_policy(settings.policy, **settings.policy_settings),
            epoch=settings.epoch,
            quantum=settings.quantum,
        )
        self._fixed = settings.policy == "fixed" and not settings.policy_settings
        self._owners: dict[Hashable, Hashable] = {}  # by SGLang's handles
        self._requests: dict[Hashable, Any] = {}  # those with priorities
        self._lost: dict[Hashable, Any] = {}  # their load has failed
        self._overlap = overlap
        self._ran: Any = None  # the newest batch that was run, which will be the last one
        self.running = 0

    # -- the pass ----------------------------------------------------------------------------------

    def begin_pass(self, scheduler: Any, running: Any, last: Any) -> None:
        """Begin a scheduling pass."""
        self._cache.begin_pass()
        if self._lost:
            # With overlap, their result is still to come. Until then they take part in nothing.
            if scheduler.chunked_req is not None and self.is_lost(scheduler.chunked_req):
                scheduler.chunked_req = None
            for req in self._lost.values():
                _take_out(last, req)
        batches = [batch for batch in (running, last) if batch is not None]
        self.running = len(running.reqs) if running is not None else 0
        if not scheduler.enable_priority_scheduling:
            return
        owners = {owner_of(req) for batch in batches for req in batch.reqs}
        changed = self._priorities.begin(owners)
        if not self._fixed:
            for owner, priority in changed.items():
                self._set(self._requests[owner], priority)

    def queued(self, scheduler: Any, req: Any) -> None:
        """Take note of a request that has come, or come back."""
        if not scheduler.waiting_queue or scheduler.waiting_queue[-1] is not req:
            return  # it was refused
        owner = owner_of(req)
        req.kvswitch_queued = next(_serial)
        self._owners[req.cache_request_handle] = owner
        if not scheduler.enable_priority_scheduling or req.priority is None:
            return
        if owner not in self._requests:
            self._requests[owner] = req
            base = signed(req.priority)
            priority = self._priorities.add(owner, max(base, _LOWEST))
            if not self._fixed:
                self._set(req, priority)

    def owner_of_handle(self, handle: Hashable) -> Hashable | None:
        """Whose copies SGLang means by its own handle for a request that is queued or runs."""
        return self._owners.get(handle)

    def gone(self, handle: Hashable) -> None:
        """Take note that a request has ended."""
        owner = self._owners.pop(handle, None)
        self._requests.pop(owner, None)
        self._priorities.remove(owner)

    def admitted(self, batch: Any) -> None:
        """Take note of the requests of a new prefill batch."""
        for req in batch.reqs:
            owner = owner_of(req)
            req.kvswitch_had = len(req.output_ids)
            self._priorities.entered(owner)
            self._switching.resumed(owner, req.prefix_len)

    def set_request_priority(self, rid: str, priority: int) -> int:
        """Change a request's priority, in SGLang's numbers; how many it was changed for.

        Raises
        ------
        UnknownSequence
            There is no such request, or priorities are not enabled.
        """
        found = [req for req in self._requests.values() if req.rid == rid]
        if not found:
            raise UnknownSequence(
                f"no request {rid!r} with a priority: it has ended, or the server runs without "
                "--enable-priority-scheduling"
            )
        for req in found:
            self._set(req, self._priorities.set_base(owner_of(req), signed(priority)))
        return len(found)

    def _set(self, req: Any, priority: float) -> None:
        req.priority = int(signed(priority))
        self._switching.planner.set_priority(owner_of(req), priority)

    # -- preemption --------------------------------------------------------------------------------

    def make_room(self, adder: Any, req: Any) -> bool:
        """Preempt requests of lower priority until `req` fits; whether it does.

        Nobody is preempted if it would not fit then either, as far as can be told beforehand: what
        they share with each other is counted for each of them.
        """
        # What the tree has of it must not be counted as memory that can be had.
        lock = nullcontext() if req.last_node is None else adder._lock_node(req.last_node)
        with self.overhead, lock:
            return self._make_room(adder, req)

    def _make_room(self, adder: Any, req: Any) -> bool:
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        batch = adder.running_batch
        overhead = getattr(adder, "per_req_token_overhead", adder.page_size)
        new = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        prompt = len(req.origin_input_ids) + len(req.output_ids)
        need = prompt - req.prefix_len + min(new, CLIP_MAX_NEW_TOKENS) + overhead
        slots = self._cache.req_to_token_pool.available_size() - sum(
            not r.kv.holds_kv for r in adder.can_run_list
        )
        victims = self._victims(adder, req)
        if not victims:
            return False

        def tokens_of(requests: list[Any]) -> int:
            return sum(
                adder._get_running_request_total_token_offset(r) + r.kv.kv_committed_len
                for r in requests
            )

        if adder.rem_total_tokens + tokens_of(victims) <= need:
            return False
        ending = self._ending(batch)
        if ending and slots + len(ending) > 0 and adder.rem_total_tokens + tokens_of(ending) > need:
            return False  # it fits when these have gone, in the next pass
        leaving: list[Any] = []
        for victim in victims:
            if slots > 0 and adder.rem_total_tokens > need:
                break
            offset = adder._get_running_request_total_token_offset(victim)
            remaining = len(batch.reqs) - len(leaving) - 1
            batch.release_req(batch.reqs.index(victim), remaining)
            adder.memory_budget.total_offset -= offset
            leaving.append(victim)
            slots += 1
        if leaving:
            gone = {id(r) for r in leaving}
            batch.filter_batch(
                keep_indices=[i for i, r in enumerate(batch.reqs) if id(r) not in gone]
            )
            batch.batch_is_full = False
            adder.preempt_list.extend(leaving)
        return bool(slots > 0 and adder.rem_total_tokens > 0)

    def _ending(self, batch: Any) -> list[Any]:
        """Running requests whose last token is under way (with overlap)."""
        if self._ran is None or not self._overlap:
            return []
        under_way = {id(r) for r in self._ran.reqs}
        return [
            r
            for r in batch.reqs
            if id(r) in under_way and r.kv.holds_kv and r.next_output_finishes_by_length()
        ]

    def _victims(self, adder: Any, req: Any) -> list[Any]:
        """Running requests that may be preempted for `req`, the least important first."""
        least = signed(req.priority) - adder.priority_scheduling_preemption_threshold
        found = [
            r
            for r in adder.running_batch.reqs
            if signed(r.priority) < least
            # Sessions keep their rows, and the members of a beam group share them.
            and self._cache.switchable(r)
            and not r.finished()
            and not r.next_output_finishes_by_length()
            and r.kv.holds_kv
            # With overlap its first token may be under way and would be lost: no progress, ever.
            and len(r.output_ids) > getattr(r, "kvswitch_had", -1)
            and not self._priorities.protected(owner_of(r))
        ]
        found.sort(key=lambda r: (signed(r.priority), -r.kvswitch_queued))
        return found

    # -- failed loads ------------------------------------------------------------------------------

    def is_lost(self, req: Any) -> bool:
        """Whether a request's load has failed, and its result has yet to be passed over."""
        return bool(self._lost) and owner_of(req) in self._lost

    def forward_ended(self, batch: Any) -> None:
        """Find out whose load has failed, once a forward has been given to the device."""
        self._ran = batch
        lost = self._switching.after_forward()
        if not lost:
            return
        for req in batch.reqs:
            if owner_of(req) in lost:
                self._lost[owner_of(req)] = req
                req.is_retracted = True  # SGLang passes its result over

    def processed(self, scheduler: Any, batch: Any) -> None:
        """The result of a batch has been processed: those whose load had failed leave now."""
        if not self._lost:
            return
        for req in list(batch.reqs):
            owner = owner_of(req)
            if owner not in self._lost or not req.kv.holds_kv:
                continue
            if scheduler.chunked_req is req:
                scheduler.chunked_req = None
            _release(req, self._cache)
            del self._lost[owner]
            for each in (self._ran, scheduler.last_batch, scheduler.running_batch):
                _take_out(each, req)
            scheduler._add_request_to_queue(req, is_retracted=True)


def _release(req: Any, cache: Any) -> None:
    from sglang.srt.mem_cache.common import release_kv_cache

    release_kv_cache(req, cache, checkpoint=False)
    req.reset_for_retract()


def _take_out(batch: Any, req: Any) -> None:
    if batch is not None and any(r is req for r in batch.reqs):
        batch.filter_batch(keep_indices=[i for i, r in enumerate(batch.reqs) if r is not req])


def signed(priority: float) -> float:
    """SGLang's number with larger meaning more important, or back."""
    from sglang.srt.runtime_context import get_schedule

    return -priority if get_schedule().schedule_low_priority_values_first else priority


# -- hooks -----------------------------------------------------------------------------------------

_installed = False


def _control(cache: Any) -> Control | None:
    found: Control | None = getattr(cache, "control", None)
    return found


def install_hooks() -> None:
    """Hang on SGLang's scheduler, in this process; once.

    Raises
    ------
    ConfigError
        SGLang has not let us: another plug-in has hooked the same method before.
    """
    global _installed  # noqa: PLW0603 - as SGLang's hooks are for a process
    if _installed:
        return
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    batch = "sglang.srt.managers.schedule_batch.ScheduleBatch"
    hooks: dict[str, Callable[..., Any]] = {
        f"{scheduler}.get_next_batch_to_run": _around_pass,
        f"{scheduler}.run_batch": _around_forward,
        f"{scheduler}.process_batch_result": _around_result,
        f"{scheduler}.on_idle": _around_idle,
        f"{scheduler}._add_request_to_queue": _around_queue,
        f"{scheduler}._abort_on_queued_limit": _around_limit,
        f"{adder}.add_one_req": _around_admission,
        f"{adder}.preempt_to_schedule": _around_preemption,
        f"{batch}.prepare_for_extend": _around_extend,
        f"{batch}.prepare_for_decode": _around_decode,
    }
    before = {target: resolve_name(target) for target in hooks}
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    HookRegistry.apply_hooks()  # passes over what has been hooked already, and says nothing
    if missing := [target for target in hooks if resolve_name(target) is before[target]]:
        raise ConfigError(
            f"kvswitch cannot hook {missing[0]}, as another SGLang plug-in has hooked it. Choose "
            "one of them: SGLANG_PLUGINS=kvswitch loads no others"
        )
    _installed = True

    def set_request_priority(self: Any, rid: str, priority: int) -> int:
        control = _control(self.tree_cache)
        return 0 if control is None else control.set_request_priority(rid, priority)

    # SGLang's remote calls (`Engine.collective_rpc`) look methods up by name.
    Scheduler.set_request_priority = set_request_priority


def _around_pass(original: Any, self: Any, running_batch: Any, last_batch: Any) -> Any:
    if (control := _control(self.tree_cache)) is not None:
        with control.overhead:
            control.begin_pass(self, running_batch, last_batch)
    plan = original(self, running_batch=running_batch, last_batch=last_batch)
    if control is not None:
        with control.overhead:
            self.tree_cache.end_pass()
    return plan


def _around_forward(original: Any, self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if (control := _control(self.tree_cache)) is None:
        return original(self, batch, *args, **kwargs)
    control._switching.before_forward()
    try:
        return original(self, batch, *args, **kwargs)
    finally:
        control.forward_ended(batch)


def _around_result(original: Any, self: Any, batch: Any, result: Any) -> Any:
    done = original(self, batch, result)
    if (control := _control(self.tree_cache)) is not None:
        with control.overhead:
            control.processed(self, batch)
            if (metrics := self.tree_cache.metrics) is not None:
                metrics.update()
    return done


def _around_idle(original: Any, self: Any) -> Any:
    if (control := _control(self.tree_cache)) is not None:
        with control.overhead:
            control._switching.tick()
            if (metrics := self.tree_cache.metrics) is not None:
                metrics.update()
    return original(self)


def _around_queue(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    done = original(self, req, *args, **kwargs)
    if (control := _control(self.tree_cache)) is not None:
        with control.overhead:
            control.queued(self, req)
    return done


def _around_limit(original: Any, self: Any, req: Any) -> Any:
    if req.is_retracted and _control(self.tree_cache) is not None:
        return False  # one that had been running is not new
    return original(self, req)


def _around_admission(original: Any, self: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, req, *args, **kwargs)
    control = _control(self.tree_cache)
    if control is None or result.name != "NO_TOKEN" or not _preempts():
        return result
    if self.can_run_list and self.can_run_list[-1] is req:
        return result  # it has been admitted: the answer is for the next one
    if not control.make_room(self, req):
        return result
    req.init_next_round_input(self.tree_cache)  # the tree has changed
    return original(self, req, *args, **kwargs)


def _around_preemption(original: Any, self: Any, req: Any) -> Any:
    if (control := _control(self.tree_cache)) is None:
        return original(self, req)
    req.init_next_round_input(self.tree_cache)  # what it shares it does not need
    return control.make_room(self, req)


def _preempts() -> bool:
    from sglang.srt.runtime_context import get_schedule

    schedule = get_schedule()
    return bool(schedule.enable_priority_scheduling and not schedule.disable_priority_preemption)


def _around_extend(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (control := _control(self.tree_cache)) is None:
        return original(self, *args, **kwargs)
    with control.overhead:
        control.admitted(self)
        demands = [(owner_of(req), req.extend_end - req.prefix_len) for req in self.reqs]
    return _allocating(original, self, demands, *args, **kwargs)


def _around_decode(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    if (control := _control(self.tree_cache)) is None:
        return original(self, *args, **kwargs)
    with control.overhead:
        demands = [(owner_of(req), 1) for req in self.reqs]
    return _allocating(original, self, demands, *args, **kwargs)


def _allocating(original: Any, batch: Any, demands: Any, *args: Any, **kwargs: Any) -> Any:
    allocator = batch.token_to_kv_pool_allocator
    allocator.batch = demands
    try:
        return original(batch, *args, **kwargs)
    finally:
        allocator.batch = None

"""The connector's half in the scheduler process: what moves when.

It speaks vLLM's words (requests, `KVCacheManager`) to `EngineSwapManager`, which decides. With the
scheduler of `kvswitch_vllm.scheduler` it is told of a preemption before vLLM frees the blocks.
Without it (*connector-only mode*) it learns of it in the same step, with the blocks freed already:
then nothing is held, and the forward waits for what it is about to overwrite.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

from kvswitch.messages import Observations, decode_observations, encode
from kvswitch.switch import Counters, EngineSwapManager, RankReports
from kvswitch_vllm.block_pool import GroupQueue, VllmPool, install_groups
from kvswitch_vllm.settings import Settings
from kvswitch_vllm.wire import Load, StepOrders, WorkerReports

__all__ = ["CACHE_SHARE", "Planning"]

CACHE_SHARE = 5
"""A fifth of the headroom is kept clear of cached content. More makes runs longer, and costs hits
in the prefix cache: a fifth 1 to 3 points of the hit rate under pressure, a half 3 to 5
(tests/engines/vllm/test_block_pool.py, 48 and 32 conversations in 2048 blocks)."""


class Planning:
    """Plans swap-outs and swap-ins for one vLLM scheduler.

    Parameters
    ----------
    settings : Settings
    host_blocks, block_tokens, block_bytes : int
        Of one rank.
    num_ranks : int
    asynchronous : bool
        Whether vLLM schedules ahead of the forward: then no batch waits for a swap-in.
    alone : bool
        Whether no other engine waits for this one's steps (data parallelism).
    log : logging.Logger

    Attributes
    ----------
    planner : EngineSwapManager
        From `bind` on.
    loading : set of str
        Requests whose swap-in is under way, while others run.
    overhead_seconds : float
        Time spent in here.
    """

    planner: EngineSwapManager
    pool: VllmPool

    def __init__(
        self,
        settings: Settings,
        *,
        host_blocks: int,
        block_tokens: int,
        block_bytes: int,
        num_ranks: int,
        asynchronous: bool,
        alone: bool,
        log: Any,
    ) -> None:
        self.settings = settings
        self.block_tokens = block_tokens
        self.groups: GroupQueue | None = None
        self.stall_seconds = 0.0
        self.overhead_seconds = 0.0
        self.recomputed_tokens = 0
        self._host_blocks = host_blocks
        self._block_bytes = block_bytes
        self._swap = settings.preemption == "switch"
        self._asynchronous = asynchronous
        self._alone = alone
        self._log = log
        self._ranks = RankReports(num_ranks)
        self._manager: Any = None
        self._scheduler: Any = None  # ours, unless in connector-only mode
        self._running = 0  # in the last step
        self.loading: set[str] = set()
        self._lost: list[Load] = []
        self._offer: tuple[str, int, int, bool] | None = None
        self._left: dict[str, int] = {}  # tokens that a preempted request had computed
        self._tables: dict[str, tuple[list[int], int]] = {}  # connector-only mode
        self._keys: dict[str, Any] = {}
        self._stepped = 0.0  # when the last step with a forward began
        self._counters = Counters()

    # -- set-up ----------------------------------------------------------------------------------

    def bind(self, manager: Any) -> None:
        """Get to know vLLM's cache manager; put block groups under it."""
        self._manager = manager
        settings = self.settings
        try:
            self.groups = install_groups(
                manager, first_group=settings.first_group, headroom=settings.headroom / CACHE_SHARE
            )
        except AttributeError as error:
            self._log.warning(
                "kvswitch: no block groups, so swaps take more and smaller copies: %s", error
            )
        self.pool = VllmPool(manager.block_pool)
        self.planner = EngineSwapManager(
            self.pool,
            self._host_blocks,
            self.block_tokens,
            block_bytes=self._block_bytes,
            first_group=settings.first_group,
            strategy=settings.strategy,
            swap=self._swap,
            reuse=settings.reuse,
        )
        reset = manager.reset_prefix_cache

        def reset_prefix_cache(*args: Any, **kwargs: Any) -> Any:
            self.planner.give_way(self.planner.held_blocks)
            done = reset(*args, **kwargs)
            if done:  # else all is as it was, in vLLM's cache too
                self.reset()
                if self.groups is not None:
                    self.groups.forget_content()
            return done

        manager.reset_prefix_cache = reset_prefix_cache

    def attach_scheduler(self, scheduler: Any) -> None:
        """From now on `scheduler` tells of preemptions before they take place."""
        self._scheduler = scheduler

    def reset(self) -> None:
        """No copy may be used again: the weights may have changed, or the user wants it so."""
        self.planner.invalidate_all()
        self._tables.clear()

    # -- admission -------------------------------------------------------------------------------

    def matched(self, request: Any, local: int) -> tuple[int | None, bool]:
        """How many tokens beyond `local` can be loaded, and whether the batch goes on without.

        None keeps `request` waiting: vLLM gives requests that are being loaded no slot, so somebody
        less important would take it before they have landed.
        """
        if self._scheduler is not None and self.loading and self._scheduler.slots_are_taken():
            self._offer = None
            return None, False
        if not self._swap:
            self._offer = (request.request_id, local, local, False)
            return 0, False
        limit = request.num_tokens - 1  # one token is recomputed: its output is needed
        keys = request.block_hashes[: limit // self.block_tokens]
        have = min(self.planner.reach(request.request_id, keys), limit)
        if have <= local:
            self._offer = (request.request_id, local, local, False)
            return 0, False
        later = self._asynchronous or not self.planner.worth_waiting(
            have - local, self._num_running()
        )
        self._offer = (request.request_id, local, have, later)
        return have - local, later

    def _num_running(self) -> int:
        return self._running if self._scheduler is None else len(self._scheduler.running)

    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        """`request` got its blocks: load what was promised into them."""
        name = request.request_id
        offer, self._offer = self._offer, None
        if offer is None or offer[0] != name:
            return
        _, local, have, later = offer
        if external <= 0:
            have = local
        self._note_resumed(request, have)
        if external <= 0:
            return
        (ids,) = blocks.get_block_ids()
        keys = request.block_hashes[: have // self.block_tokens]
        got = self.planner.swap_in(name, local, have, ids, keys=keys, wait=not later)
        self.planner.set_priority(name, -float(request.priority))
        if later:
            self.loading.add(name)
        if got < have:
            first, last = got // self.block_tokens, -(-have // self.block_tokens)
            self._lost.append(Load(name if later and got <= local else None, (*ids[first:last],)))

    def _note_resumed(self, request: Any, tokens: int) -> None:
        left = self._left.pop(request.request_id, None)
        if left is not None:
            self.recomputed_tokens += max(0, left - tokens)

    # -- leaving ---------------------------------------------------------------------------------

    def preempted(self, request: Any, *, hold: bool) -> Sequence[int]:
        """`request` is about to lose its blocks: send what is missing.

        What is sent is held until it has been, or, without `hold`, better left alone.

        Returns
        -------
        sequence of int
            Blocks for which `freeing` is meant: the host has what is in them, or will.
        """
        (ids,) = self._manager.get_block_ids(request.request_id)
        have = self._leave(request, request.num_computed_tokens, ids, hold=hold)
        return ids[: have // self.block_tokens] if hold else ()

    def freeing(self, copied: Collection[int]) -> AbstractContextManager[None]:
        """What of `copied` becomes free within this is best overwritten first."""
        if self.groups is None or not copied:
            return nullcontext()
        return self.groups.copied(copied)

    def _leave(self, request: Any, tokens: int, ids: Sequence[int], *, hold: bool) -> int:
        """Swap out; tokens that the host has, or will have."""
        self._left[request.request_id] = tokens
        if tokens <= 0:
            return 0
        return self.planner.swap_out(
            request.request_id,
            tokens,
            ids,
            keys=request.block_hashes[: tokens // self.block_tokens],
            priority=-float(request.priority),
            hold=hold,
        )

    def finished(self, request: Any, ids: Sequence[int]) -> None:
        """`request` has ended, its turn is over: keep its KV for the next one."""
        name = request.request_id
        self._left.pop(name, None)
        self._tables.pop(name, None)
        self._keys.pop(name, None)
        if name in self.loading or not self._swap:
            self.planner.drop(name)
            return
        if not ids:  # preempted before its last token was known
            self.planner.leave(name)
            return
        tokens = request.num_computed_tokens
        keys = request.block_hashes
        full = min(tokens // self.block_tokens, len(keys), len(ids))
        if self.pool.caches:
            self.planner.retire(name, full * self.block_tokens, ids, keys)
        elif full:
            # What vLLM does not keep would be gone with the next request.
            self.planner.swap_out(
                name,
                full * self.block_tokens,
                ids,
                keys=keys[:full],
                priority=float("-inf"),
                hold=self._scheduler is not None,
                last=True,
            )
        else:
            self.planner.drop(name)

    # -- the step --------------------------------------------------------------------------------

    def step(self, output: Any) -> StepOrders:
        """What every worker has to do in the step that `output` (a SchedulerOutput) describes."""
        started = perf_counter()
        if self._scheduler is None:
            self._follow(output)
        if self.planner.leaving:
            for new in output.scheduled_new_reqs:
                self.planner.written(new.block_ids[0])
            for ids in output.scheduled_cached_reqs.new_block_ids:
                if ids:
                    self.planner.written(ids[0])
        before, self._running = self._running, len(output.num_scheduled_tokens)
        if not (self.planner.busy or self._lost):
            self._stepped = started if self._running else 0.0
            return StepOrders()
        if self.planner.may_send_idle:
            self.planner.send_idle(self._written(output))
        orders, owners = self.planner.orders()
        loads = {}
        for transfer in orders.transfers:
            if transfer.id in owners:
                name = str(owners[transfer.id])
                blocks = tuple(
                    block
                    for _, first, count in transfer.runs.tolist()
                    for block in range(first, first + count)
                )
                loads[transfer.id] = Load(name if name in self.loading else None, blocks)
        lost, self._lost = tuple(self._lost), []
        self._observe_step(started)
        idle = self._alone and not (before or self._running)
        if not (orders.transfers or orders.cancel or orders.wait or lost):
            return StepOrders(idle=idle)
        return StepOrders(encode(orders), loads, lost, idle)

    def _written(self, output: Any) -> set[int]:
        """Blocks that a step's forward writes.

        vLLM names a block by its content when it plans to fill it; that is computed only then.
        """
        cached = output.scheduled_cached_reqs
        begins = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        begins.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        written: set[int] = set()
        for name, begin in begins.items():
            first = begin // self.block_tokens
            last = -(-(begin + output.num_scheduled_tokens[name]) // self.block_tokens)
            table = self._manager.get_blocks(name).blocks[0]
            written.update(block.block_id for block in table[first:last])
        return written

    def _observe_step(self, now: float) -> None:
        if self._stepped:
            self.planner.observe(Observations(step_seconds=now - self._stepped))
        self._stepped = now if self._running else 0.0

    def _follow(self, output: Any) -> None:
        """Connector-only mode: learn from `output` who has left, and with which blocks."""
        block_tables = self._tables
        for name in output.preempted_req_ids or ():
            if name in block_tables:
                ids, tokens = block_tables.pop(name)
                request = self._keys.get(name)
                if request is not None:
                    self._leave(request, tokens, ids, hold=False)
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            tokens = new.num_computed_tokens + scheduled[new.req_id]
            block_tables[new.req_id] = (list(new.block_ids[0]), tokens)
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            ids = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                table = list(ids[0]) if ids else []
            else:
                table = block_tables.get(name, ([], 0))[0]
                if ids:
                    table.extend(ids[0])
            block_tables[name] = (table, cached.num_computed_tokens[i] + scheduled[name])

    def arrived(self, request: Any) -> None:
        """A new request: in connector-only mode its token hashes are looked up later."""
        self.planner.drop(request.request_id)  # another of that name, which has ended
        if self._scheduler is None:
            self._keys[request.request_id] = request

    def observe(self, output: Any) -> None:
        """Take in what the workers report with a step's output."""
        reports = output.kv_connector_worker_meta
        if isinstance(reports, WorkerReports):
            for rank, report, stall in reports.reports:
                self._ranks.add(rank, decode_observations(report))
                self.stall_seconds += stall if rank == 0 else 0.0
            self.planner.observe(self._ranks.merged())
        if output.finished_recving:
            self.loading -= output.finished_recving
        if self._tables and (bad := output.invalid_block_ids):
            for name, (ids, tokens) in self._tables.items():
                first = next((i for i, block in enumerate(ids) if block in bad), len(ids))
                self._tables[name] = (ids, min(tokens, first * self.block_tokens))

    # -- reports ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether steps are needed even if no request is there: completions travel with them."""
        return self.planner.busy

    def take_counters(self) -> dict[str, float] | None:
        """What has been counted since the last call; None if nothing."""
        stats = self.planner.stats()
        stats.tokens_lost = self.recomputed_tokens
        stats.stall_seconds = self.stall_seconds
        stats.overhead_seconds = self.overhead_seconds
        copies = self.planner.copies
        used = copies.pool.num_blocks - copies.pool.free_blocks
        return self._counters.take(
            stats, self._block_bytes, used / copies.pool.num_blocks, self.planner.held_blocks
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError if the books contradict themselves (for tests)."""
        self.planner.check_integrity()
        if self.groups is not None:
            self.groups.check_integrity()

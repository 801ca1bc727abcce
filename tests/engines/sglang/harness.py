"""The real SGLang scheduler and model in this process, stepped by the test.

With several tensor-parallel ranks there is a process for each. All of them must call the same.
"""

from __future__ import annotations

import os
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang_plain_cpu import attention, linear

RANK, RANKS, PORT = (
    int(os.environ.get(f"KVSWITCH_TEST_{name}", default))
    for name, default in (("RANK", 0), ("RANKS", 1), ("PORT", 0))
)


class Server:
    """A scheduler without sockets.

    Parameters
    ----------
    model : str
        Folder of a model.
    kvswitch : bool
        Whether with kvswitch's memory backend.
    overlap : bool
        Whether forwards and scheduling overlap.
    check : bool
        Whether SGLang checks its memory after each pass.
    """

    def __init__(
        self,
        model: str,
        *,
        kvswitch: bool = True,
        overlap: bool = False,
        check: bool = True,
        **arguments: Any,
    ) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        attention.install()
        linear.install()
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import PortArgs, ServerArgs

        given = {
            "model_path": model,
            "device": "cpu",
            "skip_tokenizer_init": True,
            "attention_backend": "torch_native",
            "sampling_backend": "pytorch",
            "disable_cuda_graph": True,
            "disable_overlap_schedule": not overlap,
            "max_total_tokens": 2048,
            "max_running_requests": 16,
            "dtype": "float32",
            "context_length": 2048,
            "mem_fraction_static": 0.3,
            "log_level": "error",
            "grammar_backend": "none",
            "random_seed": 0,
            "page_size": 16,
            "priority_scheduling_preemption_threshold": 0,
            **({"tp_size": RANKS, "nccl_port": PORT, "dist_timeout": 120} if RANKS > 1 else {}),
            **({"radix_cache_backend": "kvswitch"} if kvswitch else {}),
            **arguments,
        }
        args = ServerArgs(**given)
        args.resolve_once()
        args.check_server_args()
        ports = PortArgs.init_new(args)
        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=RANK, gpu_id=RANK))
        self.scheduler = Scheduler(args, ports)
        self.overlap = overlap
        self._checks = check
        self.scheduler.result_queue = deque()
        self.scheduler.enable_skip_finishing_decode = overlap

    # -- the scheduler's loop, one pass at a time --------------------------------------------------

    def step(self) -> Any:
        """One pass; the batch that ran, or None."""
        s = self.scheduler
        plan = s.get_next_batch_to_run(running_batch=s.running_batch, last_batch=s.last_batch)
        s.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if not self.overlap:
            if batch:
                s.process_batch_result(batch, s.run_batch(batch))
            else:
                s.on_idle()
        else:
            apart = s.is_disable_overlap_for_batch(batch, last_batch=s.last_batch)
            if apart:
                s.process_batch_result(*s.result_queue.popleft())
            if batch:
                result = s.run_batch(batch)
                s.result_queue.append((batch.copy(), result))
            else:
                result = None
            if s.last_batch:
                if not apart:
                    s.process_batch_result(*s.result_queue.popleft())
            elif batch is None:
                s.on_idle()
            s.launch_batch_sample_if_needed(result, batch)
        s.last_batch = batch
        if self._checks:
            s.invariant_checker.self_check_during_busy()
        return batch

    def submit(
        self, rid: str, prompt: Iterable[int], tokens: int, priority: int | None = None, **more: Any
    ) -> Any:
        """Send a request."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        parameters = SamplingParams(temperature=0, max_new_tokens=tokens, ignore_eos=True)
        parameters.normalize(None)
        self.scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=rid,
                input_text=None,
                input_ids=array("q", prompt),
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=parameters,
                return_logprob=False,
                logprob_start_len=-1,
                top_logprobs_num=0,
                token_ids_logprob=None,
                stream=False,
                priority=priority,
                **more,
            )
        )
        request = self.scheduler.waiting_queue[-1]
        assert request.rid == rid, f"{rid} was refused"
        return request

    def abort(self, rid: str) -> None:
        """Send an abort."""
        from sglang.srt.managers.io_struct import AbortReq

        self.scheduler.abort_request(AbortReq(rid=rid))

    def run(
        self,
        requests: list[Any],
        *,
        each: Callable[[int], None] | None = None,
        most: int = 5000,
    ) -> list[list[int]]:
        """Step until all of `requests` have finished; their token ids."""
        for number in range(most):
            if all(r.finished() for r in requests) and not self.busy:
                break
            if each is not None:
                each(number)
            self.step()
        else:
            raise AssertionError(f"not finished after {most} passes: {self.state(requests)}")
        for _ in range(3):
            self.step()
        return [list(r.output_ids) for r in requests]

    def state(self, requests: list[Any]) -> str:
        """Who is where, for messages."""
        s = self.scheduler
        waiting = [(r.rid, r.priority, r.kv.holds_kv) for r in s.waiting_queue]
        running = [(r.rid, r.priority, r.finished()) for r in s.running_batch.reqs]
        left = [(r.rid, len(r.output_ids), r.is_retracted) for r in requests if not r.finished()]
        free = s.token_to_kv_pool_allocator.available_size()
        return (
            f"{waiting=} {running=} {left=} {free=} evictable={self.cache.evictable_size()} "
            f"chunked={getattr(s.chunked_req, 'rid', None)} full={s.running_batch.batch_is_full} "
            f"last={s.last_batch and [r.rid for r in s.last_batch.reqs]} "
            f"results={len(s.result_queue)} lost={list(self.cache.control._lost)}"
        )

    @property
    def busy(self) -> bool:
        """Whether a batch or a result is under way."""
        s = self.scheduler
        return bool(s.last_batch or s.result_queue or s.waiting_queue or s.running_batch.reqs)

    # -- what tests do to it -----------------------------------------------------------------------

    @property
    def cache(self) -> Any:
        return self.scheduler.tree_cache

    @property
    def switching(self) -> Any:
        return self.cache.switching

    def retract(self, indices: Iterable[int], *, poison: bool = False) -> None:
        """Retract running requests, as the scheduler does when memory runs out.

        With overlap that is within a pass, where results under way have not been processed: then
        it is done in the next pass that decodes.
        """
        if not self.overlap:
            self._retract(self.scheduler.running_batch, indices, poison)
            return
        s = self.scheduler
        original = type(s).update_running_batch

        def update(batch: Any) -> Any:
            del s.update_running_batch
            batch.filter_batch(reqs_to_exclude=s._reqs_finishing_inflight(batch))
            self._retract(batch, indices, poison)
            return original(s, batch)

        s.update_running_batch = update

    def _retract(self, batch: Any, indices: Iterable[int], poison: bool) -> None:
        batch.filter_batch()
        chosen = [i for i in indices if i < len(batch.reqs)]
        victims = [batch.reqs[i] for i in chosen]
        for n, i in enumerate(chosen):
            batch.release_req(i, len(batch.reqs) - n - 1)
        batch.filter_batch(keep_indices=[i for i in range(len(batch.reqs)) if i not in chosen])
        batch.batch_is_full = False
        if poison:
            self.poison()
        for req in victims:
            self.scheduler._add_request_to_queue(req, is_retracted=True)

    def poison(self) -> None:
        """Evict the tree, end all copies, and fill every free page with NaN."""
        from sglang.srt.mem_cache.base_prefix_cache import EvictParams

        s = self.scheduler
        self.cache.evict(EvictParams(num_tokens=10**9))
        pages = s.token_to_kv_pool_allocator.get_all_free_pages()
        if getattr(self.cache, "switching", None) is not None:
            self.switching.settle()
        slots = (pages[:, None] * s.page_size + torch.arange(s.page_size)).reshape(-1)
        pool = s.token_to_kv_pool_allocator.get_kvcache()
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots] = float("nan")

    def kv(self, req: Any, tokens: int) -> torch.Tensor:
        """K and V of a running request's first tokens, all layers."""
        s = self.scheduler
        slots = s.req_to_token_pool.req_to_token[req.kv.req_pool_idx, :tokens].long()
        pool = s.token_to_kv_pool_allocator.get_kvcache()
        return torch.stack([b[slots] for b in (*pool.k_buffer, *pool.v_buffer)])

    def check(self) -> None:
        """Nothing leaks."""
        s = self.scheduler
        s.invariant_checker.self_check_during_busy()
        if getattr(self.cache, "switching", None) is None:
            return
        self.switching.check_integrity()

    def check_idle(self) -> None:
        """Nothing is left of anybody."""
        for _ in range(20):
            self.step()
        self.check()
        switching = self.switching
        switching.settle()
        assert not switching.planner.busy
        assert switching.planner.copies.num_leases() == 0
        assert len(switching.planner.copies) == 0, "copies of somebody who has gone"
        assert switching.held_pages() == []
        assert not self.cache._private
        assert not self.cache._keys._known
        assert not switching._left
        assert not self.cache.control._requests
        assert not self.cache.control._owners
        assert len(self.cache.control._priorities) == 0
        self.check()

    def close(self) -> None:
        """Give everything back."""
        self.cache.release_host_resources()


def prompts(count: int, seed: int = 1, low: int = 20, high: int = 90) -> list[list[int]]:
    """Random prompts."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 2000) for _ in range(rng.randrange(low, high))] for _ in range(count)]

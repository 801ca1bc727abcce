"""One vLLM engine in this process, driven step by step under a workload with arrival times."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

# One thread computes, one core is left to the copies; vLLM reads these when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from comparison import Outcome
from workloads import Item


def make_llm(
    model: str, *, blocks: int | None, settings: Mapping[str, Any] | None, **more: Any
) -> Any:
    """An engine with `blocks` KV blocks of 32 tokens; `settings` of kvswitch, None without it."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 1280,
        "block_size": 32,
        "max_num_seqs": 8,
        "seed": 0,
        "disable_log_stats": True,
        **more,
    }
    if blocks is not None:
        arguments["num_gpu_blocks_override"] = blocks + 1  # one is vLLM's null block
    if settings is not None:
        from kvswitch_vllm.plugin import transfer_config

        arguments["kv_transfer_config"] = transfer_config(settings)
    return LLM(**arguments)


def serve(llm: Any, items: Sequence[Item]) -> Outcome:
    """Serve `items` as they arrive; what came out and when."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    outcome = Outcome()
    waiting = sorted((i for i in items if i.after is None), key=lambda item: item.arrival)
    followers = {item.after: item for item in items if item.after is not None}
    prompts: dict[str, list[int]] = {}
    preempted: dict[str, int] = {}
    last = start = time.perf_counter()
    while waiting or followers or engine.has_unfinished_requests():
        now = time.perf_counter() - start
        while waiting and waiting[0].arrival <= now:
            item = waiting.pop(0)
            prompts[item.name] = list(item.prompt)
            if item.after is not None:
                before = prompts[item.after] + outcome.tokens[item.after]
                prompts[item.name] = before + prompts[item.name]
            outcome.arrived[item.name] = item.arrival
            outcome.times[item.name], outcome.tokens[item.name] = [], []
            engine.add_request(
                item.name,
                {"prompt_token_ids": prompts[item.name]},
                SamplingParams(
                    temperature=0, max_tokens=item.output, ignore_eos=True, detokenize=False
                ),
            )
        if not engine.has_unfinished_requests():
            time.sleep(0.001)
            last = time.perf_counter()
            continue
        outputs = engine.step()
        now = time.perf_counter()
        outcome.inversion += (now - last) * _inverted(scheduler)
        last = now
        preempted |= {r.request_id: r.num_preemptions for r in scheduler.requests.values()}
        for output in outputs:
            name = output.request_id
            ids = list(output.outputs[0].token_ids)
            new = len(ids) - len(outcome.tokens[name])
            outcome.tokens[name] = ids
            outcome.times[name] += [now - start] * new
            if output.finished and (follower := followers.pop(name, None)) is not None:
                arrival = now - start + follower.arrival
                waiting.append(Item(**{**vars(follower), "arrival": arrival}))
                waiting.sort(key=lambda item: item.arrival)
    outcome.seconds = time.perf_counter() - start
    outcome.preemptions = sum(preempted.values())
    if scheduler.connector is not None and hasattr(scheduler.connector, "planning"):
        while scheduler.has_requests():  # let what is under way come to its end
            engine.engine_core.engine_core.step_fn()
        planning = scheduler.connector.planning
        planning.check_integrity()
        stats = planning.planner.stats()
        planning.take_counters()
        outcome.counters = {name: float(getattr(stats, name)) for name in stats.__slots__}
    return outcome


def _inverted(scheduler: Any) -> int:
    """How many wait who are more important than one that runs; vLLM's lower numbers are."""
    lowest = max((r.priority for r in scheduler.running), default=float("-inf"))
    return sum(r.priority < lowest for r in scheduler.waiting)

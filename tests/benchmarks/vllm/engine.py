"""One vLLM engine in this process, driven step by step under a workload with arrival times."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# One thread computes, one core is left to the copies; vLLM reads these when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) - 1)))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np

MODELS = Path(os.environ.get("KVSWITCH_VLLM_MODELS", ".venv/models"))


@dataclass(frozen=True)
class Item:
    """A request of the workload.

    Attributes
    ----------
    name : str
    arrival : float
        Seconds after the start; or, with `after`, after that request has ended.
    prompt : list of int
    output : int
        Tokens to generate.
    after : str or None
        Conversation: comes when that one has ended, its prompt and output before its own.
    """

    name: str
    arrival: float
    prompt: list[int]
    output: int
    after: str | None = None


@dataclass
class Outcome:
    """What became of the requests of one run."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    arrived: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0
    inversion: float = 0.0
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def throughput(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.tokens.values())) / self.seconds

    @property
    def ttft(self) -> list[float]:
        """Time to first token of each request."""
        return [times[0] - self.arrived[name] for name, times in self.times.items()]

    @property
    def between(self) -> list[float]:
        """Times between tokens, over all requests."""
        return [gap for times in self.times.values() for gap in np.diff(times).tolist()]


def make_llm(
    model: str, *, blocks: int | None, settings: Mapping[str, Any] | None, **more: Any
) -> Any:
    """An engine with `blocks` KV blocks of 32 tokens; `settings` of kvswitch, None without it."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(MODELS / model),
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


def serve(
    llm: Any, items: Sequence[Item], *, on_step: Callable[[Any, int], None] | None = None
) -> Outcome:
    """Serve `items` as they arrive; what came out and when."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    outcome = Outcome()
    waiting = sorted((i for i in items if i.after is None), key=lambda item: item.arrival)
    followers = {item.after: item for item in items if item.after is not None}
    prompts: dict[str, list[int]] = {}
    ended: dict[str, float] = {}
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
            continue
        outputs = engine.step()
        now = time.perf_counter()
        outcome.steps += 1
        outcome.inversion += (now - last) * _inverted(scheduler)
        last = now
        for output in outputs:
            name = output.request_id
            ids = list(output.outputs[0].token_ids)
            new = len(ids) - len(outcome.tokens[name])
            outcome.tokens[name] = ids
            outcome.times[name] += [now - start] * new
            if output.finished:
                ended[name] = now - start
                if (follower := followers.pop(name, None)) is not None:
                    arrival = now - start + follower.arrival
                    waiting.append(Item(**{**vars(follower), "arrival": arrival}))
                    waiting.sort(key=lambda item: item.arrival)
        if on_step is not None:
            on_step(scheduler, outcome.steps)
    outcome.seconds = time.perf_counter() - start
    if scheduler.connector is not None and hasattr(scheduler.connector, "planning"):
        while scheduler.has_requests():  # let what is under way come to its end
            engine.engine_core.engine_core.step_fn()
        planning = scheduler.connector.planning
        planning.check_integrity()
        stats = planning.planner.stats()
        planning.take_counters()
        outcome.counters = {name: float(getattr(stats, name)) for name in stats.__slots__}
    return outcome


def _inverted(scheduler: Any) -> bool:
    """Whether somebody waits who is more important than one that runs."""
    if not scheduler.running or not scheduler.waiting:
        return False
    lowest = max(request.priority for request in scheduler.running)
    return any(request.priority < lowest for request in scheduler.waiting)


def close(llm: Any) -> None:
    """Give an engine's memory back."""
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()

"""Real vLLM in this process on tiny models, and helpers to put it under pressure."""

from __future__ import annotations

import gc
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    OMP_NUM_THREADS="1",
)

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from vllm import LLM, SamplingParams
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.lora.request import LoRARequest
    from vllm.platforms.cpu import CpuPlatform

MODELS = Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()


SETTINGS: dict[str, Any] = {
    "model": str(MODELS / "tiny"),
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 512,
    "block_size": 32,
    "max_num_seqs": 8,
    "seed": 0,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """vLLM warns of itself; here only what is tested counts."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


class Engine:
    """An engine, its scheduler and kvswitch's half of it, stepped by hand."""

    def __init__(self, **arguments: Any) -> None:
        self.llm = LLM(**arguments)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        connector = self.scheduler.connector
        self.planning = None if connector is None else connector.planning
        self.tokens: dict[str, list[int]] = {}

    @property
    def stats(self) -> Any:
        return self.planning.planner.stats()

    def add(
        self,
        name: str,
        prompt: list[int],
        output: int,
        priority: int = 0,
        lora: LoRARequest | None = None,
        **more: Any,
    ) -> None:
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": prompt, **more},
            SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, detokenize=False),
            lora_request=lora,
            priority=priority,
        )

    def add_batch(self, count: int, length: int, output: int, seed: int = 0) -> None:
        """Requests r0, r1, ... with random prompts, a little longer each."""
        for i, prompt in enumerate(random_prompts(count, length, seed)):
            self.add(f"r{i}", prompt, output)

    def batch(self, count: int) -> list[list[int]]:
        """Tokens of r0, r1, ..."""
        return [self.tokens[f"r{i}"] for i in range(count)]

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)

    def run(self, on_step: Callable[[int], None] | None = None) -> dict[str, list[int]]:
        """Until no request is left and nothing is under way; all tokens so far."""
        step = 0
        while self.llm.llm_engine.has_unfinished_requests():
            self.step()
            step += 1
            if on_step is not None:
                on_step(step)
        self.drain()
        return self.tokens

    def drain(self) -> None:
        """Let transfers come to their end, and see that nothing has leaked."""
        for _ in range(20_000):
            if not self.scheduler.has_requests():
                break
            self.core.step_fn()
        else:
            raise AssertionError("the engine does not come to rest")
        if self.planning is not None:
            self.planning.check_integrity()
            assert self.planning.planner.held_blocks == 0
            assert self.planning.planner.copies.num_leases() == 0
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1

    def caches(self) -> list[Any]:
        """The KV cache tensors of all layers."""
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        return list(runner.kv_caches)

    def poison_free_blocks(self) -> None:
        """Make KV that nobody may read any more visible, in all blocks without references.

        Those whose content can be hit in the prefix cache, or is still being read, are spared. Not
        by NaN: the CPU's attention multiplies what lies behind a sequence's end by 0.
        """
        leaving = self.planning.planner._leaving if self.planning is not None else {}
        free = [
            block.block_id
            for block in self.pool.blocks
            if block.ref_cnt == 0
            and block.block_hash is None
            and not block.is_null
            and block.block_id not in leaving
        ]
        for cache in self.caches():
            cache[free] = 50.0

    def close(self) -> None:
        if self.core is not None:
            self.llm.llm_engine.engine_core.shutdown()
            ensure_kv_transfer_shutdown()  # or the next engine in this process would have it
            self.core = None


@pytest.fixture
def make_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Engine]]:
    """Make engines on the tiny model; they are closed at the end."""
    engines: list[Engine] = []

    def make(
        switch: Mapping[str, Any] | None = None,
        *,
        blocks: int | None = None,
        asynchronous: bool = False,
        only_connector: bool = False,
        **arguments: Any,
    ) -> Engine:
        if asynchronous:  # which the CPU platform turns off
            check = CpuPlatform.check_and_update_config.__func__

            def keep_asynchronous(cls: Any, config: Any) -> None:
                check(cls, config)
                config.scheduler_config.async_scheduling = True

            monkeypatch.setattr(
                CpuPlatform, "check_and_update_config", classmethod(keep_asynchronous)
            )
        settings = dict(SETTINGS)
        if blocks is not None:
            settings["num_gpu_blocks_override"] = blocks + 1
        if switch is not None:
            from kvswitch_vllm.plugin import transfer_config

            settings["kv_transfer_config"] = transfer_config({"host_memory": "64MiB", **switch})
        if only_connector:
            name = "async_scheduler.AsyncScheduler" if asynchronous else "scheduler.Scheduler"
            settings["scheduler_cls"] = f"vllm.v1.core.sched.{name}"
        engine = Engine(**{**settings, **arguments})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
    engines.clear()
    gc.collect()


def random_prompts(count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 2000) for _ in range(tokens + 7 * i)] for i in range(count)]


@pytest.fixture(name="random_prompts")
def random_prompts_fixture() -> Callable[..., list[list[int]]]:
    """Random prompts, a little longer each: (count, tokens, seed)."""
    return random_prompts


_REFERENCE: list[list[int]] = []


@pytest.fixture
def reference() -> list[list[int]]:
    """Tokens of ``add_batch(8, 150, 120)`` with memory for all; computed once.

    Before the test makes its own engine: vLLM has one KV connector for a process.
    """
    if not _REFERENCE:
        engine = Engine(**SETTINGS)
        engine.add_batch(8, 150, 120)
        engine.run()
        _REFERENCE.extend(engine.batch(8))
        engine.close()
    return _REFERENCE

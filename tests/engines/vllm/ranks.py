"""Serve a batch on two tensor-parallel ranks, each a process; prints tokens and counters as JSON.

A program of its own: ranks are forked from a process that has not started threads yet.
"""

from __future__ import annotations

import json
import os
import random
import sys

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="0|1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="1",
)
os.environ.pop("OMP_NUM_THREADS", None)


def main(model: str, blocks: int) -> None:
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    from kvswitch_vllm.plugin import transfer_config

    rng = random.Random(0)
    prompts = [[rng.randrange(3, 2000) for _ in range(150 + 7 * i)] for i in range(6)]
    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        block_size=32,
        tensor_parallel_size=2,
        num_gpu_blocks_override=blocks,
        disable_log_stats=False,
        kv_transfer_config=transfer_config({"host_memory": "64MiB"}),
    )
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, detokenize=False),
        use_tqdm=False,
    )
    counters = {
        sample.name: sample.value
        for metric in REGISTRY.collect()
        if metric.name.startswith("kvswitch_")
        for sample in metric.samples
    }
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    print("RESULT", json.dumps({"tokens": tokens, "counters": counters}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

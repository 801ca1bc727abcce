"""vLLM with kvswitch in a Python program: an important request overtakes unimportant ones.

Run it in an environment with vLLM and kvswitch: ``python vllm_offline.py MODEL``. Give vLLM little
KV memory (here 64 blocks), or few slots, to see switches.
"""

from __future__ import annotations

import sys


def main(model: str) -> None:
    from prometheus_client import REGISTRY
    from vllm import LLM, SamplingParams

    from kvswitch_vllm.plugin import transfer_config

    llm = LLM(
        model,
        kv_transfer_config=transfer_config({"host_memory": "256MiB"}),
        max_model_len=1024,
        num_gpu_blocks_override=64,
        block_size=32,
        enforce_eager=True,
        disable_log_stats=False,
    )
    prompts = [f"Tell a long story about the number {i}." for i in range(24)]
    # A lower number is more important, as everywhere in vLLM.
    priorities = [0 if i == 23 else 1 for i in range(24)]
    answers = llm.generate(
        prompts,
        SamplingParams(temperature=0, max_tokens=150, ignore_eos=True),  # more than fits at once
        priority=priorities,
    )
    print(answers[23].outputs[0].text)
    for metric in REGISTRY.collect():
        for sample in metric.samples if metric.name.startswith("kvswitch_") else ():
            print(sample.name, sample.value)


if __name__ == "__main__":
    main(sys.argv[1])

"""kvswitch in SGLang, offline: an important request takes memory from others, and nothing is lost.

    python examples/sglang_offline.py MODEL ['{"page_size": 16, ...}']

The second argument has more settings for SGLang's engine. Needs ``pip install 'kvswitch[sglang]'``.
On a server the same is said by ``--radix-cache-backend kvswitch --enable-priority-scheduling``; see
docs/sglang.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

os.environ.setdefault("KVSWITCH_CONFIG", json.dumps({"host_memory": "2GiB"}))


async def ask(engine: Any, name: str, prompt: str, tokens: int, priority: int) -> dict[str, Any]:
    answer: dict[str, Any] = await engine.async_generate(
        prompt, {"temperature": 0, "max_new_tokens": tokens}, rid=name, priority=priority
    )
    return answer


async def serve(engine: Any) -> None:
    stories = [
        asyncio.create_task(ask(engine, f"story {i}", f"Chapter {i}. Once upon a time,", 300, 0))
        for i in range(1, 7)
    ]
    await asyncio.sleep(1)
    urgent = await ask(engine, "urgent", "The capital of France is", 30, priority=10)
    print("urgent:", urgent["text"].strip())
    print(sum(not story.done() for story in stories), "stories were still being told")
    # Priorities change while requests run or wait: nobody takes the last story's place any more.
    engine.collective_rpc("set_request_priority", rid="story 6", priority=5)
    for story in await asyncio.gather(*stories):
        about = story["meta_info"]
        print(f"{about['completion_tokens']} tokens, preempted {about['num_retractions']} times")


def main() -> None:
    import sglang

    engine = sglang.Engine(
        model_path=sys.argv[1],
        radix_cache_backend="kvswitch",
        enable_priority_scheduling=True,
        priority_scheduling_preemption_threshold=0,  # by default, only who is 11 above preempts
        max_total_tokens=1024,  # little, so that somebody has to give way
        **json.loads(sys.argv[2] if len(sys.argv) > 2 else "{}"),
    )
    engine.loop.run_until_complete(serve(engine))
    engine.shutdown()


if __name__ == "__main__":
    main()

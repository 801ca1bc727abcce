"""LoRA adapters: whose KV it is depends on the adapter, too."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.lora.request import LoRARequest
from weights import ADAPTER_RANK, write_adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        write_adapter(folder / f"a{seed}", seed)
    return [LoRARequest(f"a{seed}", seed, str(folder / f"a{seed}")) for seed in (1, 2)]


# One slot more than adapters: vLLM on a CPU gives requests without an adapter, beside others that
# have one, the weights in the last slot.
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": ADAPTER_RANK}


def test_adapters_are_kept_apart_on_the_host(
    make_engine: Any, random_prompts: Any, adapters: list[LoRARequest]
) -> None:
    """The same prompt comes back from the host for the adapter that computed it, for no other."""
    prompt, *others = random_prompts(6, 150)
    first, second = adapters
    engine = make_engine({}, blocks=16, **LORA)

    def fill() -> int:
        for i, other in enumerate(others):
            engine.add(f"other{i}", other, 40)
        engine.run()
        return int(engine.stats.resumptions)

    engine.add("first", prompt, 30, lora=first)
    engine.run()
    before = fill()
    engine.add("second", prompt, 30, lora=second)
    engine.add("none", prompt, 30)
    engine.run()
    assert engine.stats.resumptions == before
    before = fill()
    engine.add("first again", prompt, 30, lora=first)
    engine.run()
    assert engine.stats.resumptions == before + 1
    tokens = engine.tokens
    assert tokens["first again"] == tokens["first"]
    assert tokens["first"] != tokens["second"]  # else nothing could have been mistaken
    assert tokens["none"] not in (tokens["first"], tokens["second"])


def test_requests_with_adapters_are_switched(
    make_engine: Any, random_prompts: Any, adapters: list[LoRARequest]
) -> None:
    """Requests of two adapters and of none switch with each other; each keeps its tokens."""
    prompts = random_prompts(6, 150)
    whose = [None, *adapters] * 2

    def serve(engine: Any) -> dict[str, list[int]]:
        for i, (prompt, lora) in enumerate(zip(prompts, whose, strict=True)):
            engine.add(f"r{i}", prompt, 80, lora=lora)
        tokens: dict[str, list[int]] = engine.run()
        return tokens

    plain = make_engine(**LORA)
    expected = dict(serve(plain))
    plain.close()
    policy = {"policy": "random", "epoch": 6, "quantum": 2}
    settings = {"policy_settings": {"seed": 0, "sequences": 6, "epochs": 500}}
    engine = make_engine({**policy, **settings}, blocks=20, **LORA)
    assert serve(engine) == expected
    assert engine.stats.resumptions > 4

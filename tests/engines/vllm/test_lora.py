"""LoRA adapters: whose KV it is depends on the adapter, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

RANK = 8


def write_adapter(folder: Path, seed: int) -> None:
    """Random weights for Q and V of the tiny model, large enough to change what it says."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer in range(4):
        for name, width in (("q_proj", 256), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (RANK, 256)), ("lora_B", (width, RANK))):
                values = 0.3 * torch.randn(shape, generator=generator)
                weights[f"{prefix}.{part}.weight"] = values
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    for seed in (1, 2):
        write_adapter(folder / f"a{seed}", seed)
    return [LoRARequest(f"a{seed}", seed, str(folder / f"a{seed}")) for seed in (1, 2)]


# One slot more than adapters: vLLM on a CPU gives requests without an adapter, beside others that
# have one, the weights in the last slot.
LORA: dict[str, Any] = {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}


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

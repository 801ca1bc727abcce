"""SGLang's radix cache, with host copies of what leaves the device.

The tree stays SGLang's, and knows of the device only. What the host has is found by owner (a
request that was preempted) or by content (a later turn, another request), is reported as a host hit
behind the tree's match, and is loaded into slots of the request's own: these go into the tree with
everything else that it computes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.registry import create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import get_schedule

from kvswitch.messages import BlockIds
from kvswitch_sglang import checks
from kvswitch_sglang.allocator import GroupMixin, take_over
from kvswitch_sglang.control import Control, install_hooks, owner_of, signed
from kvswitch_sglang.keys import PageKeys
from kvswitch_sglang.metrics import Metrics
from kvswitch_sglang.overhead import Overhead
from kvswitch_sglang.settings import Settings, read_settings
from kvswitch_sglang.switching import LayerWaits, Switching, log

__all__ = ["KVSwitchRadixCache", "make_cache"]


def _priority_of(req: Any) -> float:
    """How important a request is; larger is more."""
    return 0.0 if req.priority is None else float(signed(req.priority))


class KVSwitchRadixCache(UnifiedRadixCache):
    """The tree cache of ``--radix-cache-backend kvswitch``.

    Attributes
    ----------
    switching : Switching
    control : Control
        What the scheduler asks.
    """

    switching: Switching | None = None  # None while SGLang's own part is being made
    control: Control

    def start(self, context: Any, settings: Settings) -> None:
        """Begin to switch."""
        overhead = Overhead()
        self._allocator: GroupMixin = take_over(self.token_to_kv_pool_allocator, settings, overhead)
        pages = self._allocator.pages
        kv_cache = self.token_to_kv_pool_allocator.get_kvcache()
        runner = context.tp_worker.model_runner
        layout = checks.cache_layout(kv_cache, pages.num_pages + 1, self.page_size)
        self._keys = PageKeys(self.page_size)
        self._private: dict[Hashable, torch.Tensor] = {}
        self._runner = runner
        self._on_cpu = torch.device(runner.device).type == "cpu"
        overlap = not get_schedule().disable_overlap_schedule
        switching = Switching(
            settings,
            pages,
            layout,
            on_cuda=not self._on_cpu,
            page_tokens=self.page_size,
            rank=context.tp_rank if context.tp_size > 1 else 0,
            num_ranks=context.tp_size,
            minimum=self._minimum,
            overhead=overhead,
            stream=runner.forward_stream if overlap and not self._on_cpu else None,
        )
        kv_cache.register_layer_transfer_counter(LayerWaits(switching))
        self.control = Control(self, switching, settings, overlap=overlap)
        self.metrics = Metrics(self, switching) if self._enable_metrics_flag else None
        self.switching = switching

    def begin_pass(self) -> None:
        """Begin a scheduling pass."""
        self._allocator.begin_pass()

    def end_pass(self) -> None:
        """End a scheduling pass: evict what the next one will need, if it is like this one.

        On a GPU what is evicted in the pass that needs it would have to be waited for, and so the
        forward under way.
        """
        if self._allocator.late:
            evict_from_tree_cache(self, self._allocator.taken * self.page_size)

    def _minimum(self, numbers: Any) -> Any:
        tensor = torch.from_numpy(numbers)
        self._all_reduce_attn_groups(tensor, torch.distributed.ReduceOp.MIN)
        return tensor.numpy()

    def _by_layer(self) -> bool:
        """Whether a prefill asks for its layers in Python, so that it can wait for each of them."""
        graphs = getattr(self._runner, "prefill_cuda_graph_runner", None)
        return graphs is None or type(graphs).__name__ == "EagerRunner"

    # -- what cannot be switched -------------------------------------------------------------------

    @staticmethod
    def switchable(req: Any) -> bool:
        """Whether a request's KV cache is a function of its token ids, and its own."""
        return (
            req.input_embeds is None
            and getattr(req, "positional_embed_overrides", None) is None
            and getattr(req, "beam_group", None) is None
            and not (req.session is not None and req.session.streaming)
        )

    def _keys_of(self, req: Any, tokens: Any, pages: int) -> list[bytes]:
        # SGLang appends the adapter's id to the key a client may choose: the two could be confused.
        namespace = (req.extra_key, getattr(req, "cache_salt", None) or None, req.lora_id)
        return self._keys.of(owner_of(req), tokens, pages, namespace)

    def _row(self, req: Any, tokens: int) -> BlockIds:
        """Pages of a request's first `tokens` tokens."""
        pages: BlockIds = self._slots(req, tokens).cpu().numpy().astype(np.int32) // self.page_size
        return pages

    def _slots(self, req: Any, tokens: int) -> Any:
        """First slots of these pages, on the device."""
        table = self.req_to_token_pool.req_to_token
        return table[req.kv.req_pool_idx, : tokens : self.page_size].contiguous()

    # -- coming ------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """What the tree has, and as a host hit what can be loaded behind it."""
        result = super().match_prefix(params)
        req, switching = params.req, self.switching
        if (
            req is None
            or switching is None
            or req.kv.holds_kv
            or result.device_prefix_len % self.page_size
            or not self.switchable(req)
        ):
            return result
        with switching.overhead:
            tokens = params.key.token_ids
            limit = min(len(params.key), len(tokens) - 1)  # its output is needed: one is computed
            have = 0
            if limit > result.device_prefix_len:
                keys = self._keys_of(req, tokens, limit // self.page_size)
                have = min(switching.reach(owner_of(req), keys), limit)
        if have <= result.device_prefix_len:
            return result
        return result._replace(
            last_host_node=result.best_match_node,
            host_hit_length=have - result.device_prefix_len,
        )

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any]:
        """Load the promised tokens, all of them or none: these are recomputed then."""
        req, switching = params.req, self.switching
        assert switching is not None
        promised = params.host_hit_length
        if promised <= 0:
            return 0, req.last_node
        owner, first, size = owner_of(req), req.prefix_len, self.page_size
        tokens = first + promised
        count = -(-tokens // size) - first // size
        with switching.overhead:
            keys = self._keys_of(req, req.full_untruncated_fill_ids, tokens // size)
            # Evicting may send what has ended, which must not take the place of these copies.
            switching.adopt(owner, keys, _priority_of(req))
        evict_from_tree_cache(self, count * size)
        with switching.overhead:
            evict_from_tree_cache(self, self._allocator.ample(count) * size)
            pages = None
            if switching.reach(owner, keys) >= tokens:  # none was lost since it was matched
                pages = self._allocator.alloc_for(owner, count)
            if pages is not None and switching.reach(owner, keys) < tokens:
                self._allocator.pages.give(pages)
                pages = None
            if pages is None:
                return 0, req.last_node
            switching.load(
                owner,
                first,
                tokens,
                pages,
                keys=keys,
                running=self.control.running,
                by_layer=self._by_layer(),
                priority=_priority_of(req),
            )
            slots = self._allocator.indices(pages)[:, None] * size
            slots = (slots + torch.arange(size, device=slots.device)).reshape(-1)
            self._private[owner] = slots[:promised]
        return promised, req.last_node

    def load_back_is_cache_owned(self) -> bool:
        """Loaded slots belong to the request until it checkpoints them."""
        return False

    def prefix_device_indices(self, req: Any) -> torch.Tensor:
        """Slots of a request's prefix: on the tree's path, and loaded behind it."""
        tail = self._private.get(owner_of(req))
        if tail is None:
            indices: torch.Tensor = super().prefix_device_indices(req)
            return indices
        path = self.tree_core.collect_full_device_indices(
            req.last_node, self.root_node_handle(req.extra_key)
        )
        return torch.cat([path, tail])[: req.prefix_len]

    def maybe_hand_to_session(self, req: Any) -> None:
        """Take note that a request's row has just been written, loaded slots included."""
        self._private.pop(owner_of(req), None)
        super().maybe_hand_to_session(req)

    # -- leaving -----------------------------------------------------------------------------------

    def claim_kv_row(self, req: Any) -> bool:
        """Take note that a request is about to give its row back."""
        switching = self.switching
        if super().claim_kv_row(req):  # a session keeps the row for its next turn
            if switching is not None:
                self._allocator.pages.forget(owner_of(req))
                if req.finished():
                    self._forget(owner_of(req), req.cache_request_handle)
            return True
        if switching is None or req.finished() or not req.kv.holds_kv:
            return False
        with switching.overhead:
            if req.to_finish is not None or not self.switchable(req):
                switching.drop(owner_of(req))
            elif self.control.is_lost(req):
                switching.lost(owner_of(req), req.owned_kv_len())
            else:
                self._preempt(switching, req)
        return False

    def _preempt(self, switching: Switching, req: Any) -> None:
        req.refresh_fill_ids()
        known = req.full_untruncated_fill_ids
        # With overlapped scheduling, a token may be under way whose id nobody knows yet.
        tokens = min(req.owned_kv_len(), len(known))
        switching.preempted(
            owner_of(req),
            tokens,
            self._row(req, tokens),
            keys=self._keys_of(req, known, tokens // self.page_size),
            priority=_priority_of(req),
        )

    def on_release(self, req: Any, *, checkpointed: bool) -> None:
        """Take note that a request's pages are the tree's now, or free."""
        super().on_release(req, checkpointed=checkpointed)
        switching = self.switching
        if switching is None:
            return
        with switching.overhead:
            self._allocator.pages.forget(owner_of(req))
            if req.finished() or req.to_finish is not None:
                self._ended(switching, req, kept=checkpointed and req.finished())

    def _ended(self, switching: Switching, req: Any, *, kept: bool) -> None:
        """`req` has ended, or was aborted for want of memory; `kept`: the tree has its pages."""
        owner = owner_of(req)
        if kept and self.switchable(req):
            tokens = req.kv.cache_protected_len
            keys = self._keys_of(req, req.full_untruncated_fill_ids, tokens // self.page_size)
            if self._allocator.late:
                # Nobody waits for them, and the stream would have to wait for the forward.
                self._allocator.later(
                    self._slots(req, tokens),
                    lambda slots: switching.ended(owner, slots // self.page_size, keys),
                )
            else:
                switching.ended(owner, self._row(req, tokens), keys)
        else:
            switching.drop(owner)
        self._forget(owner, req.cache_request_handle)

    def release_aborted_request(self, request: Any) -> None:
        """Forget a request that was aborted while it waited."""
        super().release_aborted_request(request)
        if self.switching is None:
            return
        owner = self.control.owner_of_handle(request)
        if owner is None:
            return
        self._allocator.pages.forget(owner)
        self.switching.left(owner)
        self._forget(owner, request)

    def _forget(self, owner: Hashable, handle: Hashable) -> None:
        self._keys.forget(owner)
        self.control.gone(handle)

    def reset(self) -> None:
        """No copy made before may be used after it (cache flushed, weights changed)."""
        if self.switching is not None:
            self._allocator.settle()
            self.switching.reset()
            self._private.clear()
        super().reset()

    def release_host_resources(self) -> None:
        """Give the host memory back."""
        if self.switching is not None:
            self.switching.close()
        super().release_host_resources()


def make_cache(context: Any) -> KVSwitchRadixCache:
    """Make the tree cache for SGLang's scheduler.

    Parameters
    ----------
    context : TreeCacheBuildContext

    Raises
    ------
    ConfigError
        A setting, the model, a flag, or this SGLang does not permit it.
    """
    settings = read_settings()
    checks.check_names()
    checks.check_context(context, settings)
    install_hooks()
    cache: KVSwitchRadixCache = create_unified_radix_cache(context, cache_class=KVSwitchRadixCache)
    cache.start(context, settings)
    switching = cache.switching
    assert switching is not None
    log.info(
        "kvswitch: %d host pages of %d bytes, page size %d, policy %s",
        switching.planner.copies.pool.num_blocks,
        switching.page_bytes,
        cache.page_size,
        settings.policy,
    )
    return cache

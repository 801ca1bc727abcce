"""Attention on a CPU, at the cost that other backends have.

SGLang's ``torch_native`` pads the rows of a prefill to its whole context. A request that resumes
with one token to compute then costs as much attention as if nothing of it had been kept. And it
leaves grouped heads to PyTorch, which with one row in bfloat16 takes six times as long for them as
for the same heads given as rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["install"]


def install() -> None:
    """Let ``torch_native`` compute causal attention so, in this process."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend as Backend

    if not hasattr(Backend, "plain_cpu"):
        Backend.plain_cpu = True
        Backend._run_sdpa_forward_extend = _extend(Backend._run_sdpa_forward_extend)
        Backend._run_sdpa_forward_decode = _decode(Backend._run_sdpa_forward_decode)


def _extend(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or not causal or is_cross_attn or _is(sliding_window_size):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal,
                is_cross_attn, sliding_window_size,
            )  # fmt: skip
        slots = _slots(req_to_token, req_pool_indices, seq_lens)
        _attend(query, output, k_cache, v_cache, slots, extend_seq_lens.tolist(), scaling)
        return output

    return run


def _decode(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        if encoder_lens is not None or is_cross_attn or _is(sliding_window_size):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        slots = _slots(req_to_token, req_pool_indices, seq_lens)
        _attend(query, output, k_cache, v_cache, slots, [1] * len(slots), scaling)
        return output

    return run


def _is(sliding_window: int | None) -> bool:
    return sliding_window is not None and sliding_window > -1


def _slots(
    req_to_token: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor
) -> list[torch.Tensor]:
    """Where each request's tokens are."""
    return [
        req_to_token[row, :length]
        for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)
    ]


def _attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: list[torch.Tensor],
    counts: list[int],
    scaling: float | None,
) -> None:
    """Causal attention of each request's last `counts` tokens, written to `output`.

    Parameters
    ----------
    query, output : Tensor
        Tokens of all requests, heads, size of a head.
    k_cache, v_cache : Tensor
        Slots, heads of keys and values, size of a head.
    """
    heads, size = k_cache.shape[1:]
    start = 0
    for where, count in zip(slots, counts, strict=True):
        rows = query[start : start + count]
        # Rows of a matrix are gathered much faster than parts of a tensor of three dimensions.
        keys, values = (
            c.flatten(1).index_select(0, where).unflatten(1, (heads, size)).movedim(0, 1)
            for c in (k_cache, v_cache)
        )
        keys, values = keys.to(rows.dtype), values.to(rows.dtype)
        if count == 1:  # query heads that share keys are as many rows
            found = scaled_dot_product_attention(
                rows.unflatten(1, (heads, -1))[0][None], keys[None], values[None], scale=scaling
            )
            output[start] = found[0].flatten(0, 1)
        else:
            total = len(where)
            mask = None
            if count < total:
                mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            found = scaled_dot_product_attention(
                rows.movedim(0, 1)[None], keys[None], values[None], attn_mask=mask,
                is_causal=mask is None, scale=scaling, enable_gqa=True,
            )  # fmt: skip
            output[start : start + count] = found[0].movedim(1, 0)
        start += count

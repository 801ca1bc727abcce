"""Attention of prefills, at the cost that other backends have.

SGLang's ``torch_native`` pads the rows of a prefill to its whole context. A request that resumes
with one token to compute then costs as much attention as if nothing of it had been kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["install"]


def install() -> None:
    """Let ``torch_native`` compute the rows of a prefill and no others, in this process."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    original = TorchNativeAttnBackend._run_sdpa_forward_extend
    if getattr(original, "rows_only", False):
        return

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
        window = sliding_window_size is not None and sliding_window_size > -1
        if encoder_lens is not None or not causal or is_cross_attn or window:
            return original(  # type: ignore[no-any-return]
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens,
                extend_prefix_lens, extend_seq_lens, encoder_lens, scaling, enable_gqa, causal,
                is_cross_attn, sliding_window_size,
            )  # fmt: skip
        start = 0
        for row, total, count in zip(
            req_pool_indices.tolist(), seq_lens.tolist(), extend_seq_lens.tolist(), strict=True
        ):
            slots = req_to_token[row, :total]
            rows = query[start : start + count].movedim(0, 1)
            keys, values = (c[slots].movedim(0, 1).to(rows.dtype) for c in (k_cache, v_cache))
            whole = count == total
            mask = None
            if not whole and count > 1:
                mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            found = scaled_dot_product_attention(
                rows[None], keys[None], values[None], attn_mask=mask, is_causal=whole,
                scale=scaling, enable_gqa=enable_gqa,
            )  # fmt: skip
            output[start : start + count] = found[0].movedim(1, 0)
            start += count
        return output

    run.rows_only = True  # type: ignore[attr-defined]
    TorchNativeAttnBackend._run_sdpa_forward_extend = run

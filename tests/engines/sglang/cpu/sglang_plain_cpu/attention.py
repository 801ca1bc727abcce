"""Attention on a CPU, at the cost that other backends have.

SGLang's ``torch_native`` pads the rows of a prefill to its whole context. A request that resumes
with one token to compute then costs as much attention as if nothing of it had been kept. And it
leaves grouped heads to PyTorch, which with one row in bfloat16 takes several times as long for them
as for the same heads given as rows.
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
        Backend._run_sdpa_forward_extend = _in_place_of(Backend._run_sdpa_forward_extend)
        Backend._run_sdpa_forward_decode = _in_place_of(Backend._run_sdpa_forward_decode)


def _in_place_of(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        *rest: torch.Tensor | None,
        **named: Any,
    ) -> torch.Tensor:
        # Prefills: tokens before, tokens to compute, encoder's tokens; decoding: the last of them.
        *extends, encoder_lens = rest
        special = encoder_lens is not None or named["is_cross_attn"]
        special |= named["sliding_window_size"] is not None
        if special or (extends and not named["causal"]):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, rows, lengths, *rest, **named
            )
        slots = _slots(req_to_token, rows, lengths)
        counts = extends[1].tolist() if extends else [1] * len(slots)
        _attend(query, output, k_cache, v_cache, slots, counts, named["scaling"])
        return output

    return run


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

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
        slots = req_to_token[rows, : int(lengths.max())]
        if not extends or int(extends[1].max()) == 1:
            _attend_last(query, output, k_cache, v_cache, slots, lengths, named["scaling"])
            return output
        start = 0
        for i, count in enumerate(extends[1].tolist()):
            here = slice(start, start + count)
            own, length = slots[i : i + 1, : int(lengths[i])], lengths[i : i + 1]
            if count == 1:
                _attend_last(
                    query[here], output[here], k_cache, v_cache, own, length, named["scaling"]
                )
            else:
                _attend(query[here], output[here], k_cache, v_cache, own, named["scaling"])
            start += count
        return output

    return run


def _attend_last(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float | None,
) -> None:
    """Attention of each request's last token to all of its tokens, written to `output`.

    Parameters
    ----------
    query, output : Tensor
        Requests, heads, size of a head.
    k_cache, v_cache : Tensor
        Slots, heads of keys and values, size of a head.
    slots : Tensor
        Requests, tokens of the longest: where they are. What is behind a request's own is anything.
    lengths : Tensor
        Tokens of each request.
    """
    inside = torch.arange(slots.shape[1]) < lengths[:, None]
    slots = torch.where(inside, slots, slots[:, :1])  # a masked NaN would still be one
    keys, values = (_gather(cache, slots).to(query.dtype) for cache in (k_cache, v_cache))
    found = scaled_dot_product_attention(
        query.unflatten(1, (keys.shape[1], -1)),  # heads that share keys are as many rows
        keys,
        values,
        attn_mask=inside[:, None, None],
        scale=scaling,
    )
    output.copy_(found.flatten(1, 2))


def _attend(
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    scaling: float | None,
) -> None:
    """Causal attention of one request's last tokens, as many as `query` has; see `_attend_last`."""
    count, total = len(query), slots.shape[1]
    keys, values = (_gather(cache, slots).to(query.dtype) for cache in (k_cache, v_cache))
    mask = None
    if count < total:
        mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
    found = scaled_dot_product_attention(
        query.movedim(0, 1)[None], keys, values, attn_mask=mask,
        is_causal=mask is None, scale=scaling, enable_gqa=True,
    )  # fmt: skip
    output.copy_(found[0].movedim(1, 0))


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Keys or values of `slots`: requests, heads, tokens, size of a head."""
    # Rows of a matrix are gathered much faster than parts of a tensor of three dimensions.
    rows = cache.flatten(1).index_select(0, slots.flatten())
    return rows.view(*slots.shape, *cache.shape[1:]).movedim(1, 2)

"""Matrices of bfloat16 on a CPU, at the cost that other builds have.

Without ``sgl_kernel`` weights stay as they were loaded, and oneDNN arranges them for its kernels
anew with each call. For the few rows of a decode step that takes as long as the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["install"]


def install() -> None:
    """Let linear layers and the output matrix keep their weights arranged, in this process."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

    if not hasattr(UnquantizedLinearMethod, "plain_cpu"):
        UnquantizedLinearMethod.plain_cpu = True
        UnquantizedLinearMethod.apply = _of_layer(UnquantizedLinearMethod.apply)
        LogitsProcessor._compute_lm_head = _of_output(LogitsProcessor._compute_lm_head)


def _of_layer(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(
        self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if layer.weight.dtype != torch.bfloat16:
            return original(self, layer, x, bias)
        return _product(x, layer.weight, bias)

    return apply


def _of_output(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def compute(self: Any, x: torch.Tensor, head: Any, *rest: Any, **named: Any) -> torch.Tensor:
        if getattr(head, "weight", x).dtype != torch.bfloat16 or hasattr(head, "set_lora"):
            return original(self, x, head, *rest, **named)
        return _product(x, head.weight, None)

    return compute


def _product(x: torch.Tensor, weight: Any, bias: torch.Tensor | None) -> torch.Tensor:
    if not hasattr(weight, "plain_cpu"):  # as it was loaded: later changes would be missed
        weight.plain_cpu = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight.plain_cpu, bias, "none", [], ""
    )
    return found

"""Entry point of the platform: nothing heavy is imported before SGLang asks for it."""

from __future__ import annotations

import sys
from contextlib import suppress

_kept: list[object] = []  # a library's operators live as long as it does


def activate() -> str | None:
    """Name the platform's class, unless there is a GPU."""
    import torch

    if torch.cuda.is_available():
        return None
    if "torchvision" not in sys.modules:
        _let_torchvision_load(torch)
    return "sglang_plain_cpu.platform.PlainCpuPlatform"


def _let_torchvision_load(torch: object) -> None:
    """Declare the operators that a torchvision built for CUDA cannot load with a CPU torch.

    SGLang imports it with its model configurations; none of its operators is called.
    """
    with suppress(RuntimeError):  # declared already
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)

"""LoRA without pinned memory: SGLang's ``torch_native`` backend asks for it everywhere."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["install"]


class _Unpinned:
    """Stands for the module `torch` in modules that pin what they make."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return torch.tensor(*args, **more)

    def zeros(self, *args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return torch.zeros(*args, **more)

    def empty(self, *args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return torch.empty(*args, **more)


def install() -> None:
    """Let nothing of it be pinned, in this process."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = _Unpinned()
    torch.Tensor.pin_memory = lambda self, device=None: self

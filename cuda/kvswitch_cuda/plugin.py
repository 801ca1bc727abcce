"""Registers the CUDA backend with kvswitch; needs no CUDA until a backend is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvswitch.hooks import hookimpl
from kvswitch.transfer import Backend, Layout

if TYPE_CHECKING:
    from kvswitch_cuda.backend import CopiesName

__all__ = ["kvswitch_backends"]


@hookimpl
def kvswitch_backends(layout: Layout) -> Mapping[str, Callable[[], Backend]]:
    """Backends by name: "cuda" chooses by measurement, the others copy in one way always."""

    def maker(copies: CopiesName) -> Callable[[], Backend]:
        def make() -> Backend:
            from kvswitch_cuda.backend import CudaBackend
            from kvswitch_cuda.driver import device_of

            return CudaBackend(device_of(layout.regions[0].address), copies=copies)

        return make

    return {
        "cuda": maker("auto"),
        "cuda-batch": maker("batch"),
        "cuda-loop": maker("loop"),
        "cuda-kernel": maker("kernel"),
    }

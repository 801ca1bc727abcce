"""The baseline of the paper: one synchronous copy for every block, layer, and K or V.

This is how vLLM swapped while it still did: the engine waits while block after block goes out or
in, whole contexts each time, one direction after the other (figure 6a of the paper). The copies are
written as well as such copies can be: addresses are prepared beforehand, and nothing but the copy
call itself is in the loop.
"""

from __future__ import annotations

import ctypes
import time
from threading import Lock
from typing import Any

import torch

from kvswitch import Layout, Region
from kvswitch.messages import Direction
from kvswitch.transfer import Backend, Copies, Event

__all__ = ["PerBlockBackend", "per_layer_layout"]


def per_layer_layout(kv_cache: torch.Tensor) -> Layout:
    """Describe a [blocks, layers, 2, ...] cache as one region for each layer's K and V."""
    blocks, layers, two = kv_cache.shape[:3]
    stride = kv_cache.stride(0) * kv_cache.element_size()
    nbytes = stride // (layers * two)
    base = kv_cache.data_ptr()
    return Layout(
        tuple(Region(base + part * nbytes, stride, nbytes) for part in range(layers * two)), blocks
    )


class _Now:
    """An event that is reached when it is recorded: copies are over when their call returns."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.time = time.perf_counter()

    def done(self) -> bool:
        return True

    def wait(self, timeout: float | None = None) -> bool:
        return True


class _SynchronousQueue:
    def __init__(self, bandwidth: float | None, one_at_a_time: Lock) -> None:
        self._bandwidth = bandwidth
        self._one_at_a_time = one_at_a_time

    def copy(self, copies: Copies, start: int, stop: int) -> None:
        sizes = copies.nbytes[start:stop]
        pieces = copies.dst[start:stop].tolist(), copies.src[start:stop].tolist(), sizes.tolist()
        with self._one_at_a_time:
            copy, begin = ctypes.memmove, time.perf_counter()
            for target, source, nbytes in zip(*pieces, strict=True):
                copy(target, source, nbytes)
            if self._bandwidth:  # the link is no faster than in the other modes
                time.sleep(max(0.0, begin + sizes.sum() / self._bandwidth - time.perf_counter()))

    def record(self, event: Event | None = None) -> Event:
        return _Now()

    def wait(self, event: Event) -> None:
        pass


class PerBlockBackend(Backend):
    """Copies in the thread that asks for it, piece by piece, both directions in series."""

    coalesce = False

    def __init__(self, bandwidth: float | None = None) -> None:
        self._bandwidth = bandwidth
        self._one_at_a_time = Lock()

    def open_queue(self, direction: Direction) -> _SynchronousQueue:
        return _SynchronousQueue(self._bandwidth, self._one_at_a_time)

    def event(self) -> Event:
        return _Now()

    def fence(self, stream: object | None) -> Any:
        return None

    def close(self) -> None:
        pass

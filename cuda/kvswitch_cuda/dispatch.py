"""Giving windows to the driver, one after the other, without taking the GIL in between.

A dispatcher that comes back to Python for each window waits for the GIL each time, and beside a
thread that computes in Python that takes 5 ms: far longer than the window itself. So the loop over
windows is compiled by numba to run without the GIL. Where numba is missing the same function runs
in Python: as right, but slow beside a busy thread.

With *device-paced* windows each one goes to the other of two streams, which waits for the event
behind the one before::

    stream 0   window 0, event 0           wait 1, window 2, event 0
    stream 1             wait 0, window 1, event 1           wait 0, window 3

Copy engines serve the stream they are at as long as it has copies ready, whatever others wait. At
each wait here it has none, so a small copy of the inference engine gets in between windows, though
all windows have been queued and no thread has to wake up for the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from kvswitch_cuda.driver import Driver

__all__ = ["PIECES", "Slot", "Way", "make_dispatch"]

PIECES: Final = 1024  # most pieces of one kernel launch: what its parameters hold (copy_runs.cu)

Words = npt.NDArray[np.int64]

_log = logging.getLogger("kvswitch")


class Way(IntEnum):
    """How a window is copied."""

    BATCH = 0  # one cuMemcpyBatchAsync
    LOOP = 1  # a cuMemcpyAsync for each piece
    KERNEL = 2  # threads of the GPU's multiprocessors, see copy_runs.cu


class Slot(IntEnum):
    """Places in a queue's array of words, which the dispatch loop reads."""

    TAIL = 0  # which of the two streams was given the last window
    PACED = 1  # 1: windows alternate between the streams
    STREAM = 2  # and 3
    PACE = 4  # and 5: the event behind what each stream has been given
    ATTRIBUTES = 6  # address of a CUmemcpyAttributes
    FIRST = 7  # address of the index of the first copy that they are for: 0
    FAILED = 8  # address of the index of a copy that was refused
    FUNCTION = 9  # the kernel
    GRID = 10
    BLOCK = 11
    ARGUMENTS = 12  # address of the array of addresses of the kernel's parameters


@cache
def make_dispatch(
    driver: Driver,
) -> Callable[[Words, Words, Words, Words, Words, Words, Words], int]:
    """Make the function that dispatches windows; compiling it takes about a second, once.

    Returns
    -------
    callable
        ``(words, parameters, dst, src, nbytes, edges, ways) -> CUresult``, of the call that failed
        or 0: int64 arrays, window k being copies ``edges[k]`` up to ``edges[k + 1]``.
    """
    python = _python_dispatch(driver)
    try:
        from numba import njit
    except ImportError:
        _log.warning(
            "without numba, copies slow down while other threads compute in Python: "
            "pip install 'kvswitch[cuda]'"
        )
        return python
    words = "int64[::1]"
    signature = f"int64({', '.join([words] * 7)})"
    compiled: Callable[..., int] = njit(signature, nogil=True)(python)
    return compiled


def _python_dispatch(driver: Driver) -> Callable[..., int]:
    """The loop, in Python that numba compiles: plain numbers, no objects."""
    batch, copy, launch = driver.batch, driver.copy, driver.launch
    record, wait = driver.record, driver.wait
    # Numbers, not enumerations, are compiled.
    tail_, paced, streams, paces = (int(s) for s in (Slot.TAIL, Slot.PACED, Slot.STREAM, Slot.PACE))
    attributes, first_, failed = int(Slot.ATTRIBUTES), int(Slot.FIRST), int(Slot.FAILED)
    function, grid, block, arguments = (
        int(s) for s in (Slot.FUNCTION, Slot.GRID, Slot.BLOCK, Slot.ARGUMENTS)
    )
    by_batch, by_loop, pieces = int(Way.BATCH), int(Way.LOOP), PIECES

    def dispatch(  # type: ignore[no-untyped-def]
        words, parameters, dst, src, nbytes, edges, ways
    ):
        to, at, size = dst.ctypes.data, src.ctypes.data, nbytes.ctypes.data
        for window in range(len(edges) - 1):
            tail = int(words[tail_])
            if words[paced]:
                code = record(int(words[paces + tail]), int(words[streams + tail]))
                if code != 0:
                    return code
                tail = 1 - tail
                code = wait(int(words[streams + tail]), int(words[paces + 1 - tail]), 0)
                if code != 0:
                    return code
                words[tail_] = tail
            stream = int(words[streams + tail])
            begin, end = int(edges[window]), int(edges[window + 1])
            if ways[window] == by_batch:
                code = batch(
                    int(to) + 8 * begin,
                    int(at) + 8 * begin,
                    int(size) + 8 * begin,
                    end - begin,
                    int(words[attributes]),
                    int(words[first_]),
                    1,
                    int(words[failed]),
                    stream,
                )
                if code != 0:
                    return code
            elif ways[window] == by_loop:
                for i in range(begin, end):
                    code = copy(int(dst[i]), int(src[i]), int(nbytes[i]), stream)
                    if code != 0:
                        return code
            else:
                for first in range(begin, end, pieces):
                    count = min(pieces, end - first)
                    parameters[0] = count
                    for i in range(count):  # slices take numba seconds to compile
                        parameters[1 + i] = dst[first + i]
                        parameters[1 + pieces + i] = src[first + i]
                        parameters[1 + 2 * pieces + i] = nbytes[first + i]
                    code = launch(
                        int(words[function]),
                        int(words[grid]),
                        1,
                        1,
                        int(words[block]),
                        1,
                        1,
                        0,
                        stream,
                        int(words[arguments]),
                        0,
                    )
                    if code != 0:
                        return code
        return 0

    return dispatch


def attributes_of_stream_order() -> npt.NDArray[np.int32]:
    """A CUmemcpyAttributes (24 bytes): sources are read in stream order, no hints, no flags.

    Any other order would let a copy read its source before what the stream waits for.
    """
    attributes = np.zeros(6, np.int32)
    attributes[0] = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
    return attributes

"""Copying scattered pieces of this process's memory without holding the GIL.

There are two ways. ``process_vm_readv`` on our own process copies up to 1024 pieces in one call, so
that the GIL is taken once for all of them; but the kernel goes page by page, at half to nine tenths
of the speed of one large memcpy (it depends on huge pages and alignment). One ``memmove`` for each
piece has full speed, but takes the GIL each time, and that costs 5 ms whenever another thread
computes in Python. So large pieces go one by one until such a wait is met, then all at once.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from typing import Final

import numpy as np

from kvswitch.errors import TransferError
from kvswitch.transfer.plan import Copies

__all__ = ["Pieces"]

_LARGE: Final = 256 << 10  # bytes from which a memmove is worth a Python call
_SLOW: Final = 2e9  # bytes/s; a copy slower than this has been waiting for something else
_IOV_MAX: Final = 1024  # most pieces the kernel takes in one call


class Pieces:
    """One window's pieces. Made where it is dispatched, to spare the copying thread the work.

    Parameters
    ----------
    copies : Copies
    start, stop : int
        The pieces are ``copies[start:stop]``.
    """

    def __init__(self, copies: Copies, start: int, stop: int) -> None:
        nbytes = copies.nbytes[start:stop]
        self.nbytes: Final = int(nbytes.sum())
        # As the kernel's struct iovec: address and length, for destinations and for sources.
        self._iov: Final = np.empty((2, stop - start, 2), np.uint64)
        self._iov[0, :, 0] = copies.dst[start:stop]
        self._iov[1, :, 0] = copies.src[start:stop]
        self._iov[:, :, 1] = nbytes

    def __len__(self) -> int:
        return self._iov.shape[1]

    def move(self, *, one_by_one: bool = True) -> bool:
        """Copy everything.

        Parameters
        ----------
        one_by_one : bool
            Whether large pieces may be copied one by one.

        Returns
        -------
        bool
            Whether the GIL came back promptly, as far as can be told: if not, better not try
            `one_by_one` again for a while.

        Raises
        ------
        TransferError
            If the memory is not there (any more), where the kernel does the copying.
        """
        if _readv is None or len(self) == 1:
            self._move_each(patient=True)
            return True
        done = 0
        if one_by_one and self.nbytes >= len(self) * _LARGE:
            done = self._move_each(patient=False)
        self._move_from(done)
        return done in (0, len(self))

    def _move_each(self, *, patient: bool) -> int:
        """Copy one by one, until the GIL is slow to come if not `patient`; how many it was."""
        dst, src = self._iov.tolist()
        for i, ((to, nbytes), (at, _)) in enumerate(zip(dst, src, strict=True)):
            begun = time.perf_counter()
            ctypes.memmove(to, at, nbytes)
            if not patient:
                # Who has to wait for a thread that computes waits for a switch interval.
                limit = sys.getswitchinterval() / 2 + nbytes / _SLOW
                if time.perf_counter() - begun > limit:
                    return i + 1
        return len(dst)

    def _move_from(self, first: int) -> None:
        """Copy all from the piece `first` on, in as few calls as possible."""
        assert _readv is not None
        dst, src = self._iov
        to, at, pid = dst.ctypes.data, src.ctypes.data, os.getpid()
        left = int(dst[first:, 1].sum()) if first else self.nbytes
        while left:
            count = min(_IOV_MAX, len(self) - first)
            moved = _readv(pid, to + 16 * first, count, at + 16 * first, count, 0)
            if moved <= 0:
                reason = os.strerror(ctypes.get_errno()) if moved < 0 else "nothing was copied"
                raise TransferError(f"copying {count} pieces of memory failed: {reason}")
            left -= moved
            if left:
                first += self._skip(first, count, moved)

    def _skip(self, first: int, count: int, moved: int) -> int:
        """How many whole pieces `moved` bytes are; one copied in part is cut down to its rest.

        The kernel stops early after 2 GiB, and before memory that is not there.
        """
        pieces = self._iov[:, first : first + count]
        end = np.cumsum(pieces[0, :, 1])
        whole = int(np.searchsorted(end, moved, side="right"))
        part = moved - (int(end[whole - 1]) if whole else 0)
        if part:
            pieces[:, whole, 0] += np.uint64(part)
            pieces[:, whole, 1] -= np.uint64(part)
        return whole


def _find_readv() -> Callable[..., int] | None:
    """The C library's process_vm_readv; None where it is missing or refused (seccomp)."""
    try:
        readv = ctypes.CDLL(None, use_errno=True).process_vm_readv
    except (AttributeError, OSError):
        return None
    word, pointer = ctypes.c_ulong, ctypes.c_void_p
    readv.argtypes = [ctypes.c_int, pointer, word, pointer, word, word]
    readv.restype = ctypes.c_ssize_t
    probe = np.array([0, 7], np.uint8)
    dst = np.array([probe.ctypes.data, 1], np.uint64)
    src = np.array([probe.ctypes.data + 1, 1], np.uint64)
    moved = readv(os.getpid(), dst.ctypes.data, 1, src.ctypes.data, 1, 0)
    return readv if moved == 1 and probe[0] == 7 else None


_readv: Final = _find_readv()

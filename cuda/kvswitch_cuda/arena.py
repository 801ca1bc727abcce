"""Pinned host memory: what a copy engine can reach by itself."""

from __future__ import annotations

import mmap
import resource
from contextlib import suppress
from typing import Final

from kvswitch.errors import ConfigError, TransferError
from kvswitch.transfer import HostArena
from kvswitch_cuda.context import Context

__all__ = ["PinnedArena"]

_STEP: Final = 1 << 30  # bytes registered at once: the driver serves nobody else meanwhile
_FLAGS: Final = 1 | 2  # CU_MEMHOSTREGISTER_PORTABLE | DEVICEMAP


class PinnedArena(HostArena):
    """A host arena that is registered with CUDA: exactly the bytes asked for.

    Pages are populated in parallel first: the driver would do it one by one, and let all other CUDA
    calls wait. Then they are registered in steps, which bounds that wait. No copy may cross from
    one registration to the next; `seams` keeps plans from doing so.

    Parameters
    ----------
    nbytes : int
    device : int
        Number of the GPU whose context registers it; other devices may use it, too.

    Raises
    ------
    ConfigError
        The memory is not to be had (see `HostArena`), or cannot be pinned. Nothing is kept then.
    """

    def __init__(self, nbytes: int, device: int = 0) -> None:
        context = Context(device)
        try:
            super().__init__(nbytes)
        except BaseException:
            context.close()
            raise
        with suppress(OSError):
            # A fork would copy what is pinned, all of it and at once.
            self._memory.madvise(mmap.MADV_DONTFORK)
        self._context: Final = context
        self._registered: Final[list[int]] = []
        self.seams = tuple(range(self.address + _STEP, self.address + nbytes, _STEP))
        try:
            with context:
                for start in (self.address, *self.seams):
                    length = min(_STEP, self.address + nbytes - start)
                    context.driver("cuMemHostRegister", start, length, _FLAGS)
                    self._registered.append(start)
        except TransferError as error:
            pinned = len(self._registered) * _STEP
            self.close()
            raise ConfigError(_refusal(nbytes, pinned, error)) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unregister and give back the memory. No copy may be under way. May be called again."""
        if hasattr(self, "_registered"):  # not while it could not even be populated
            if self._registered:
                with suppress(TransferError), self._context:  # a lost context has let go of it
                    for start in self._registered:
                        self._context.driver("cuMemHostUnregister", start)
                self._registered.clear()
            self._context.close()
        super().close()


def _refusal(nbytes: int, pinned: int, error: Exception) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = (
        f"; locked memory is limited to {soft >> 10} KiB (ulimit -l, docker --ulimit memlock=-1)"
        if 0 <= soft < nbytes
        else ""
    )
    return (
        f"CUDA pins no more than {pinned / 2**30:.2f} of {nbytes / 2**30:.2f} GiB of host memory "
        f"({error}){limit}. Ask for less host memory, or stop what else pins it"
    )

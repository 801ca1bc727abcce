"""Host memory for copies of blocks: exactly as much as was asked for, present before it is used."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError
from kvswitch.transfer.layout import Layout, Region

__all__ = ["HostArena"]

_POPULATE_WRITE: Final = 23  # MADV_POPULATE_WRITE, Linux 5.14
_STEP: Final = 64 << 20  # bytes populated by one thread in one call


class HostArena:
    """A private, anonymous mapping of host memory, populated in parallel.

    Parameters
    ----------
    nbytes : int

    Raises
    ------
    ConfigError
        If `nbytes` is not positive, or more than the machine or a control group has left. Nothing
        has been reserved then.

    Attributes
    ----------
    nbytes, address : int
    seams : tuple of int
        See `Layout`.

    Notes
    -----
    Keep the arena open as long as a `TransferEngine` uses a layout of it. `close` gives the memory
    back at once, unless an array from `view` is alive: then when the last of these goes.
    """

    seams: tuple[int, ...] = ()

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ConfigError(f"host memory must be at least one block, not {nbytes} bytes")
        for limit in _limits(Path("/proc"), Path("/sys/fs/cgroup")):
            if nbytes > limit.free:
                raise ConfigError(
                    f"host memory of {_gib(nbytes)} does not fit: {limit.name} leaves "
                    f"{_gib(limit.free)}. {limit.remedy}, or ask for less"
                )
        self.nbytes: Final = nbytes
        try:
            self._memory: Final = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise _refused(nbytes, error) from error
        with suppress(OSError):  # huge pages where the kernel has them: they copy twice as fast
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.address: Final = self.view().ctypes.data
        try:
            self._populate()
        except OSError as error:
            self.close()
            raise _refused(nbytes, error) from error

    def view(self) -> npt.NDArray[np.uint8]:
        """All of it as an array: uint8, shape [nbytes]."""
        return np.frombuffer(self._memory, np.uint8)

    def layout(self, device: Layout) -> Layout:
        """Lay out as many blocks like the device's as fit, region after region.

        The blocks of a region adjoin, so that what is contiguous in ids is contiguous in bytes.

        Raises
        ------
        ConfigError
            If not even one block fits, or the arena is closed.
        """
        if self._memory.closed:
            raise ConfigError("the host arena is closed: make a new one")
        blocks = self.nbytes // device.block_bytes
        if not blocks:
            raise ConfigError(
                f"host memory of {self.nbytes} bytes cannot hold one block, which takes "
                f"{device.block_bytes} bytes"
            )
        regions, address = [], self.address
        for region in device.regions:
            regions.append(Region(address, region.nbytes, region.nbytes))
            address += blocks * region.nbytes
        return Layout(tuple(regions), blocks, self.seams)

    def close(self) -> None:
        """Give the memory back (see Notes). May be called again."""
        with suppress(BufferError):  # some view is alive
            self._memory.close()

    def _populate(self) -> None:
        """Touch every page, in parallel, so that no copy has to stop for one."""
        madvise = ctypes.CDLL(None, use_errno=True).madvise  # mmap.madvise would keep the GIL
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

        def populate(start: int) -> None:
            address, nbytes = self.address + start, min(_STEP, self.nbytes - start)
            if madvise(address, nbytes, _POPULATE_WRITE):
                code = ctypes.get_errno()
                if code != errno.EINVAL:
                    raise OSError(code, os.strerror(code))
                ctypes.memset(address, 0, nbytes)  # a kernel older than that advice

        threads = min(8, len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(threads, "kvswitch-populate") as pool:
            for _ in pool.map(populate, range(0, self.nbytes, _STEP)):
                pass


def _refused(nbytes: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"the system refuses {_gib(nbytes)} of host memory ({error.strerror}). Raise the limit on "
        "address space (ulimit -v) or vm.overcommit_memory, or ask for less"
    )


class _Limit(NamedTuple):
    name: str
    free: int
    remedy: str


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def _limits(proc: Path, cgroup: Path) -> Iterator[_Limit]:
    """What bounds the memory that can be had, as far as it can be read."""
    with suppress(OSError, ValueError, KeyError):
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) << 10
        yield _Limit("the machine's free memory", free, "Stop what else uses memory")
    with suppress(OSError):
        for line in (proc / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                names, root = ("memory.max", "memory.current", "inactive_file"), cgroup
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
                root = cgroup / "memory"
            else:
                continue
            # A group is bound by its ancestors, too; in a container only the root may be visible.
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                yield from _group_limit(folder, *names)
                if folder == root:
                    break


def _group_limit(folder: Path, limit: str, usage: str, inactive: str) -> Iterator[_Limit]:
    """The limit of one control group, if it has one. Inactive page cache counts as free."""
    with suppress(OSError, ValueError):
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        free = most - used + int(stat.get(inactive, 0))
        yield _Limit(
            f"{limit} of the control group {folder}",
            max(0, free),
            "Raise it (docker run --memory, systemd MemoryMax=, resources.limits.memory)",
        )

"""Which way of copying is the fastest for pieces of which size and number: measured, and kept."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvswitch.messages import Direction
from kvswitch_cuda.dispatch import Way
from kvswitch_cuda.kernel import cache_folder

__all__ = ["CopyTable", "Sample"]

_FORMAT: Final = 1
# The kernel takes multiprocessors from the model: it has to be this much faster to be chosen.
_KERNEL_ADVANTAGE: Final = 1.5
_WINDOW_SECONDS: Final = 80e-6  # what a small copy of the engine waits for a window at most

_log = logging.getLogger("kvswitch")


class Sample(msgspec.Struct, frozen=True):
    """`count` pieces of `nbytes` each took `seconds`."""

    direction: int
    way: int
    nbytes: int
    count: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.nbytes * self.count / self.seconds


class CopyTable(msgspec.Struct, frozen=True):
    """Measurements of one GPU on one machine.

    Attributes
    ----------
    gpu : str
        Model and unique id.
    driver : int
        Version of the driver's API.
    samples : list of Sample
    """

    gpu: str
    driver: int
    samples: list[Sample]
    format: int = _FORMAT

    def bandwidth(self, direction: Direction) -> float:
        """The highest bandwidth measured, in bytes per second."""
        return max(s.bandwidth for s in self.samples if s.direction == direction)

    @property
    def window_bytes(self) -> int:
        """A window that the slower direction moves in about 80 us, in whole MiB."""
        slower = min(self.bandwidth(direction) for direction in Direction)
        return max(1, round(slower * _WINDOW_SECONDS / (1 << 20))) << 20

    def choices(self, direction: Direction) -> Choices:
        """The best way for each size and count that was measured."""
        samples = [s for s in self.samples if s.direction == direction]
        sizes = sorted({s.nbytes for s in samples})
        counts = sorted({s.count for s in samples})
        best = np.zeros((len(sizes), len(counts)), np.int64)
        for i, size in enumerate(sizes):
            for j, count in enumerate(counts):
                # Of large pieces not many were measured: the nearest number that was.
                near = min(
                    (s.count for s in samples if s.nbytes == size),
                    key=lambda c: abs(np.log2(c / count)),
                )
                seconds = {
                    s.way: s.seconds * (_KERNEL_ADVANTAGE if s.way == Way.KERNEL else 1)
                    for s in samples
                    if (s.nbytes, s.count) == (size, near)
                }
                best[i, j] = min(seconds, key=seconds.__getitem__)
        return Choices(np.log2(sizes), np.log2(counts), best)

    def save(self, path: Path | None = None) -> Path | None:
        """Write it where `load` finds it; where that is, or None if there is no place."""
        path = path or _place(self.gpu, self.driver)
        if path is None:
            return None
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            unfinished.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
            unfinished.replace(path)
        except OSError as error:
            _log.warning("the table of copy measurements is not kept: %s", error)
            return None
        return path

    @classmethod
    def load(cls, gpu: str, driver: int) -> CopyTable | None:
        """The table of that GPU and driver; None if none has been measured here."""
        path = _place(gpu, driver)
        if path is not None:
            with suppress(OSError, msgspec.DecodeError):
                table = msgspec.json.decode(path.read_bytes(), type=cls)
                if (table.gpu, table.driver, table.format) == (gpu, driver, _FORMAT):
                    return table
        return None


class Choices:
    """Looks up the way of windows by the mean size and the number of their pieces."""

    def __init__(
        self,
        sizes: npt.NDArray[np.float64],
        counts: npt.NDArray[np.float64],
        best: npt.NDArray[np.int64],
    ) -> None:
        self.best: Final = best
        # A size belongs to the nearest one measured, on a logarithmic scale.
        self._sizes: Final = np.exp2((sizes[1:] + sizes[:-1]) / 2)
        self._counts: Final = np.exp2((counts[1:] + counts[:-1]) / 2)

    def ways(
        self, nbytes: npt.NDArray[np.uint64], edges: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """A `Way` for each window; window k is pieces ``edges[k]`` up to ``edges[k + 1]``."""
        count = np.diff(edges)
        total = np.add.reduceat(nbytes[: edges[-1]], edges[:-1])
        size = np.searchsorted(self._sizes, total / count)
        ways: npt.NDArray[np.int64] = self.best[size, np.searchsorted(self._counts, count)]
        return ways


def _place(gpu: str, driver: int) -> Path | None:
    folder = cache_folder()
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return folder / f"copies-{name}-{driver}.json" if folder else None

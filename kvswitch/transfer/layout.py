"""Where the bytes of blocks lie: one region per layer (or each layer's K and V), or one for all.

::

    region 0   | block 0 | block 1 | block 2 | ...        block i of a region lies at
    region 1   | block 0 | block 1 | block 2 | ...        address + i * stride, nbytes long
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError

__all__ = ["Layout", "Region", "layout_of"]


@dataclass(frozen=True)
class Region:
    """A strided array of blocks in memory.

    Attributes
    ----------
    address : int
        Where block 0 starts.
    stride : int
        Bytes from the start of one block to the start of the next.
    nbytes : int
        Bytes of one block in this region; at most `stride`, or blocks would overlap.

    Raises
    ------
    ConfigError
        If these do not describe blocks that lie apart.
    """

    address: int
    stride: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.address < 0 or self.nbytes < 1:
            raise ConfigError(f"{self}: address must be >= 0 and nbytes >= 1")
        if self.stride < self.nbytes:
            raise ConfigError(
                f"{self}: blocks overlap, the stride must be at least the bytes of one block"
            )


@dataclass(frozen=True)
class Layout:
    """All regions that hold a part of every block. A block moves whole: its part in each of them.

    A layout is addresses only. It does not keep the memory alive: whoever made it from arrays must
    hold these (and a `HostArena` must stay open) until the engine that uses it is closed.

    Attributes
    ----------
    regions : tuple of Region
    num_blocks : int
        Blocks 0 .. num_blocks - 1 exist in every region.
    seams : tuple of int
        Addresses, ascending, that no copy may cross: where one registration of pinned memory ends
        and the next begins.

    Raises
    ------
    ConfigError
        If there is no region or no block, or two regions share bytes.
    """

    regions: tuple[Region, ...]
    num_blocks: int
    seams: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.regions:
            raise ConfigError("a layout needs at least one region: pass the KV cache's arrays")
        if not 1 <= self.num_blocks < 2**31:
            raise ConfigError(f"a layout has 1 to 2**31 - 1 blocks, not {self.num_blocks}")
        for one, other in combinations(sorted(self.regions, key=lambda r: r.address), 2):
            if self._share_bytes(one, other):
                raise ConfigError(
                    f"{one} and {other} share bytes over {self.num_blocks} blocks: "
                    "pass each array once"
                )

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of one block over all regions."""
        return sum(region.nbytes for region in self.regions)

    @cached_property
    def table(self) -> npt.NDArray[np.uint64]:
        """Address, stride and nbytes of every region: uint64, shape [3, regions]."""
        rows = [(region.address, region.stride, region.nbytes) for region in self.regions]
        return np.array(rows, np.uint64).T.copy()

    @cached_property
    def dense(self) -> bool:
        """Whether neighbouring blocks adjoin in every region, so that a run is one copy in each."""
        return all(region.stride == region.nbytes for region in self.regions)

    def mirrors(self, other: Layout) -> bool:
        """Whether blocks can be copied between the two: the same bytes in the same regions."""
        return [r.nbytes for r in self.regions] == [r.nbytes for r in other.regions]

    def merged(self) -> Layout:
        """The same bytes with regions joined whose parts of each block adjoin.

        Where a cache keeps all layers of a block together, but hands out a tensor for each layer,
        the layers are woven regions of one stride: joined, a run of blocks is a single copy.
        """
        joined: list[Region] = []
        for region in sorted(self.regions, key=lambda r: r.address):
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.stride == region.stride
                and last.address + last.nbytes == region.address
                and last.nbytes + region.nbytes <= last.stride
            ):
                joined[-1] = Region(last.address, last.stride, last.nbytes + region.nbytes)
            else:
                joined.append(region)
        return Layout(tuple(joined), self.num_blocks, self.seams)

    def _share_bytes(self, low: Region, high: Region) -> bool:
        """Whether blocks of `low` and `high` (which starts no lower) overlap."""
        if high.address >= low.address + (self.num_blocks - 1) * low.stride + low.nbytes:
            return False
        if low.stride != high.stride:
            return (
                True  # woven with different strides: could be apart, but no cache looks like that
            )
        offset = (high.address - low.address) % low.stride
        return offset < low.nbytes or offset + high.nbytes > low.stride


def layout_of(arrays: Any) -> Layout:
    """Read the layout off the arrays that hold a KV cache.

    Parameters
    ----------
    arrays : array or sequence of arrays
        One for each layer, or for each layer's K and V, or one for all layers; the block is the
        first dimension of each. numpy arrays, anything with ``__array_interface__``, and torch
        tensors on any device. They must outlive every use of the layout.

    Raises
    ------
    ConfigError
        If something is not such an array, blocks are not contiguous, or their number differs.
    """
    # A tensor is a sequence of sorts, too; only arrays have a shape.
    listed: Sequence[Any] = [arrays] if hasattr(arrays, "shape") else list(arrays)
    found = [_region_of(array, f"array {i}") for i, array in enumerate(listed)]
    counts = sorted({blocks for _, blocks in found})
    if len(counts) > 1:
        raise ConfigError(
            f"arrays have different numbers of blocks {counts}: the first dimension of each must "
            "be the block (K and V stacked before it are passed as two arrays)"
        )
    return Layout(tuple(region for region, _ in found), counts[0] if counts else 1)


def _region_of(array: Any, name: str) -> tuple[Region, int]:
    """Region and number of blocks of one array."""
    if hasattr(array, "data_ptr"):  # torch: asked for by its looks, so that nothing imports it
        address, itemsize = array.data_ptr(), array.element_size()
        shape = tuple(array.shape)
        strides = tuple(step * itemsize for step in array.stride())
    elif hasattr(array, "__array_interface__"):
        view = np.asarray(array)
        if not view.flags.writeable:
            raise ConfigError(f"{name} is read-only: swapped-in blocks are written to it")
        address, itemsize = view.ctypes.data, view.itemsize
        shape, strides = view.shape, view.strides
    else:
        raise ConfigError(f"{name} is a {type(array).__name__}, not a numpy array or torch tensor")
    if not shape or 0 in shape:
        raise ConfigError(f"{name} has shape {shape}: it holds no blocks")
    nbytes = itemsize
    # The order of dimensions inside a block does not matter, as long as they fill it.
    for step, length in sorted(zip(strides[1:], shape[1:], strict=True)):
        if length > 1 and step != nbytes:
            raise ConfigError(
                f"{name}: the bytes of one block are not contiguous (shape {shape}, strides in "
                f"bytes {strides}). Make the block the outermost dimension; where K and V are "
                "stacked before it, pass them as two arrays"
            )
        nbytes *= length
    blocks = shape[0]
    return Region(address, strides[0] if blocks > 1 else nbytes, nbytes), blocks

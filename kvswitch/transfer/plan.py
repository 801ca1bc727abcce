"""From block ids to copies: runs of blocks, then byte ranges in every region, cut into windows.

Everything is a handful of numpy operations over whole arrays; nothing is done per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import BlockIds, Runs
from kvswitch.transfer.layout import Layout

__all__ = ["Copies", "coalesce", "lower"]

Bytes = npt.NDArray[np.uint64]
"""Addresses or byte counts, shape [n]."""

_LARGEST = np.iinfo(np.int32).max

# A copy is not cut within this fraction of a window from either of its ends.
_SNAP = 16


@dataclass(frozen=True, eq=False)
class Copies:
    """Contiguous copies as a driver's batch call wants them: C-contiguous arrays, one per field.

    Attributes
    ----------
    src, dst, nbytes : ndarray
        uint64, shape [n]: addresses and length of each copy.
    windows : ndarray
        int64, shape [w + 1]: window k is copies windows[k] .. windows[k + 1] - 1.
    num_copies : int
        Copies before any was cut at the edge of a window or at a seam; what the granularity of a
        transfer is counted in.
    """

    src: Bytes
    dst: Bytes
    nbytes: Bytes
    windows: npt.NDArray[np.int64]
    num_copies: int


def coalesce(src_ids: BlockIds, dst_ids: BlockIds) -> Runs:
    """Merge pairs of block ids into runs.

    Parameters
    ----------
    src_ids, dst_ids : BlockIds
        Shape [n]: block ``src_ids[i]`` is to be copied to block ``dst_ids[i]``. In any order.

    Returns
    -------
    Runs
        int32, shape [m, 3], ascending by source: pairs adjacent on both sides make one run.

    Raises
    ------
    TransferError
        If the ids do not pair up.
    """
    if src_ids.ndim != 1 or src_ids.shape != dst_ids.shape:
        raise TransferError(
            f"source and destination ids must pair up: shapes {src_ids.shape} and {dst_ids.shape}"
        )
    runs = np.empty((len(src_ids), 3), np.int32)
    runs[:, 0], runs[:, 1], runs[:, 2] = src_ids, dst_ids, 1
    return _merge(runs)


def count_blocks(runs: Runs, src: Layout, dst: Layout) -> int:
    """Blocks of `runs`; TransferError unless it is int32 [n, 3] and all exist on both sides."""
    if runs.ndim != 2 or runs.shape[1] != 3 or runs.dtype != np.int32:
        raise TransferError(f"runs must be int32 [n, 3], not {runs.dtype} {list(runs.shape)}")
    if not len(runs):
        return 0
    unsigned = runs.view(np.uint32)  # in which what is negative is larger than any other
    blocks = np.ascontiguousarray(unsigned[:, 2])
    longest = int(blocks.max())
    highest = [int(unsigned[:, side].max()) for side in range(2)]
    if max(*highest, longest) > _LARGEST or not blocks.all():
        raise TransferError("runs must have block ids >= 0 and at least one block each")
    for side, layout in enumerate((src, dst)):
        if highest[side] + longest <= layout.num_blocks:
            continue
        last = int(np.add(runs[:, side], blocks, dtype=np.int64).max()) - 1
        if last >= layout.num_blocks:
            raise TransferError(
                f"{'destination' if side else 'source'} block {last} does not exist: "
                f"there are {layout.num_blocks}"
            )
    return len(runs) if longest == 1 else int(blocks.sum())


def lower(
    runs: Runs, src: Layout, dst: Layout, *, window_bytes: int, coalesce: bool = True
) -> Copies:
    """Turn runs of blocks into copies of bytes, region by region, grouped in windows.

    Parameters
    ----------
    runs : Runs
        Runs of `src` blocks and `dst` blocks, in any order.
    src, dst : Layout
        Same bytes per block in the same regions; only addresses and strides may differ.
    window_bytes : int
        Most bytes a window, and hence a copy, may hold.
    coalesce : bool
        False: one copy for each block and region, as if nothing were contiguous.

    Returns
    -------
    Copies
        Region by region; inside one ascending by source and merged where adjacent on both sides.
        No window holds more than `window_bytes`; all but the last hold at least 3/4 of it. Copies
        up to 1/8 of a window are never cut, and no piece cut off is under 1/16 of it, except at
        the seams of a layout.

    Raises
    ------
    ConfigError
        If the layouts do not mirror each other, or `window_bytes` < 1.
    TransferError
        If a block does not exist.
    """
    if not src.mirrors(dst):
        raise ConfigError("source and destination layouts differ in regions or bytes per block")
    if window_bytes < 1:
        raise ConfigError(f"window_bytes must be at least 1, not {window_bytes}")
    count_blocks(runs, src, dst)
    if coalesce:
        runs = _merge(runs)
    if not (coalesce and src.dense and dst.dense):
        runs = _split(runs)
    first_src, first_dst, blocks = runs.astype(np.uint64).T
    # [regions, 1] and [runs] broadcast to [regions, runs]. All in one allocation: a large one gets
    # huge pages, and most of the time would go into touching small ones.
    fields = np.empty((3, len(src.regions), len(runs)), np.uint64)
    for layout, first, addresses in ((src, first_src, fields[0]), (dst, first_dst, fields[1])):
        start, stride, _ = layout.table[:, :, None]
        np.multiply(stride, first, out=addresses)
        np.add(addresses, start, out=addresses)
    np.multiply(src.table[2][:, None], blocks, out=fields[2])
    at, to, nbytes = fields.reshape(3, -1)
    num_copies = len(at)
    if src.seams:
        at, to, nbytes = _cut_at(src.seams, at, to, nbytes)
    if dst.seams:
        to, at, nbytes = _cut_at(dst.seams, to, at, nbytes)
    return _cut(at, to, nbytes, num_copies, window_bytes)


def _merge(runs: Runs) -> Runs:
    """Sort by source and join runs that adjoin on both sides."""
    if len(runs) < 2:
        return runs
    if (runs[1:, 0] < runs[:-1, 0]).any():
        runs = runs[np.argsort(runs[:, 0], kind="stable")]
    src, dst, blocks = runs.T
    starts = np.empty(len(runs), np.bool_)
    starts[0] = True
    np.not_equal(src[1:], src[:-1] + blocks[:-1], out=starts[1:])
    starts[1:] |= dst[1:] != dst[:-1] + blocks[:-1]
    first = np.flatnonzero(starts)
    if len(first) == len(runs):
        return runs
    merged = runs[first]
    merged[:, 2] = np.add.reduceat(blocks, first)
    return merged


def _split(runs: Runs) -> Runs:
    """Runs of one block each."""
    src, dst, blocks = runs.T
    total = int(blocks.sum())
    if total == len(runs):
        return runs
    # Position i of the output is block i - before[run] of its run.
    before = np.cumsum(blocks) - blocks
    single = np.empty((total, 3), np.int32)
    position = np.arange(total)
    single[:, 0] = position + np.repeat(src - before, blocks)
    single[:, 1] = position + np.repeat(dst - before, blocks)
    single[:, 2] = 1
    return single


def _cut_at(
    seams: Sequence[int], here: Bytes, there: Bytes, nbytes: Bytes
) -> tuple[Bytes, Bytes, Bytes]:
    """Cut copies where they cross a seam on one side; that side first, in and out."""
    edges = np.array(seams, np.uint64)
    first = np.searchsorted(edges, here, side="right")  # the first seam behind the copy's start
    pieces = np.searchsorted(edges, here + nbytes, side="left") - first + 1
    total = int(pieces.sum())
    if total == len(here):
        return here, there, nbytes
    owner = np.repeat(np.arange(len(here)), pieces)
    number = np.arange(total) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    seam = first[owner] + number  # that the piece ends at, unless it is the last one
    stop = here + nbytes
    begins: Bytes = np.where(number == 0, here[owner], edges[np.maximum(seam - 1, 0)])
    ends = np.where(
        number == pieces[owner] - 1, stop[owner], edges[np.minimum(seam, len(edges) - 1)]
    )
    offsets: Bytes = begins - here[owner]
    lengths: Bytes = ends - begins
    return begins, there[owner] + offsets, lengths


def _cut(src: Bytes, dst: Bytes, nbytes: Bytes, num_copies: int, window_bytes: int) -> Copies:
    """Group copies in windows; they were `num_copies` before they were cut at seams.

    The copies are laid end to end and cut every `step` bytes. A cut that falls within `snap` bytes
    of an end of a copy moves there, which makes a window up to 2 * snap longer or shorter; `step`
    leaves room for that.
    """
    end = np.cumsum(nbytes)
    total = int(end[-1]) if len(src) else 0
    if total <= window_bytes:
        edges = [0, len(src)] if len(src) else [0]
        return Copies(src, dst, nbytes, np.array(edges, np.int64), num_copies)
    snap = window_bytes // _SNAP
    step = window_bytes - 2 * snap
    cuts = np.arange(step, total, step, dtype=np.uint64)
    owner = np.searchsorted(end, cuts)  # the copy with begin < cut <= end
    stop = end[owner]
    begin = stop - nbytes[owner]
    to_begin, to_stop = cuts - begin, stop - cuts
    at_stop = to_stop <= np.minimum(to_begin, snap)
    at_begin = ~at_stop & (to_begin <= snap)
    inside = ~(at_stop | at_begin)
    # The copy each window starts with, counting the pieces cut off before it.
    first = owner + ~at_begin
    first += np.cumsum(inside) - inside
    if inside.any():
        at, owner, offset = first[inside], owner[inside], to_begin[inside]
        src = np.insert(src, owner + 1, src[owner] + offset)
        dst = np.insert(dst, owner + 1, dst[owner] + offset)
        rest = nbytes[owner] - offset
        nbytes = np.insert(nbytes, owner + 1, rest)
        nbytes[at - 1] -= rest  # of a copy cut more than once, each piece but the last
    windows = np.concatenate([[0], first[first < len(src)], [len(src)]])
    return Copies(src, dst, nbytes, windows, num_copies)

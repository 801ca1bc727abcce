"""From block ids to copies, against moving one byte after the other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Runs
from kvswitch.transfer import Copies, Layout, Region, coalesce, lower


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def pairs_of(runs: Runs) -> list[tuple[int, int]]:
    return [(src + i, dst + i) for src, dst, count in runs.tolist() for i in range(count)]


@st.composite
def pairings(draw: st.DrawFn, blocks: int = 24) -> tuple[list[int], list[int]]:
    """Source and destination blocks, often contiguous, in any order."""
    pieces = draw(st.lists(st.tuples(st.integers(0, blocks), st.integers(1, 5)), max_size=6))
    src = list(
        dict.fromkeys(b for first, n in pieces for b in range(first, min(first + n, blocks)))
    )
    dst = draw(st.permutations(range(blocks))) if draw(st.booleans()) else list(range(blocks))
    order = draw(st.permutations(range(len(src))))
    return [src[i] for i in order], [dst[: len(src)][i] for i in order]


@st.composite
def mirrored_layouts(draw: st.DrawFn, blocks: int = 24) -> tuple[Layout, Layout]:
    """Two layouts with the same bytes per block, with and without gaps."""
    parts = draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))
    layouts = []
    for _ in range(2):
        regions, address = [], draw(st.integers(0, 8))
        for nbytes in parts:
            stride = nbytes + draw(st.sampled_from([0, 0, 0, 3]))
            regions.append(Region(address, stride, nbytes))
            address += blocks * stride + draw(st.integers(0, 8))
        layouts.append(Layout(tuple(regions), blocks))
    return layouts[0], layouts[1]


def apply(copies: Copies, src: np.ndarray, dst: np.ndarray) -> np.ndarray:
    """Copy from one toy memory to another; how often each byte of `dst` was written."""
    writes = np.zeros(len(dst), int)
    for at, to, n in zip(copies.src, copies.dst, copies.nbytes, strict=True):
        dst[int(to) : int(to + n)] = src[int(at) : int(at + n)]
        writes[int(to) : int(to + n)] += 1
    return writes


def check_windows(copies: Copies, window_bytes: int) -> None:
    edges = copies.windows.tolist()
    per_window = np.array([copies.nbytes[a:b].sum() for a, b in pairwise(edges)])
    assert edges[0] == 0
    assert edges[-1] == len(copies.src)
    assert (per_window >= 1).all()
    assert (per_window <= window_bytes).all()
    assert (4 * per_window[:-1] >= 3 * window_bytes).all()


@settings(deadline=None)
@given(pairings())
def test_coalesced_runs_are_the_same_pairs_and_cannot_be_merged(
    pairing: tuple[list[int], list[int]],
) -> None:
    src, dst = pairing
    runs = coalesce(ids(*src), ids(*dst))
    assert runs.dtype == np.int32
    assert runs.shape[1:] == (3,)
    assert pairs_of(runs) == sorted(zip(src, dst, strict=True))
    for (a, b, n), (c, d, _) in zip(runs.tolist(), runs.tolist()[1:], strict=False):
        assert (c, d) != (a + n, b + n)


def test_contiguous_ids_are_one_run_in_whatever_order_they_come() -> None:
    src, dst = np.arange(100, dtype=np.int32), np.arange(200, 300, dtype=np.int32)
    shuffled = np.random.default_rng(1).permutation(100)
    for order in (slice(None), slice(None, None, -1), shuffled):
        assert coalesce(src[order], dst[order]).tolist() == [[0, 200, 100]]


def test_runs_end_where_either_side_jumps() -> None:
    assert coalesce(ids(1, 2, 3, 5), ids(7, 8, 10, 11)).tolist() == [
        [1, 7, 2],
        [3, 10, 1],
        [5, 11, 1],
    ]


def test_nothing_coalesces_to_nothing() -> None:
    assert coalesce(ids(), ids()).shape == (0, 3)


def test_ids_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(TransferError, match="pair up"):
        coalesce(ids(1, 2), ids(1))


@settings(deadline=None)
@given(pairings(), mirrored_layouts(), st.integers(1, 200), st.booleans(), st.booleans())
@example(([0, 1, 2, 3], [0, 1, 2, 3]), (Layout((Region(0, 24, 24),), 24),) * 2, 16, True, True)
def test_lowered_copies_move_exactly_the_bytes_of_the_blocks(
    pairing: tuple[list[int], list[int]],
    layouts: tuple[Layout, Layout],
    window_bytes: int,
    merge: bool,
    runs_are_merged: bool,
) -> None:
    src, dst = layouts
    runs = coalesce(ids(*pairing[0]), ids(*pairing[1]))
    if not runs_are_merged:
        runs = np.array([(*pair, 1) for pair in zip(*pairing, strict=True)], np.int32).reshape(
            -1, 3
        )
    copies = lower(runs, src, dst, window_bytes=window_bytes, coalesce=merge)

    before = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    expected, actual = np.zeros((2, 4096), np.uint8)
    touched = np.zeros(4096, int)
    for a, b in zip(*pairing, strict=True):
        for one, other in zip(src.regions, dst.regions, strict=True):
            at, to = one.address + a * one.stride, other.address + b * other.stride
            expected[to : to + one.nbytes] = before[at : at + one.nbytes]
            touched[to : to + one.nbytes] += 1
    assert (apply(copies, before, actual) == touched).all()
    assert (actual == expected).all()

    check_windows(copies, window_bytes)
    for array in (copies.src, copies.dst, copies.nbytes):
        assert array.flags.c_contiguous
        assert array.dtype == np.uint64


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.integers(16, 640))
def test_small_copies_are_not_cut_and_no_slivers_are_left(sizes: list[int], window: int) -> None:
    # One region per size, and one block: copies of just these sizes.
    addresses = np.cumsum([0, *(size + 1 for size in sizes)])[:-1].tolist()
    regions = tuple(Region(a, n, n) for a, n in zip(addresses, sizes, strict=True))
    layout = Layout(regions, 1)
    copies = lower(np.array([[0, 0, 1]], np.int32), layout, layout, window_bytes=window)
    assert copies.num_copies == len(sizes)
    check_windows(copies, window)
    for address, size in zip(addresses, sizes, strict=True):
        inside = (copies.src >= address) & (copies.src < address + size)
        pieces = copies.nbytes[inside].tolist()
        assert sum(pieces) == size
        if 8 * size <= window:
            assert len(pieces) == 1
        if len(pieces) > 1:
            assert min(pieces) * 16 >= window


def test_a_run_is_one_copy_in_every_region_where_blocks_adjoin() -> None:
    dense = Layout((Region(0, 64, 64), Region(10_000, 64, 64)), 100)
    gaps = Layout((Region(0, 64, 64), Region(10_000, 80, 64)), 100)
    runs = np.array([[5, 7, 10], [20, 40, 30]], np.int32)
    assert lower(runs, dense, dense, window_bytes=1 << 20).nbytes.tolist() == [
        640, 1920, 640, 1920,
    ]  # fmt: skip
    for src, dst in ((dense, gaps), (gaps, dense)):
        assert lower(runs, src, dst, window_bytes=1 << 20).num_copies == 80


def test_copies_are_counted_before_windows_cut_them() -> None:
    layout = Layout((Region(0, 1000, 1000),), 100)
    runs = np.array([[0, 0, 100]], np.int32)
    copies = lower(runs, layout, layout, window_bytes=4096)
    assert copies.num_copies == 1
    assert len(copies.src) == len(copies.windows) - 1 > 24


def test_a_backend_that_wants_it_gets_one_copy_per_block_and_region() -> None:
    layout = Layout((Region(0, 64, 64), Region(10_000, 32, 32)), 100)
    runs = np.array([[5, 7, 10]], np.int32)
    copies = lower(runs, layout, layout, window_bytes=1 << 20, coalesce=False)
    assert copies.nbytes.tolist() == [64] * 10 + [32] * 10


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize("window", [700, 1 << 20])
def test_no_copy_crosses_a_seam(side: str, window: int) -> None:
    rng = np.random.default_rng(0)
    seams = (1000, 1024, 3000, 3001, 4700)
    for _ in range(100):
        device = Layout((Region(10_000, 48, 48),), 100)
        host = Layout((Region(40, 48, 48),), 100, seams)
        src, dst = (host, device) if side == "source" else (device, host)
        ids = rng.permutation(100)[: rng.integers(1, 100)].astype(np.int32)
        runs = coalesce(np.sort(ids), np.sort(ids)) if rng.random() < 0.5 else coalesce(ids, ids)
        copies = lower(runs, src, dst, window_bytes=window)
        whole = lower(runs, Layout(src.regions, 100), Layout(dst.regions, 100), window_bytes=window)
        here = (copies.src if side == "source" else copies.dst).astype(np.int64)
        end = here + copies.nbytes.astype(np.int64)
        assert (copies.nbytes > 0).all()
        for seam in seams:
            assert not ((here < seam) & (seam < end)).any()
        moved = [bytes_moved(c) for c in (copies, whole)]
        assert moved[0] == moved[1]
        assert copies.num_copies == whole.num_copies


def bytes_moved(copies: Copies) -> dict[int, int]:
    """Source of each destination byte."""
    columns = copies.src.tolist(), copies.dst.tolist(), copies.nbytes.tolist()
    return {to + i: at + i for at, to, n in zip(*columns, strict=True) for i in range(n)}


def test_no_runs_are_no_copies_in_no_windows() -> None:
    layout = Layout((Region(0, 64, 64),), 10)
    for merge in (True, False):
        copies = lower(np.empty((0, 3), np.int32), layout, layout, window_bytes=64, coalesce=merge)
        assert copies.num_copies == len(copies.src) == 0
        assert copies.windows.tolist() == [0]


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        ([[0, 0, 11]], "source block 10 does not exist"),
        ([[8, 0, 2], [9, 2, 2]], "source block 10 does not exist"),
        ([[0, 15, 6]], "destination block 20 does not exist"),
        ([[2**31 - 1, 0, 2**31 - 1]], "source block"),  # the sum overflows int32
        ([[-1, 0, 2]], "block ids >= 0"),
        ([[0, -1, 2]], "block ids >= 0"),
        ([[0, 0, 0]], "at least one block"),
        ([[0, 0, -1]], "at least one block"),
        ([[0, 0]], "must be int32"),
        ([0, 0, 1], "must be int32"),
    ],
)
def test_runs_of_blocks_that_do_not_exist_are_refused(runs: list[object], reason: str) -> None:
    src, dst = Layout((Region(0, 8, 8),), 10), Layout((Region(0, 8, 8),), 20)
    with pytest.raises(TransferError, match=reason):
        lower(np.array(runs, np.int32), src, dst, window_bytes=64)


def test_runs_of_another_type_are_refused() -> None:
    layout = Layout((Region(0, 8, 8),), 10)
    with pytest.raises(TransferError, match="must be int32"):
        lower(np.array([[0, 0, 1]], np.int64), layout, layout, window_bytes=64)  # type: ignore[arg-type]


def test_layouts_that_do_not_mirror_each_other_are_refused() -> None:
    runs = np.array([[0, 0, 1]], np.int32)
    src, dst = Layout((Region(0, 8, 8),), 10), Layout((Region(0, 16, 16),), 10)
    with pytest.raises(ConfigError, match="differ"):
        lower(runs, src, dst, window_bytes=64)
    with pytest.raises(ConfigError, match="window_bytes"):
        lower(runs, src, src, window_bytes=0)

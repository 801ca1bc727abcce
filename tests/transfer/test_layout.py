"""Where blocks lie: regions, layouts, and reading them off arrays."""

from __future__ import annotations

import numpy as np
import pytest

from kvswitch.errors import ConfigError
from kvswitch.transfer import Layout, Region, layout_of


class FakeTensor:
    """As much of a torch tensor as layout_of looks at; on a device, so with no array interface."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self._array.ctypes.data

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self._array.itemsize for step in self._array.strides)

    def element_size(self) -> int:
        return self._array.itemsize


def test_layout_has_one_region_per_array() -> None:
    layers = [np.zeros((10, 2, 16, 4), np.float16) for _ in range(3)]
    layout = layout_of(layers)
    assert layout.num_blocks == 10
    assert layout.block_bytes == 3 * 2 * 16 * 4 * 2
    assert [region.address for region in layout.regions] == [a.ctypes.data for a in layers]
    assert {(region.stride, region.nbytes) for region in layout.regions} == {(256, 256)}
    assert layout.dense


def test_one_array_is_a_layout_of_one_region() -> None:
    cache = np.zeros((5, 8), np.float32)
    assert layout_of(cache) == layout_of([cache])
    assert layout_of(cache).regions == (Region(cache.ctypes.data, 32, 32),)


def test_k_and_v_stacked_before_the_block_are_two_regions() -> None:
    cache = np.zeros((2, 10, 64), np.uint8)
    k, v = layout_of(cache).num_blocks, layout_of([cache[0], cache[1]]).num_blocks
    assert (k, v) == (2, 10)  # taken as one array, the first dimension counts as the block


def test_k_and_v_woven_into_each_block_share_no_bytes() -> None:
    cache = np.zeros((10, 2, 64), np.uint8)
    layout = layout_of([cache[:, 0], cache[:, 1]])
    assert [region.stride for region in layout.regions] == [128, 128]
    assert not layout.dense


def test_dimensions_inside_a_block_may_be_in_any_order() -> None:
    cache = np.zeros((10, 4, 16, 8), np.float32)
    assert layout_of(cache.transpose(0, 2, 1, 3)) == layout_of(cache)


def test_torch_tensors_are_told_by_their_looks() -> None:
    cache = np.zeros((10, 4, 16), np.float16)
    assert layout_of(FakeTensor(cache)) == layout_of([FakeTensor(cache)]) == layout_of(cache)


def test_real_torch_tensors_have_a_layout() -> None:
    torch = pytest.importorskip("torch")
    cache = torch.zeros((10, 2, 16), dtype=torch.bfloat16)
    assert layout_of(cache).regions == (Region(cache.data_ptr(), 64, 64),)
    with pytest.raises(ConfigError, match="not contiguous"):
        layout_of(cache.transpose(0, 2))


def test_a_single_block_has_the_stride_of_its_bytes() -> None:
    assert layout_of(np.zeros((4, 2, 8), np.uint8)[:1]).regions[0].stride == 16


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ([], "at least one region"),
        (np.zeros((4, 8), np.uint8)[:, ::2], "not contiguous"),
        (np.zeros((8, 4), np.uint8).T, "not contiguous"),
        (np.zeros((4, 2, 8), np.uint8)[:, :, :4], "not contiguous"),
        (np.zeros((4, 8), np.uint8)[::-1], "overlap"),
        (np.broadcast_to(np.zeros(8, np.uint8), (4, 8)), "read-only"),
        ([np.zeros((4, 8)), np.zeros((5, 8))], "different numbers of blocks"),
        (np.zeros((0, 8)), "holds no blocks"),
        (np.zeros(()), "holds no blocks"),
        ([[1, 2, 3]], "not a numpy array or torch tensor"),
    ],
)
def test_what_is_no_array_of_blocks_is_refused(arrays: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        layout_of(arrays)


def test_blocks_that_overlap_in_memory_are_refused() -> None:
    cache = np.zeros(64, np.uint8)
    woven = np.lib.stride_tricks.as_strided(cache, (7, 16), (8, 1))
    with pytest.raises(ConfigError, match="blocks overlap"):
        layout_of(woven)


def test_an_array_given_twice_is_refused() -> None:
    cache = np.zeros((10, 64), np.uint8)
    with pytest.raises(ConfigError, match="share bytes"):
        layout_of([cache, cache])


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        (Region(0, 8, 8), Region(80, 8, 8), True),  # side by side
        (Region(0, 8, 8), Region(79, 8, 8), False),  # the last block reaches in
        (Region(0, 16, 8), Region(8, 16, 8), True),  # woven
        (Region(0, 16, 8), Region(24, 16, 8), True),  # woven, a block apart
        (Region(0, 16, 8), Region(7, 16, 8), False),
        (Region(0, 16, 8), Region(8, 16, 9), False),
        (Region(0, 16, 8), Region(8, 32, 8), False),  # woven with different strides
    ],
)
def test_regions_may_be_woven_but_share_no_bytes(
    first: Region, second: Region, apart: bool
) -> None:
    for regions in ((first, second), (second, first)):
        if apart:
            Layout(regions, 10)
        else:
            with pytest.raises(ConfigError, match="share bytes"):
                Layout(regions, 10)


@pytest.mark.parametrize(
    ("address", "stride", "nbytes"), [(-1, 8, 8), (0, 8, 0), (0, 8, -8), (0, 7, 8), (0, -8, 8)]
)
def test_nonsensical_regions_are_refused(address: int, stride: int, nbytes: int) -> None:
    with pytest.raises(ConfigError):
        Region(address, stride, nbytes)


@pytest.mark.parametrize("blocks", [0, -1, 2**31])
def test_block_ids_must_fit_their_type(blocks: int) -> None:
    with pytest.raises(ConfigError, match="blocks"):
        Layout((Region(0, 8, 8),), blocks)


def test_layouts_mirror_each_other_if_blocks_have_the_same_parts() -> None:
    one = Layout((Region(0, 8, 8), Region(1000, 16, 4)), 10)
    assert one.mirrors(Layout((Region(500, 8, 8), Region(2000, 4, 4)), 99))
    assert not one.mirrors(Layout((Region(0, 8, 8),), 10))
    assert not one.mirrors(Layout((Region(0, 4, 4), Region(1000, 8, 8)), 10))


def test_layers_of_a_block_that_lie_together_become_one_region() -> None:
    cache = np.zeros((6, 3, 8), np.uint8)  # block, layer, bytes
    layout = layout_of([cache[:, layer] for layer in range(3)])
    assert len(layout.regions) == 3
    merged = layout.merged()
    (region,) = merged.regions
    assert (region.nbytes, region.stride, merged.dense) == (24, 24, True)
    assert merged.block_bytes == layout.block_bytes


def test_regions_that_do_not_adjoin_stay_apart() -> None:
    apart = [np.zeros((6, 8), np.uint8) for _ in range(3)]
    assert len(layout_of(apart).merged().regions) == 3
    one = np.zeros((3, 6, 8), np.uint8)  # layer first: regions adjoin, the parts of a block do not
    assert len(layout_of(list(one)).merged().regions) == 3

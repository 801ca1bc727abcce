"""A worker's half by itself: layouts, failures, reports."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from kvswitch.errors import ConfigError, TransferError
from kvswitch.messages import Direction, SwapOrders, Transfer, decode_observations, encode
from kvswitch.transfer import CpuBackend, Layout, Queue
from kvswitch_vllm import moving
from kvswitch_vllm.moving import Moving, cache_layout
from kvswitch_vllm.settings import Settings
from kvswitch_vllm.wire import Load, StepOrders

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

import numpy as np


class NothingGoesOut(CpuBackend):
    def open_queue(self, direction: Direction) -> Queue:
        queue = super().open_queue(direction)
        if direction is Direction.OUT:

            def fail(*_: Any) -> None:
                raise TransferError("told to fail")

            queue.copy = fail  # type: ignore[method-assign]
        return queue


@pytest.fixture
def caches() -> dict[str, Any]:
    return {f"layer{i}": torch.arange(8 * 64).view(8, 64) + 1000 * i for i in range(2)}


def make(caches: Mapping[str, Any]) -> Moving:
    return Moving(
        caches,
        Settings.from_mapping({}),
        num_blocks=8,
        block_bytes=2 * 64 * 8,
        host_blocks=8,
        rank=0,
    )


@pytest.fixture
def worker(caches: Mapping[str, Any]) -> Iterator[Moving]:
    one = make(caches)
    yield one
    one.close()


def orders(*transfers: Transfer, wait: tuple[int, ...] = ()) -> bytes:
    return encode(SwapOrders(0, transfers, (), wait))


def out_and_in() -> tuple[Transfer, Transfer]:
    runs = np.array([[1, 0, 2]], np.int32), np.array([[0, 5, 2]], np.int32)
    return Transfer(0, Direction.OUT, runs[0]), Transfer(1, Direction.IN, runs[1], (0,))


def finish(worker: Moving) -> set[str]:
    received: set[str] = set()
    deadline = time.monotonic() + 60
    while worker._loads:
        assert time.monotonic() < deadline, "the load does not end"
        time.sleep(0.002)
        received |= worker.after_forward()
    return received


def test_bytes_go_out_and_come_back(worker: Moving, caches: Mapping[str, Any]) -> None:
    load = Load("a", (5, 6))
    worker.before_forward(StepOrders(orders(*out_and_in()), {1: load}))
    assert finish(worker) == {"a"}
    for cache in caches.values():
        assert torch.equal(cache[5:7], cache[1:3])
    assert worker.take_bad_blocks() == set()
    reports = worker.take_reports()
    assert reports is not None
    ended = [t for _, data, _ in reports.reports for t in decode_observations(data).completed]
    assert sorted(ended) == [0, 1]
    assert worker.take_reports() is None


def test_a_step_without_a_forward_waits_for_what_is_under_way(
    worker: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "_MOMENT", 60.0)
    out, back = out_and_in()
    loads = {back.id: Load("r", (5, 6))}
    worker.before_forward(StepOrders(orders(out, back), loads, idle=True))
    assert worker.after_forward() == {"r"}
    monkeypatch.setattr(moving, "_MOMENT", 0.0)
    worker.before_forward(StepOrders(idle=True))
    assert worker.after_forward() == set()


def test_load_of_what_failed_to_leave_has_failed(
    caches: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copy goes well, but brings back what the host never got."""
    monkeypatch.setattr(moving, "make_backend", lambda *_, **__: NothingGoesOut())
    worker = make(caches)
    worker.before_forward(StepOrders(orders(*out_and_in()), {1: Load("a", (5, 6))}))
    assert finish(worker) == {"a"}
    assert worker.take_bad_blocks() == {5, 6}
    worker.close()


def test_a_swap_out_that_failed_before_its_load_came_is_remembered(
    caches: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's half plans ahead: it may not have heard of the failure yet."""
    monkeypatch.setattr(moving, "make_backend", lambda *_, **__: NothingGoesOut())
    worker = make(caches)
    out, load = out_and_in()
    worker.before_forward(StepOrders(orders(out)))
    worker._engine.drain()
    worker.after_forward()
    assert worker.take_reports() is not None
    worker.before_forward(StepOrders(orders(load), {1: Load("a", (5, 6))}))
    assert finish(worker) == {"a"}
    assert worker.take_bad_blocks() == {5, 6}
    worker.close()


def test_lost_load_is_reported_as_failed(worker: Moving) -> None:
    worker.before_forward(StepOrders(None, {}, (Load("a", (3,)),)))
    assert worker.after_forward() == {"a"}
    assert worker.take_bad_blocks() == {3}


def test_reports_of_ranks_add_up() -> None:
    one, other = (moving.WorkerReports([(rank, b"", 0.0)]) for rank in range(2))
    assert one.aggregate(other).reports == [(0, b"", 0.0), (1, b"", 0.0)]


def test_layouts_are_read_off_the_strides() -> None:
    def layout(cache: Any) -> Layout:
        return cache_layout({"layer": cache}, 8)

    assert len(layout(torch.zeros(8, 4, 16)).regions) == 1
    assert len(layout(torch.zeros(2, 8, 4, 16)).regions) == 2  # K and V
    small = layout(torch.zeros(32, 4, 16))  # four blocks of the kernel's to one of vLLM's
    assert (small.num_blocks, small.block_bytes) == (8, 4 * 4 * 16 * 4)
    together = torch.zeros(8, 3, 16)  # all layers of a block together: one copy for a run
    every = cache_layout({str(i): together[:, i] for i in range(3)}, 8)
    assert every.dense
    assert len(every.regions) == 1
    shared = torch.zeros(8, 16)
    assert len(cache_layout({"a": shared, "b": shared}, 8).regions) == 1
    with pytest.raises(ConfigError, match="8 blocks cannot be made out"):
        layout(torch.zeros(9, 16))


def test_other_block_bytes_are_refused(caches: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the scheduler counts 7"):
        Moving(
            caches, Settings.from_mapping({}), num_blocks=8, block_bytes=7, host_blocks=8, rank=1
        )

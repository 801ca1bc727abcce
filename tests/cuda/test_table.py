"""Choosing a way of copying by measurements, and taking them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswitch.messages import Direction
from kvswitch_cuda.dispatch import Way
from kvswitch_cuda.table import CopyTable, Sample

OUT, IN = Direction
KIB = 1 << 10


def table(rates: dict[tuple[Way, int, int], float], *, direction: Direction = IN) -> CopyTable:
    """A table from GB/s by way, KiB and count; the other direction has one sample."""
    samples = [
        Sample(int(direction), int(way), kib * KIB, count, kib * KIB * count / (rate * 1e9))
        for (way, kib, count), rate in rates.items()
    ]
    samples.append(Sample(int(1 - direction), 0, 1 << 20, 8, (8 << 20) / 50e9))
    return CopyTable("Some GPU 00ff", 13000, samples)


RATES = {
    (Way.BATCH, 8, 1): 1.0, (Way.LOOP, 8, 1): 2.0, (Way.KERNEL, 8, 1): 1.5,
    (Way.BATCH, 8, 512): 5.0, (Way.LOOP, 8, 512): 3.0, (Way.KERNEL, 8, 512): 40.0,
    (Way.BATCH, 256, 1): 30.0, (Way.LOOP, 256, 1): 31.0, (Way.KERNEL, 256, 1): 20.0,
    (Way.BATCH, 256, 512): 50.0, (Way.LOOP, 256, 512): 45.0, (Way.KERNEL, 256, 512): 55.0,
    (Way.BATCH, 4096, 1): 52.0, (Way.LOOP, 4096, 1): 51.0, (Way.KERNEL, 4096, 1): 55.0,
}  # fmt: skip


def ways(choices: Any, *windows: tuple[int, int]) -> list[Way]:
    """The choice for windows of (KiB, count)."""
    nbytes = np.concatenate([np.full(n, kib * KIB, np.uint64) for kib, n in windows])
    edges = np.cumsum([0, *(n for _, n in windows)])
    return [Way(way) for way in choices.ways(nbytes, edges)]


def test_each_window_goes_the_fastest_way_for_its_pieces() -> None:
    choices = table(RATES).choices(IN)
    assert ways(choices, (8, 1), (8, 512), (256, 1), (256, 512)) == [
        Way.LOOP,
        Way.KERNEL,
        Way.LOOP,
        Way.BATCH,  # the kernel is faster here, but not by enough to be worth its multiprocessors
    ]


def test_sizes_and_counts_between_belong_to_the_nearest() -> None:
    choices = table(RATES).choices(IN)
    assert ways(choices, (4, 600), (30, 500), (60, 500), (64, 15)) == [
        Way.KERNEL,
        Way.KERNEL,
        Way.BATCH,
        Way.LOOP,
    ]
    # Of the largest, 512 have not been measured.
    assert ways(choices, (9000, 700)) == [Way.BATCH]


def test_windows_in_the_middle_of_a_transfer_are_looked_at_alone() -> None:
    choices = table(RATES).choices(IN)
    nbytes = np.array([8 * KIB] * 5 + [256 * KIB] * 512 + [8 * KIB] * 700, np.uint64)
    found = choices.ways(nbytes, np.array([5, 517, 1117]))
    assert found.tolist() == [Way.BATCH, Way.KERNEL]


def test_a_window_is_what_the_slower_direction_moves_in_80_us() -> None:
    assert table(RATES).window_bytes == 4 << 20  # 50 GB/s: 3.8 MiB
    slow = table({(Way.BATCH, 4096, 1): 5.0})
    assert slow.window_bytes == 1 << 20


def test_a_table_is_kept_for_its_gpu_and_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = table(RATES)
    assert CopyTable.load(kept.gpu, kept.driver) is None
    place = kept.save()
    assert place is not None
    assert CopyTable.load(kept.gpu, kept.driver) == kept
    assert CopyTable.load(kept.gpu, 13010) is None
    assert CopyTable.load("Another GPU", kept.driver) is None
    place.write_text("{")
    assert CopyTable.load(kept.gpu, kept.driver) is None
    assert kept.save(tmp_path / "no" / "such" / "place") is None


def test_calibration_measures_every_way_in_both_directions(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import measuring as module

    monkeypatch.setattr(module, "_THOROUGH", (1 << 20, 1))
    fake_cuda.reset(pause_us=0)
    seen: list[Sample] = []
    found = module.calibrate(1, on_sample=seen.append)
    assert found.samples == seen
    assert found.gpu.startswith("Fake GPU 1 ")
    assert {(s.way, s.direction) for s in seen} == {(w, d) for w in Way for d in Direction}
    assert {s.nbytes for s in seen} == {size for size in module.SIZES if size <= 1 << 20}
    assert all(s.seconds > 0 for s in seen)
    found.choices(OUT)


def test_the_command_says_what_it_chose_and_why(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from kvswitch_cuda import command
    from kvswitch_cuda import measuring as module

    monkeypatch.setattr(module, "_THOROUGH", (4 << 20, 1))
    fake_cuda.reset(pause_us=0)
    output = tmp_path / "table.json"
    run = CliRunner().invoke(command.calibrate, ["--output", str(output)])
    assert run.exit_code == 0, run.output
    for text in ("Fake GPU 0", "GPU to host", "kernel, GB/s", "4096 KiB", "80 us", "Kept in"):
        assert text in run.output
    assert output.exists()


def test_a_backend_measures_once_and_keeps_what_it_found(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from kvswitch_cuda import CudaBackend

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_cuda.reset(pause_us=0)
    CudaBackend(0).close()
    calls = fake_cuda.calls("cuMemcpyBatchAsync")
    assert calls > 0
    backend = CudaBackend(0)
    assert fake_cuda.calls("cuMemcpyBatchAsync") == calls
    assert backend.window_bytes >= 1 << 20
    backend.close()


def test_a_gpu_that_is_full_is_served_unmeasured(
    fake_cuda: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from kvswitch_cuda import CudaBackend

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_cuda.set("device_memory", 1 << 16)
    backend = CudaBackend(0)
    assert "kvswitch calibrate" in caplog.text
    backend.open_queue(OUT)
    backend.close()

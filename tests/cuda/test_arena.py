"""Pinned host memory: registered in steps, and copied from and to across them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvswitch.messages import Direction, Transfer
from kvswitch.transfer import Layout, Region, TransferEngine, coalesce

STEP = 1 << 16
PATIENCE = 20.0


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvswitch_cuda import arena

    monkeypatch.setattr(arena, "_STEP", STEP)


@pytest.mark.parametrize("nbytes", [1, 4096, STEP, STEP + 1, 5 * STEP + 4097])
@pytest.mark.usefixtures("small_steps")
def test_exactly_what_was_asked_for_is_registered_in_steps(nbytes: int, fake_cuda: Any) -> None:
    from kvswitch_cuda import PinnedArena

    arena = PinnedArena(nbytes)
    steps = -(-nbytes // STEP)
    assert fake_cuda.calls("cuMemHostRegister_v2") == fake_cuda.left("ranges") == steps
    assert arena.nbytes == arena.view().nbytes == nbytes
    assert arena.seams == tuple(arena.address + i * STEP for i in range(1, steps))
    arena.close()
    assert fake_cuda.left("ranges") == 0
    arena.close()


@pytest.mark.parametrize("copies", ["batch", "loop", "kernel"])
@pytest.mark.usefixtures("small_steps")
def test_runs_cross_from_one_registration_to_the_next(copies: str, fake_cuda: Any) -> None:
    # Blocks of 5000 bytes do not end where registrations do; the driver refuses such copies.
    from kvswitch_cuda import CudaBackend

    block, blocks = 5000, 100
    memory = fake_cuda.device(2 * block * blocks)
    values = np.random.default_rng(0).integers(0, 256, memory.nbytes, np.uint8)
    memory.write(values)
    device = Layout(
        tuple(Region(memory.address + i * block * blocks, block, block) for i in range(2)), blocks
    )
    backend = CudaBackend(0, copies=copies)
    arena = backend.host_arena(2 * block * blocks)
    host = arena.layout(device)
    assert len(host.seams) == 15
    order = np.roll(np.arange(blocks, dtype=np.int32), 13)
    everything = np.arange(blocks, dtype=np.int32)
    with TransferEngine(backend, device, host) as engine:
        out = engine.submit(Transfer(0, Direction.OUT, coalesce(everything, order)))
        out.wait(PATIENCE)
        assert out.num_copies == 4  # two runs in two regions, before they are cut
        memory.write(np.zeros(memory.nbytes, np.uint8))
        engine.submit(Transfer(1, Direction.IN, coalesce(order, everything))).wait(PATIENCE)
    assert (memory.read() == values).all()
    arena.close()


@pytest.mark.usefixtures("small_steps")
def test_copies_across_registrations_would_be_refused(fake_cuda: Any) -> None:
    from kvswitch.errors import TransferError
    from kvswitch_cuda import CudaBackend

    memory = fake_cuda.device(4 * STEP)
    backend = CudaBackend(0, copies="batch")
    arena = backend.host_arena(4 * STEP)
    device, host = (
        Layout((Region(address, 4096, 4096),), 64) for address in (memory.address, arena.address)
    )
    with TransferEngine(backend, device, host) as engine:
        ticket = engine.submit(Transfer(0, Direction.OUT, np.array([[0, 0, 64]], np.int32)))
        with pytest.raises(TransferError, match="INVALID_VALUE"):
            ticket.wait(PATIENCE)
    arena.close()


@pytest.mark.gpu
def test_a_gpu_copies_across_registrations(real_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvswitch_cuda import CudaBackend, arena

    monkeypatch.setattr(arena, "_STEP", 1 << 20)
    nbytes = 8 << 20
    memory = real_cuda.device(nbytes)
    values = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    memory.write(values)
    for copies in ("batch", "loop", "kernel"):
        backend = CudaBackend(0, copies=copies)
        pinned = backend.host_arena(nbytes)
        device = Layout((Region(memory.address, 5000, 5000),), nbytes // 5000)
        with TransferEngine(backend, device, pinned.layout(device)) as engine:
            runs = np.array([[0, 0, nbytes // 5000]], np.int32)
            engine.submit(Transfer(0, Direction.OUT, runs)).wait(PATIENCE)
        moved = nbytes // 5000 * 5000
        assert (pinned.view()[:moved] == values[:moved]).all()
        pinned.close()

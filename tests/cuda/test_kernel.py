"""The copy kernel without a GPU: it compiles for those that matter, and copies what it should."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvswitch.errors import ConfigError

pytest.importorskip("cuda.core")

from kvswitch_cuda import kernel
from kvswitch_cuda.dispatch import PIECES


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_it_compiles(arch: str) -> None:
    code = kernel.compile_kernel(arch)
    assert code.startswith(b"\x7fELF")
    assert b"copy_runs" in code


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The kernel as a function of (parameters, thread blocks, threads)."""
    library = tmp_path_factory.mktemp("kernel") / "kernel.so"
    source, include = Path(__file__).parent / "kernel_on_cpu.cpp", Path(kernel.__file__).parent
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{include}"]
    try:
        subprocess.run(["c++", *flags, "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("needs a C++ compiler")
    launch = ctypes.CDLL(str(library)).launch
    launch.argtypes = [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return launch


@pytest.mark.parametrize("step", [16, 4, 1])
@pytest.mark.parametrize(("grid", "block"), [(1, 32), (8, 512), (7, 96)])
def test_every_byte_is_copied_and_no_other(step: int, grid: int, block: int, on_cpu: Any) -> None:
    rng = np.random.default_rng(step)
    src, dst = rng.integers(1, 256, 400_000, np.uint8), np.zeros(400_000, np.uint8)
    expected = dst.copy()
    # Of all sizes around the chunk's, aligned to `step`, with gaps between.
    sizes = np.array([1, 3, 100, 511, 512, 513, 4096, 5000]) * 4 // step * step
    sizes = np.maximum(rng.permutation(np.concatenate([sizes, sizes])), step)
    starts = np.cumsum(sizes + step) - sizes
    parameters = kernel.CopyKernel.new_parameters()
    parameters[0] = len(sizes)
    base_src, base_dst = (-(-a.ctypes.data // 16) * 16 for a in (src, dst))
    ends = np.cumsum(sizes[::-1] + step)[::-1] - sizes  # destinations in the other order
    for column, values in ((0, ends + base_dst), (1, starts + base_src), (2, sizes)):
        parameters[1 + column * PIECES :][: len(sizes)] = values
    for size, at, to in zip(sizes, starts, ends, strict=True):
        lead_src, lead_dst = base_src - src.ctypes.data, base_dst - dst.ctypes.data
        piece = src[lead_src + at : lead_src + at + size]
        expected[lead_dst + to : lead_dst + to + size] = piece
    assert on_cpu(parameters.ctypes.data, grid, block) == 0
    assert (dst == expected).all()


def test_a_gpu_that_the_compiler_does_not_know_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot compile the kernel for sm_1"):
        kernel.compile_kernel("sm_1")


def test_python_and_cuda_agree_on_the_parameters() -> None:
    source = (Path(kernel.__file__).parent / "copy_runs.cu").read_text()
    assert re.findall(r"PIECES = (\d+)", source) == [str(PIECES)]
    assert kernel.CopyKernel.new_parameters().nbytes == 8 + 3 * 8 * PIECES < 32764


def test_machine_code_is_kept_in_a_folder_of_ours_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[str] = []
    monkeypatch.setattr(kernel, "compile_kernel", lambda arch: made.append(arch) or b"code")
    assert [kernel._cached("sm_90") for _ in range(2)] == [b"code", b"code"]
    assert kernel._cached("sm_80") == b"code"
    assert made == ["sm_90", "sm_80"]
    assert (tmp_path / "kvswitch").stat().st_mode & 0o777 == 0o700
    (tmp_path / "kvswitch").chmod(0o777)  # anybody could put code there
    assert kernel._cached("sm_90") == b"code"
    assert made == ["sm_90", "sm_80", "sm_90"]


def test_no_place_for_a_cache_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernel, "compile_kernel", lambda arch: b"code")
    assert kernel._cached("sm_90") == b"code"


def test_a_gpu_with_addresses_of_its_own_for_pinned_memory_is_refused(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import CudaBackend, context

    monkeypatch.setattr(context.Context, "attribute", lambda self, name: 0)
    with pytest.raises(ConfigError, match="by the host's addresses"):
        CudaBackend(0, copies="kernel")


def test_code_that_the_driver_does_not_load_is_named(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvswitch_cuda import CudaBackend

    monkeypatch.setattr(kernel, "_cached", lambda arch: b"no machine code")
    with pytest.raises(ConfigError, match=r"does not load.*INVALID_IMAGE"):
        CudaBackend(0, copies="kernel")

"""The copy kernel's source: it compiles for the GPUs that matter, without one at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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

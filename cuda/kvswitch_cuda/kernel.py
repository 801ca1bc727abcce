"""The copy kernel: compiled by NVRTC for the GPU at hand, once; kept in a cache on disk."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from kvswitch.errors import TransferError
from kvswitch_cuda.context import Context
from kvswitch_cuda.dispatch import PIECES
from kvswitch_cuda.driver import CudaError, CudaUnavailable

__all__ = ["CopyKernel", "cache_folder", "compile_kernel"]

_NAME: Final = "copy_runs"

_log = logging.getLogger("kvswitch")


def cache_folder() -> Path | None:
    """A folder of ours alone for what may be made again; None if there is no such place.

    It is ``$XDG_CACHE_HOME/kvswitch`` or ``~/.cache/kvswitch``. Code is loaded from it, so a folder
    that others may write to is not used.
    """
    with suppress(OSError, RuntimeError):
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(root) / "kvswitch"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    return None


def compile_kernel(arch: str) -> bytes:
    """Machine code of the copy kernel.

    Parameters
    ----------
    arch : str
        E.g. "sm_90".

    Raises
    ------
    CudaUnavailable
        cuda-core or NVRTC is missing, or NVRTC does not know that GPU.
    """
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as error:
        raise CudaUnavailable(
            "compiling the copy kernel needs cuda-core: pip install 'kvswitch[cuda]'"
        ) from error
    source = files("kvswitch_cuda").joinpath(f"{_NAME}.cu").read_text()
    try:
        program = Program(source, "c++", ProgramOptions(std="c++17", arch=arch))
        return bytes(program.compile("cubin").code)
    except Exception as error:  # the compiler's, the loader's
        raise CudaUnavailable(
            f"NVRTC (pip install nvidia-cuda-nvrtc) cannot compile the kernel for {arch}: {error}"
        ) from error


class CopyKernel:
    """The kernel, loaded in a context.

    Attributes
    ----------
    function : int
        Handle for cuLaunchKernel.

    Raises
    ------
    CudaUnavailable
        It cannot be compiled or loaded, or pinned memory has other addresses on this GPU.
    """

    def __init__(self, context: Context) -> None:
        if not context.attribute("CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM"):
            raise CudaUnavailable(
                "the copy kernel needs a GPU that knows pinned host memory by the host's addresses"
            )
        code = _cached(context.arch)
        self._context: Final = context
        driver = context.driver
        try:
            with context:
                self._module = driver("cuModuleLoadData", code)
                self.function: Final = int(
                    driver("cuModuleGetFunction", self._module, _NAME.encode())
                )
        except CudaError as error:
            raise CudaUnavailable(f"the driver does not load the copy kernel: {error}") from error

    def close(self) -> None:
        """Unload it. No launch may be under way."""
        with suppress(TransferError), self._context:
            self._context.driver("cuModuleUnload", self._module)

    @staticmethod
    def new_parameters() -> npt.NDArray[np.int64]:
        """Room for its one parameter, to be filled before each launch: see copy_runs.cu."""
        return np.zeros(1 + 3 * PIECES, np.int64)


def _cached(arch: str) -> bytes:
    """Machine code from the cache, or compiled."""
    source = files("kvswitch_cuda").joinpath(f"{_NAME}.cu").read_bytes()
    key = hashlib.sha256(source + f"{arch} {version('cuda-bindings')}".encode()).hexdigest()[:24]
    folder = cache_folder()
    file = folder / f"{_NAME}-{arch}-{key}.cubin" if folder else None
    if file is not None:
        with suppress(OSError):
            return file.read_bytes()
    code = compile_kernel(arch)
    if file is not None:
        try:
            unfinished = file.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(code)
            unfinished.replace(file)
        except OSError as error:
            _log.warning("the compiled copy kernel is not kept: %s", error)
    return code

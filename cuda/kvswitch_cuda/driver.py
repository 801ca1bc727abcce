"""The CUDA driver: found once, checked, and every failure turned into a named error.

Set-up goes through cuda-python's bindings. What is called for each window or event goes through
function pointers from `cuGetProcAddress`, called by ctypes: that takes arrays by address, so that
the cost does not depend on the number of copies, and lets go of the GIL.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any, Final

from kvswitch.errors import ConfigError, TransferError
from kvswitch.transfer import DeadQueue

__all__ = ["CudaError", "CudaUnavailable", "Driver", "device_of", "stream_handle"]

OLDEST: Final = 12000  # driver API version
NOT_READY: Final = 600
_NOT_SUPPORTED: Final = 801

# Errors that an asynchronous failure leaves behind in the whole context, for good: memory faults,
# failed kernels, hardware errors, a context or process that is being torn down.
_LOST: Final = frozenset(
    (4, 46, 201, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 720, 721, 999)
)

_WORD: Final = ctypes.c_int64  # addresses, handles and sizes: all below 2**63
_FLAGS: Final = ctypes.c_uint


class CudaUnavailable(ConfigError):  # noqa: N818 - names the state
    """CUDA cannot be used here. The message says what is missing."""


class CudaError(TransferError):
    """A call of the CUDA driver failed, and only that call.

    Attributes
    ----------
    code : int
        The CUresult.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """The process's CUDA driver; get it by `Driver.load`.

    Attributes
    ----------
    api : module
        ``cuda.bindings.driver``.
    version : int
        E.g. 13000 for CUDA 13.0.
    batch, copy, launch, record, wait, query, synchronize, elapsed
        Function pointers: cuMemcpyBatchAsync (with the arguments of CUDA 12.8), cuMemcpyAsync,
        cuLaunchKernel, cuEventRecord, cuStreamWaitEvent, cuEventQuery, cuEventSynchronize,
        cuEventElapsedTime. Each returns a CUresult.
    has_batch : bool
        Whether the driver has cuMemcpyBatchAsync; `batch` always fails otherwise.
    """

    @staticmethod
    @cache
    def load() -> Driver:
        """Find and initialise it, once in a process.

        Raises
        ------
        CudaUnavailable
            cuda-python or the driver is missing or too old, or there is no device.
        """
        return Driver()

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaUnavailable(
                "the CUDA backend needs cuda-python: pip install 'kvswitch[cuda]'"
            ) from error
        self.api: Final = driver
        try:
            (code,) = driver.cuInit(0)
        except RuntimeError as error:  # libcuda.so.1 was not found
            raise CudaUnavailable(
                f"no CUDA driver here: install NVIDIA's, or set backend to 'cpu' ({error})"
            ) from error
        if int(code):
            raise CudaUnavailable(
                f"the CUDA driver does not start: {self._name(int(code))}. Is there a device, and "
                "is it visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker --gpus)?"
            )
        self.version: Final[int] = self("cuDriverGetVersion")
        if self.version < OLDEST:
            raise CudaUnavailable(
                f"the CUDA driver is too old: it speaks CUDA {_dotted(self.version)}, "
                f"{_dotted(OLDEST)} is needed. Upgrade it"
            )
        word, flags, number = _WORD, _FLAGS, ctypes.c_uint
        # With the arguments of 12.8, which newer drivers still offer under that version.
        self.batch: Final = self._pointer(
            "cuMemcpyBatchAsync", 12080, word, word, word, word, word, word, word, word, word
        )
        self.has_batch: Final = self._address("cuMemcpyBatchAsync", 12080) != 0
        self.copy: Final = self._pointer("cuMemcpyAsync", 4000, word, word, word, word)
        self.launch: Final = self._pointer(
            "cuLaunchKernel", 7000, word, *[number] * 7, word, word, word
        )
        self.record: Final = self._pointer("cuEventRecord", 2000, word, word)
        self.wait: Final = self._pointer("cuStreamWaitEvent", 3020, word, word, flags)
        self.query: Final = self._pointer("cuEventQuery", 2000, word)
        self.synchronize: Final = self._pointer("cuEventSynchronize", 2000, word)
        self.elapsed: Final = self._pointer("cuEventElapsedTime", 2000, word, word, word)

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call a function of the bindings; what it returns beside its CUresult.

        Raises
        ------
        CudaError, DeadQueue
            It failed; see `error`.
        """
        code, *values = getattr(self.api, function)(*arguments)
        if int(code):
            raise self.error(function, int(code))
        return values[0] if len(values) == 1 else tuple(values)

    def error(self, what: str, code: int) -> TransferError:
        """The error for a CUresult: `DeadQueue` if nothing can work in that context any more."""
        name = self._name(code)
        if code in _LOST:
            return DeadQueue(
                f"{what}: {name}. The CUDA context is lost, every call of this process on this GPU "
                "fails from now on: restart the process (compute-sanitizer finds who broke it)"
            )
        return CudaError(f"{what}: {name}", code)

    def _name(self, code: int) -> str:
        result = self.api.CUresult
        try:
            known = result(code)
        except ValueError:
            return f"CUDA error {code}"
        _, text = self.api.cuGetErrorString(known)
        return f"{known.name} ({text.decode()})" if text else str(known.name)

    def _address(self, name: str, version: int) -> int:
        if version > self.version:
            return 0
        code, address, _ = self.api.cuGetProcAddress(name.encode(), version, 0)
        return 0 if int(code) else int(address or 0)

    def _pointer(self, name: str, version: int, *types: Any) -> Any:
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *types)
        address = self._address(name, version)
        return prototype(address) if address else prototype(lambda *_: _NOT_SUPPORTED)


def device_of(address: int) -> int:
    """Number of the GPU that this memory lies on; `CudaUnavailable` if it is not GPU memory."""
    driver = Driver.load()
    attribute = driver.api.CUpointer_attribute
    cause: CudaError | None = None
    try:
        kind = driver("cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address)
        ordinal = driver(
            "cuPointerGetAttribute", attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address
        )
    except CudaError as error:
        kind, cause = 0, error
    if int(kind) != int(driver.api.CUmemorytype.CU_MEMORYTYPE_DEVICE):
        raise CudaUnavailable(
            "the KV cache is not in GPU memory: set backend to 'cpu', or allocate it on the GPU"
        ) from cause
    return int(ordinal)


def stream_handle(stream: object | None, device: int) -> int:
    """Handle of a CUDA stream.

    Parameters
    ----------
    stream : int, object or None
        A handle; a stream of torch or cuda.core, or anything with ``__cuda_stream__``; None for
        torch's current stream on this `device`, or the default stream without torch.

    Raises
    ------
    ConfigError
        It is no such thing.
    """
    if stream is None:
        torch: Any = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return int(torch.cuda.current_stream(device).cuda_stream)
    if isinstance(stream, int):
        return stream
    if (protocol := getattr(stream, "__cuda_stream__", None)) is not None:
        return int(protocol()[1])
    if (handle := getattr(stream, "cuda_stream", None)) is not None:  # torch before 2.10
        return int(handle)
    raise ConfigError(
        f"{stream!r} is no CUDA stream: pass torch's, a handle, or None for the current one"
    )


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"

"""The CUDA backend of kvswitch: copies between GPU memory and pinned host memory.

Imports without a GPU, a driver or cuda-python; what needs them says so when it is made.
"""

from kvswitch_cuda.arena import PinnedArena
from kvswitch_cuda.backend import CudaBackend
from kvswitch_cuda.driver import CudaError, CudaUnavailable
from kvswitch_cuda.measuring import calibrate
from kvswitch_cuda.table import CopyTable

__all__ = [
    "CopyTable",
    "CudaBackend",
    "CudaError",
    "CudaUnavailable",
    "PinnedArena",
    "calibrate",
]

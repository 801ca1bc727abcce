"""Where a report's figures come from: when, with what command, on which machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch

__all__ = ["Machine", "Provenance"]


class Machine(msgspec.Struct, frozen=True):
    """The machine of a run; memory in bytes, `cores` are those that the process may use.

    `gpu` is where the model ran, if not on the CPU, and how.
    """

    cpu: str
    cores: int
    memory: int
    os: str
    gpu: str = ""


class Provenance(msgspec.Struct, frozen=True):
    """What it takes to judge and to repeat a measurement.

    Attributes
    ----------
    date : str
        UTC, ISO 8601.
    command : str
    seed : int
    workload : dict
        All settings, as in the workload file.
    machine : Machine
    versions : dict
        Of kvswitch, python, numpy and torch.
    """

    date: str
    command: str
    seed: int
    workload: dict[str, Any]
    machine: Machine
    versions: dict[str, str]

    @classmethod
    def here(
        cls,
        *,
        command: str,
        seed: int,
        workload: Mapping[str, Any],
        device: torch.device | None = None,
    ) -> Provenance:
        """Describe a run that was made now, by this process."""
        return cls(
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            seed=seed,
            workload=dict(workload),
            machine=Machine(
                cpu=_cpu(),
                cores=_cores(),
                memory=psutil.virtual_memory().total,
                os=f"{platform.system()} {platform.release()}",
                gpu="" if device is None else _gpu(device),
            ),
            versions={
                "kvswitch": version("kvswitch"),
                "python": platform.python_version(),
                "numpy": version("numpy"),
                "torch": version("torch"),
            },
        )


def _cpu() -> str:
    """The CPU's model, as far as the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(device: torch.device) -> str:
    """The GPU's model and driver."""
    if device.type != "cuda":
        return ""
    from kvswitch_cuda.driver import Driver

    version = Driver.load().version
    name = torch.cuda.get_device_name(device)
    return f"{name}, CUDA {version // 1000}.{version % 1000 // 10}, passes in CUDA graphs"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""What passes between the connector's halves, inside vLLM's own messages.

vLLM carries connector metadata in its own way; kvswitch's part is msgspec bytes inside of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

__all__ = ["Load", "StepOrders", "WorkerReports"]


@dataclass(frozen=True, slots=True)
class Load:
    """A swap-in: whose it is, and the device blocks that are lost if it fails.

    Attributes
    ----------
    request : str or None
        To be reported to vLLM when it has ended; None where the forward waits for it.
    """

    request: str | None
    blocks: tuple[int, ...]


@dataclass(slots=True)
class StepOrders(KVConnectorMetadata):
    """Scheduler to workers, with every step.

    Attributes
    ----------
    orders : bytes or None
        `kvswitch.messages.SwapOrders`; None if there is nothing to do.
    loads : dict
        By id of the swap-ins among them.
    lost : tuple of Load
        Swap-ins that cannot take place, to be reported as failed.
    idle : bool
        Transfers are under way, and no forward is, nor was in the step before.
    """

    orders: bytes | None = None
    loads: dict[int, Load] = field(default_factory=dict)
    lost: tuple[Load, ...] = ()
    idle: bool = False


@dataclass(slots=True)
class WorkerReports(KVConnectorWorkerMetadata):
    """Workers to scheduler, when something has ended.

    Attributes
    ----------
    reports : list of (int, bytes, float)
        Rank, `kvswitch.messages.Observations`, and seconds that its forwards had to wait.
    """

    reports: list[tuple[int, bytes, float]]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        """Put the reports of two workers, or two steps, together."""
        assert isinstance(other, WorkerReports)
        return WorkerReports(self.reports + other.reports)

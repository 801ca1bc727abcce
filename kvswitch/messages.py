"""What passes between the scheduler's half and the workers' half, and how it is written down.

The planner decides in integers; every worker (one per tensor-parallel rank) moves bytes. Between
them go `SwapOrders`, once a step, and what the workers saw comes back as `Observations`. Both
serialise with msgspec (no pickle), so that the halves may live in different processes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kvswitch.errors import TransferError

__all__ = [
    "BlockIds",
    "Direction",
    "Measurement",
    "Observations",
    "Runs",
    "SwapOrders",
    "Transfer",
    "decode_observations",
    "decode_orders",
    "encode",
]

BlockIds: TypeAlias = npt.NDArray[np.int32]
"""Block ids, shape [n]."""

Runs: TypeAlias = npt.NDArray[np.int32]
"""Runs, shape [n, 3]: first source block, first destination block, number of blocks."""


class Direction(IntEnum):
    """Which way a transfer goes."""

    OUT = 0  # device -> host: swap-out
    IN = 1  # host -> device: swap-in


class Transfer(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """One planned copy of many blocks in one direction.

    Attributes
    ----------
    id : int
        Unique and increasing; `after` names lower ids only, so waits have no cycle.
    direction : Direction
    runs : Runs
        int32, shape [n, 3]: first source block, first destination block, number of blocks.
    after : tuple of int
        Transfers that must have ended (well or not) before this one may start.
    """

    id: int
    direction: Direction
    runs: Runs
    after: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        """Number of blocks moved."""
        return int(self.runs[:, 2].sum())


class SwapOrders(msgspec.Struct, frozen=True, eq=False, forbid_unknown_fields=True):
    """What every worker must do in one step.

    Attributes
    ----------
    step : int
    transfers : tuple of Transfer
        In order of id; swap-ins are dispatched before swap-outs (Algorithm 1, steps 2 and 3).
    cancel : tuple of int
        Transfers whose bytes nobody wants any more. What is not yet dispatched of them is
        dropped; they end, and are reported, like any other.
    wait : tuple of int
        Transfers that must have ended before this step's forward may run: conflicts
        (Algorithm 1, step 3.1) and synchronous swap-ins (step 4).
    """

    step: int
    transfers: tuple[Transfer, ...] = ()
    cancel: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()


class Measurement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long one ended transfer kept its queue busy: `nbytes` in `seconds`."""

    direction: Direction
    nbytes: int
    seconds: float


class Observations(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happened since the last step, the same on every rank.

    Attributes
    ----------
    completed, failed : tuple of int
        Ids of transfers that have ended on all ranks; `failed` where any rank failed.
    measurements : tuple of Measurement
        Taken on one rank only (rank 0).
    step_seconds : float or None
        Duration of the last forward, without waiting for transfers.
    """

    completed: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    step_seconds: float | None = None


def _to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.astype("<i4", casting="safe", copy=False).tobytes()
    raise NotImplementedError(f"cannot serialise {type(value).__name__}")


def _from_wire(kind: type, value: Any) -> Any:
    if kind is np.ndarray or getattr(kind, "__origin__", None) is np.ndarray:
        if len(value) % 12:
            raise ValueError(f"runs need 12 bytes each, got {len(value)} bytes")
        return np.frombuffer(value, "<i4").reshape(-1, 3)
    raise NotImplementedError(f"cannot deserialise {kind!r}")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_orders = msgspec.msgpack.Decoder(SwapOrders, dec_hook=_from_wire)
_observations = msgspec.msgpack.Decoder(Observations)
_NOT_A_MESSAGE = (msgspec.DecodeError, UnicodeDecodeError)


def encode(message: SwapOrders | Observations) -> bytes:
    """Serialise a message."""
    return _encoder.encode(message)


def decode_orders(data: bytes) -> SwapOrders:
    """Read `SwapOrders`; TransferError if `data` is not one."""
    try:
        return _orders.decode(data)
    except _NOT_A_MESSAGE as error:
        raise TransferError(f"not a SwapOrders message: {error}") from error


def decode_observations(data: bytes) -> Observations:
    """Read `Observations`; TransferError if `data` is not one."""
    try:
        return _observations.decode(data)
    except _NOT_A_MESSAGE as error:
        raise TransferError(f"not an Observations message: {error}") from error

"""The list of transfers that the next orders will name."""

from __future__ import annotations

from collections.abc import Iterable

from kvswitch.messages import Direction, Runs, Transfer

__all__ = ["OrderList"]


class OrderList:
    """Gives transfers their ids, and collects what every worker is to be told."""

    def __init__(self) -> None:
        self._next_id = 0
        self._planned: list[Transfer] = []
        self._cancelled: list[int] = []

    def plan(self, direction: Direction, runs: Runs, after: Iterable[int] = ()) -> Transfer:
        """Give a transfer its id and put it on the list of the next orders."""
        transfer = Transfer(self._next_id, direction, runs, tuple(sorted(set(after))))
        self._next_id += 1
        self._planned.append(transfer)
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Nobody wants its bytes any more; it ends like any other, sooner perhaps."""
        self._cancelled.append(transfer.id)

    @property
    def has_planned(self) -> bool:
        """Whether transfers are on the list of the next orders."""
        return bool(self._planned)

    def take_list(self) -> tuple[tuple[Transfer, ...], tuple[int, ...]]:
        """What has been planned and cancelled since the last call."""
        planned, cancelled = tuple(self._planned), tuple(self._cancelled)
        if planned or cancelled:
            self._planned, self._cancelled = [], []
        return planned, cancelled

"""What switching has cost and spared so far."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SwapStats"]


@dataclass(slots=True)
class SwapStats:
    """Counters since the start; blocks and copies as the paper counts them.

    A *copy* is one contiguous run of blocks. A swap-out is *full* when the host held nothing of the
    sequence, else *incremental*; granularity (blocks / copies) is to be read apart.

    Attributes
    ----------
    preemptions, resumptions, evictions, idle_copies, take_backs : int
        Sequences that were preempted, resumed, evicted while idle, copied while idle, and resumed
        with blocks that were still on the device.
    blocks_out_full, copies_out_full, blocks_out_incremental, copies_out_incremental : int
        Swapped out.
    blocks_in, copies_in : int
        Swapped in.
    blocks_spared : int
        Blocks of departing sequences that were not sent, because the host had valid copies.
    tokens_lost : int
        Tokens of resumed sequences that must be recomputed: their copies were contaminated, could
        not be held, or failed.
    conflicts : int
        Waits for a transfer whose blocks were needed.
    transfers_failed : int
        Transfers that failed, cancelled ones not counted.
    contaminated_blocks : int
        Host copies lost to others.
    stall_seconds, overhead_seconds : float
        Time in which the batch waited for transfers, and time inside kvswitch without that.
    """

    preemptions: int = 0
    resumptions: int = 0
    evictions: int = 0
    idle_copies: int = 0
    take_backs: int = 0
    blocks_out_full: int = 0
    copies_out_full: int = 0
    blocks_out_incremental: int = 0
    copies_out_incremental: int = 0
    blocks_in: int = 0
    copies_in: int = 0
    blocks_spared: int = 0
    tokens_lost: int = 0
    conflicts: int = 0
    transfers_failed: int = 0
    contaminated_blocks: int = 0
    stall_seconds: float = 0.0
    overhead_seconds: float = 0.0

    @property
    def blocks_out(self) -> int:
        """Blocks swapped out."""
        return self.blocks_out_full + self.blocks_out_incremental

    @property
    def copies_out(self) -> int:
        """Contiguous runs swapped out."""
        return self.copies_out_full + self.copies_out_incremental

    @property
    def share_spared(self) -> float:
        """Share of the departing sequences' blocks that did not have to be sent."""
        departing = self.blocks_out + self.blocks_spared
        return self.blocks_spared / departing if departing else 0.0

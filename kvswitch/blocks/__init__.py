"""Block groups: memory of a pool in runs of contiguous blocks (section 3.1)."""

from kvswitch.blocks.pool import BlockGroupPool, Groups

__all__ = ["BlockGroupPool", "Groups"]

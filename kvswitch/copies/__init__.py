"""Host copies: which host blocks hold whose KV cache, and who loses them first."""

from kvswitch.copies.host import HostCopies
from kvswitch.copies.owners import Fill, Lease

__all__ = ["Fill", "HostCopies", "Lease"]

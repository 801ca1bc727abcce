"""Content keys of pages: what is found again by its tokens, by later turns and other requests."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from hashlib import blake2b

__all__ = ["PageKeys"]

_BYTES = 16  # of a key


class PageKeys:
    """Keys of the leading full pages of each owner, computed once.

    A key names all tokens up to its page's end and the namespace (tenant's salt, LoRA adapter).

    Parameters
    ----------
    page_tokens : int
        Token slots in a page.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_bytes = 8 * page_tokens
        self._known: dict[Hashable, list[bytes]] = {}

    def of(
        self, owner: Hashable, tokens: Sequence[int], pages: int, namespace: tuple[object, ...]
    ) -> list[bytes]:
        """Return the keys of the first `pages` pages.

        Parameters
        ----------
        tokens : sequence of int
            The owner's token ids from the first one on. They only ever grow.
        namespace : tuple
            What else the KV cache depends on; equal tokens in different ones have other keys.
        """
        keys = self._known.get(owner)
        if keys is None:
            keys = self._known[owner] = []
        if len(keys) < pages:
            ids = tokens if isinstance(tokens, array) else array("q", tokens)
            view = memoryview(ids).cast("B")
            last = (
                keys[-1] if keys else blake2b(repr(namespace).encode(), digest_size=_BYTES).digest()
            )
            size = self._page_bytes
            for start in range(len(keys) * size, pages * size, size):
                last = blake2b(view[start : start + size], key=last, digest_size=_BYTES).digest()
                keys.append(last)
        return keys[:pages]

    def forget(self, owner: Hashable) -> None:
        """Forget an owner; it need not be known."""
        self._known.pop(owner, None)

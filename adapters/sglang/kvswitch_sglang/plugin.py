"""SGLang's plug-in entry point: registers the memory backend ``kvswitch``.

Loaded in every process of SGLang, so it imports nothing heavy, and changes nothing until the
backend is asked for.
"""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["NAME", "register"]

NAME = "kvswitch"


def register() -> None:
    """Make ``--radix-cache-backend kvswitch`` known. May be called again."""
    from sglang.srt.mem_cache.registry import (
        get_radix_cache_factory,
        register_radix_cache_backend,
    )

    if get_radix_cache_factory(NAME) is None:
        register_radix_cache_backend(NAME, _make)


def _make(context: Any) -> Any:
    from kvswitch.errors import ConfigError
    from kvswitch_sglang.checks import check_version

    try:
        check_version()  # before anything is imported that another version may not have
        from kvswitch_sglang.radix import make_cache

        return make_cache(context)
    except ConfigError as error:
        # In a traceback, between those of SGLang's other processes, it is easily overlooked.
        print(f"kvswitch: {error}", file=sys.stderr)
        raise

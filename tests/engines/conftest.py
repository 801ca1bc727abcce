"""An engine's tests run where it is installed: `make test-vllm` and `make test-sglang`."""

from __future__ import annotations

from importlib.util import find_spec


def _installed(engine: str) -> bool:
    spec = find_spec(engine)
    return spec is not None and spec.origin is not None  # a folder of that name has no origin


collect_ignore = [engine for engine in ("vllm", "sglang") if not _installed(engine)]

"""Tests of the SGLang adapter. Those with a real scheduler run it in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
MODELS = Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """SGLang and its dependencies warn of themselves; here only what is tested counts."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_DEBUG_MEMORY_POOL": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def models() -> Path:
    """Where the models are."""
    return MODELS


@pytest.fixture
def scenario() -> Callable[..., dict[str, Any]]:
    """Run a function of scenarios.py in a process of its own; what it returns."""

    def run(
        name: str,
        *,
        config: dict[str, Any] | str | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 240,
        **arguments: Any,
    ) -> dict[str, Any]:
        settings = config if isinstance(config, str) else json.dumps(config or {})
        done = subprocess.run(
            [sys.executable, str(HERE / "scenarios.py"), name, json.dumps(arguments)],
            env={
                **os.environ,
                **STRICT,
                "KVSWITCH_CONFIG": settings,
                "KVSWITCH_MODELS": str(MODELS),
                **(environment or {}),
            },
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run

"""Tests of the SGLang adapter. Those with a real scheduler run it in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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


ON_RANKS = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
    "SGLANG_USE_MESSAGE_QUEUE_BROADCASTER": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class Run:
    """A function of the scenes in a process of its own."""

    def __init__(
        self, name: str, config: Any, environment: Mapping[str, str], arguments: Any, log: Path
    ) -> None:
        self.name, self.log = name, log
        settings = config if isinstance(config, str) else json.dumps(config or {})
        with log.open("w") as errors, log.with_suffix(".out").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "scenes"), name, json.dumps(arguments)],
                env={
                    **os.environ,
                    **STRICT,
                    "KVSWITCH_CONFIG": settings,
                    "KVSWITCH_MODELS": str(MODELS),
                    **environment,
                },
                stdout=output,
                stderr=errors,
            )

    def fail(self, how: str) -> None:
        pytest.fail(f"{self.name} {how}:\n{self.log.read_text()[-6000:]}")

    def result(self) -> dict[str, Any]:
        lines = self.log.with_suffix(".out").read_text().splitlines()
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def results(runs: Sequence[Run], timeout: float) -> list[dict[str, Any]]:
    """What they return; where one fails, the others, which wait for it, are killed."""
    end = time.monotonic() + timeout
    try:
        while (codes := [run.process.poll() for run in runs]) != [0] * len(runs):
            for run, code in zip(runs, codes, strict=True):
                if code:
                    run.fail(f"failed with {code}")
            if time.monotonic() > end:
                runs[0].fail(f"took more than {timeout} s")
            time.sleep(0.05)
    finally:
        for run in runs:
            run.process.kill()
            run.process.wait()
    return [run.result() for run in runs]


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a function of the scenes, "module.function"; what it returns."""

    def run(
        name: str,
        *,
        config: dict[str, Any] | str | None = None,
        timeout: float = 600,
        **arguments: Any,
    ) -> dict[str, Any]:
        return results([Run(name, config, {}, arguments, tmp_path / "log")], timeout)[0]

    return run


@pytest.fixture
def on_two_ranks(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a function of the scenes on two tensor-parallel ranks; what each of them returns."""

    def run(
        name: str, *, config: dict[str, Any], timeout: float = 600, **arguments: Any
    ) -> list[dict[str, Any]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ranks = []
        for rank in ("0", "1"):
            who = {"KVSWITCH_TEST_RANK": rank, "KVSWITCH_TEST_RANKS": "2"}
            environment = {**ON_RANKS, **who, "KVSWITCH_TEST_PORT": port}
            ranks.append(Run(name, config, environment, arguments, tmp_path / f"log{rank}"))
        return results(ranks, timeout)

    return run

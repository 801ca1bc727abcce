"""The real HTTP server: a client that streams and goes away, metrics, a restart."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
from harness import prompts

PATIENCE = 300.0  # seconds for the server to come up on a busy machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(models: Path, log: Path, *more: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on the command line that a user would give: its address, and its process."""
    port = free_port()
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(models / "tiny"),
        "--radix-cache-backend", "kvswitch", "--enable-priority-scheduling", "--enable-metrics",
        "--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch",
        "--skip-tokenizer-init", "--grammar-backend", "none", "--dtype", "float32",
        "--page-size", "16", "--max-total-tokens", "768", "--max-running-requests", "8",
        "--context-length", "2048", "--mem-fraction-static", "0.3", "--skip-server-warmup",
        "--priority-scheduling-preemption-threshold", "0",
        "--random-seed", "0", "--port", str(port), *more,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "KVSWITCH_CONFIG": json.dumps({"host_memory": "64MiB", "epoch": 4, "quantum": 2}),
        "OMP_NUM_THREADS": "1",
        "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                if requests.get(f"{url}/health", timeout=2).status_code == 200:
                    break
            except requests.RequestException:
                pass
            time.sleep(0.5)
        yield url, process
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, how)
                process.wait(20)
                break


def body(prompt: list[int], tokens: int, priority: int, **more: Any) -> dict[str, Any]:
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        "priority": priority,
        **more,
    }


def generate(url: str, *given: Any, **more: Any) -> list[int]:
    answer = requests.post(f"{url}/generate", json=body(*given, **more), timeout=120)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["output_ids"]
    return tokens


def all_at_once(url: str, given: list[list[int]], tokens: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in given]

    def ask(i: int) -> None:
        time.sleep(0.05 * i)
        found[i] = generate(url, given[i], tokens, i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def metric(url: str, name: str) -> float:
    time.sleep(1.2)  # they are brought up to date once a second
    text = requests.get(f"{url}/metrics", timeout=20).text
    values = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith((f"kvswitch_{name}{{", f"kvswitch_{name}_total{{"))
    ]
    assert values, f"no kvswitch_{name}"
    return sum(values)


def flush(url: str) -> None:
    """Empty the prefix cache; refused while SGLang still has the last request to put away."""
    end = time.monotonic() + 60
    while requests.post(f"{url}/flush_cache", timeout=60).status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.1)


def stream(url: str, *given: Any, most: int | None = None) -> list[int]:
    """Read the answer as it comes, and go away after so many pieces of it."""
    tokens: list[int] = []
    with requests.post(
        f"{url}/generate", json=body(*given, stream=True), stream=True, timeout=120
    ) as answer:
        pieces = (line[6:] for line in answer.iter_lines() if line.startswith(b"data: {"))
        for number, piece in enumerate(pieces):
            tokens = json.loads(piece)["output_ids"]
            if number + 1 == most:
                break
    return tokens


@pytest.mark.timeout(900)
def test_a_server_switches_for_real_clients(models: Path, tmp_path: Path) -> None:
    given = prompts(6, 21, 60, 120)
    with serving(models, tmp_path / "log") as (url, process):
        alone = [generate(url, p, 100, 0) for p in given]
        flush(url)
        assert all_at_once(url, given, 100) == alone
        switched = metric(url, "switches_out")
        assert switched > 0

        # One who reads on, and some of low priority who go away while others take their place.
        with ThreadPoolExecutor(8) as pool:
            leaving = [pool.submit(stream, url, given[0], 200, -1, most=k) for k in (1, 5, 9)]
            reading = pool.submit(stream, url, given[1], 100, 3)
            assert all_at_once(url, given, 100) == alone
            assert reading.result() == alone[1]
            assert all(0 < len(each.result()) < 200 for each in leaving)
        assert metric(url, "switches_out") > switched
        assert metric(url, "switches_in") > 0
        assert metric(url, "bytes_in") > 0
        # One token of each at most: with overlap, the one under way when it left.
        assert metric(url, "recomputed_tokens") <= metric(url, "switches_out")
        assert 0 <= metric(url, "host_usage") <= 1
        assert "kvswitch: " in (tmp_path / "log").read_text()

        with ThreadPoolExecutor() as pool:  # it dies in the midst of this
            pending = [pool.submit(generate, url, prompt, 600, 0) for prompt in given]
            time.sleep(0.5)
            assert process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            assert all(each.exception() for each in pending)
    with serving(models, tmp_path / "again") as (url, _):
        assert all_at_once(url, given, 100) == alone

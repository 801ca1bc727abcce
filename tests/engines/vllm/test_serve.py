"""`vllm serve --kv-offload=kvswitch` over HTTP, and what its command line refuses."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

MODELS = Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()
VLLM = str(Path(sys.executable).with_name("vllm"))
ENVIRONMENT = {
    **os.environ,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}
ENVIRONMENT.pop("OMP_NUM_THREADS", None)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with memory for two of the eight clients; its settings are in a YAML file."""
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = folder / "serve.yaml"
    config.write_text(
        "kv-offload: kvswitch\n"
        'kv-offload-config: \'{"host_memory": "256MiB", "quantum": 2}\'\n'
        "dtype: float32\n"
        "max-model-len: 512\n"
    )
    command = [
        *(VLLM, "serve", str(MODELS / "smollm2"), "--served-model-name", "smol"),
        *("--host", "127.0.0.1", "--port", str(port), "--config", str(config)),
        *("--enforce-eager", "--block-size", "32", "--max-num-seqs", "8"),
        *("--num-gpu-blocks-override", "20"),
    ]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                with urlopen(f"{url}/health", timeout=2):
                    break
            except OSError:
                time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-4000:])
        yield url
        said = log.read_text()  # what vLLM says when it is shut down is another matter
    finally:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, how)
                process.wait(60)
                break
    assert "Traceback" not in said


def client(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=280)


def ask(url: str, i: int, tokens: int = 100, **more: Any) -> str:
    """Stream a completion; its text."""
    prompt = f"Story number {i}: " + "Once upon a time there was a fox. " * (6 + i)
    stream = client(url).completions.create(
        model="smol",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, **more},
    )
    return "".join(part.choices[0].text for part in stream if part.choices)


def metrics(url: str) -> dict[str, float]:
    with urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    found = re.findall(r"^(kvswitch_\w+)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_eight_clients_with_changing_priorities(server: str) -> None:
    """Everybody gets the text that he gets when he is alone, aborts in mid-stream or not."""
    alone = [ask(server, i) for i in range(4)]

    def abort(i: int) -> None:
        stream = client(server).completions.create(
            model="smol", prompt=f"Abort {i} " * 30, max_tokens=200, temperature=0, stream=True
        )
        for count, _ in enumerate(stream):
            if count == 10:
                stream.close()
                return

    with ThreadPoolExecutor(8) as threads:
        texts = [threads.submit(ask, server, i % 4, 100, priority=i % 3) for i in range(8)]
        aborted = [threads.submit(abort, i) for i in range(3)]
        assert [text.result() for text in texts] == [alone[i % 4] for i in range(8)]
        for one in aborted:
            one.result()
    counted = metrics(server)
    assert counted["kvswitch_switches_out_total"] > 0
    assert counted["kvswitch_bytes_in_total"] > 0
    assert counted["kvswitch_transfers_failed_total"] == 0
    assert "kvswitch_host_usage" in counted
    deadline = time.monotonic() + 120
    while metrics(server)["kvswitch_held_blocks"] > 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_chat_finds_its_last_turn(server: str) -> None:
    """The second turn of a chat swaps in what the first one left, when others took the memory."""
    chat = [{"role": "user", "content": "Tell me about foxes. " * 20}]
    answer = client(server).chat.completions.create(
        model="smol", messages=chat, max_tokens=60, temperature=0
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda i: ask(server, i), range(4, 8)))
    before = metrics(server)["kvswitch_blocks_in_total"]
    chat += [
        {"role": "assistant", "content": answer.choices[0].message.content},
        {"role": "user", "content": "And about bears?"},
    ]
    client(server).chat.completions.create(
        model="smol", messages=chat, max_tokens=20, temperature=0
    )
    assert metrics(server)["kvswitch_blocks_in_total"] > before


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [VLLM, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_help_explains_the_flags() -> None:
    text = run("serve", "--help=KVSwitch").stdout
    assert "--kv-offload" in text
    assert "host_memory" in text

"""Combinations that cannot work end with a clear message; without the flag nothing changes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvswitch.errors import ConfigError
from kvswitch_vllm import checks, scheduler
from kvswitch_vllm.plugin import register, transfer_config


def engine_config(**arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=str(checks_models() / "tiny"), skip_tokenizer_init=True, **arguments
    ).create_engine_config()


def checks_models() -> Any:
    import os
    from pathlib import Path

    return Path(os.environ.get("KVSWITCH_MODELS", ".venv/models")).resolve()


def test_without_the_flag_nothing_changes(make_engine: Any) -> None:
    engine = make_engine(None, blocks=30)
    assert type(engine.scheduler).__module__.startswith("vllm.")
    assert type(engine.pool.free_block_queue).__module__.startswith("vllm.")
    assert engine.scheduler.policy.value == "fcfs"


def test_registering_twice_changes_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs

    before = EngineArgs.add_cli_args, EngineArgs.create_engine_config
    register()
    assert before == (EngineArgs.add_cli_args, EngineArgs.create_engine_config)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="did you mean 'quantum'"):
        transfer_config({"quantm": 3})
    with pytest.raises(ConfigError, match="below epoch=5"):
        transfer_config({"quantum": 5, "epoch": 5})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding",
        ),
    ],
)
def test_combinations_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        engine_config(kv_transfer_config=transfer_config({}), **arguments)


def cache(groups: int = 1, *, window: bool = False, **more: Any) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    size = {"block_size": 32, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32}
    spec = SlidingWindowSpec(**size, sliding_window=64) if window else FullAttentionSpec(**size)
    return SimpleNamespace(
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups,
        kv_cache_tensors=[SimpleNamespace(layers=["a", "b"])],
        **more,
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (cache(2), "hybrid KV caches"),
        (cache(needs_kv_cache_zeroing=True), "must be zeroed"),
        (cache(hash_block_size=16), "parts of blocks"),
        (cache(window=True), "not with SlidingWindowSpec"),
    ],
)
def test_caches_are_refused(config: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        checks.check_cache(None, config)


def test_block_bytes_are_those_of_all_layers() -> None:
    assert checks.check_cache(None, cache()) == 2 * (2 * 32 * 2 * 8 * 4)


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "1.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(checks, "installed_version", lambda: version)
    with pytest.raises(ConfigError, match=version):
        checks.check_version()


def test_too_little_host_memory_is_refused() -> None:
    settings = checks.Settings.from_mapping({"host_memory": "1KiB"})
    with pytest.raises(ConfigError, match="does not hold one block"):
        checks.host_blocks(settings, 4096, 2)


def test_unexpected_scheduler_falls_back_to_the_connector(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch, reference: Any
) -> None:
    """If vLLM's internals are not as expected, it says what is lost, and swaps all the same."""
    said: list[str] = []
    monkeypatch.setattr(scheduler, "_unexpected", lambda: "no such thing")
    monkeypatch.setattr(scheduler.log, "warning", lambda text, *a: said.append(text % a))
    engine = make_engine({}, blocks=30)
    assert type(engine.scheduler).__module__.startswith("vllm.")
    assert "never preempts a running one" in said[0]
    engine.add_batch(8, 150, 120)
    engine.run()
    assert engine.batch(8) == reference
    assert engine.stats.blocks_in > 0


def parse(*flags: str) -> Any:
    """What the command line comes to, as in `vllm serve`."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(list(flags)))


@pytest.mark.parametrize("first", [True, False])
def test_flags_become_vllms_own_settings(first: bool) -> None:
    """In either order."""
    flags = ["--kv-offload=kvswitch", '--kv-offload-config={"quantum": 3}']
    transfer = parse(*(flags if first else reversed(flags))).kv_transfer_config
    assert transfer.kv_connector == checks.CONNECTOR
    assert transfer.kv_connector_extra_config == {"quantum": 3}
    assert transfer.kv_load_failure_policy == "recompute"


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ('--kv-offload-config={"host_memry": "1GiB"}', "did you mean 'host_memory'"),
        ("--kv-offload-config=x", "not JSON"),
        ("--kv-offload-config=[1]", "not a JSON object"),
        ('--kv-transfer-config={"kv_connector": "X", "kv_role": "kv_both"}', "exclude each other"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_command_line_refuses(
    capsys: pytest.CaptureFixture[str], flag: str, says: str, first: bool
) -> None:
    flags = ["--kv-offload=kvswitch", flag]
    with pytest.raises((SystemExit, ConfigError)) as error:
        parse(*(flags if first else reversed(flags)))
    assert says in capsys.readouterr().err + str(error.value)


def test_settings_without_the_flag_are_refused() -> None:
    with pytest.raises(ConfigError, match="no effect without --kv-offload=kvswitch"):
        parse('--kv-offload-config={"host_memory": "1GiB"}')

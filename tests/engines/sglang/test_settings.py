"""Settings, content keys, and what is refused."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvswitch.errors import ConfigError
from kvswitch_sglang import checks
from kvswitch_sglang.keys import PageKeys
from kvswitch_sglang.settings import VARIABLE, Settings, read_settings

Scenario = Callable[..., dict[str, Any]]


def read(text: str) -> Settings:
    return read_settings({VARIABLE: text})


def test_without_the_variable_there_are_defaults() -> None:
    assert read_settings({}) == Settings() == read("  ")


def test_settings_are_json_or_a_file(tmp_path: Path) -> None:
    assert read('{"host_memory": "1GiB", "policy": "random"}').policy == "random"
    (tmp_path / "k.json").write_text('{"epoch": 7}')
    (tmp_path / "k.toml").write_text("epoch = 7\n[policy_settings]\nageing = 4\n")
    assert read(str(tmp_path / "k.json")).epoch == 7
    assert read(str(tmp_path / "k.toml")).policy_settings == {"ageing": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the environment variable"),
        ("/no/such/file.json", "cannot read /no/such/file.json"),
        ('{"host_memry": 1}', "did you mean 'host_memory'"),
        ('{"epoch": 0}', "epoch"),
        ('{"epoch": 3, "quantum": 3}', "quantum"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_no_list_of_settings(tmp_path: Path) -> None:
    (tmp_path / "k.json").write_text("[1]")
    with pytest.raises(ConfigError, match="no JSON object"):
        read(str(tmp_path / "k.json"))


def test_keys_name_all_tokens_up_to_their_end_and_the_namespace() -> None:
    keys = PageKeys(4)
    tokens = array("q", range(20))
    a = keys.of("a", tokens, 5, (None, None))
    assert len(set(a)) == 5
    assert keys.of("a", tokens, 3, (None, None)) == a[:3]
    assert keys.of("b", list(range(8)), 2, (None, None)) == a[:2]
    assert not set(keys.of("c", tokens, 5, ("lora", None))) & set(a)
    other = array("q", [9, *range(1, 20)])
    assert not set(keys.of("d", other, 5, (None, None))) & set(a)
    keys.forget("a")
    keys.forget("a")
    assert keys.of("a", tokens, 5, (None, None)) == a


def context(**more: Any) -> Any:
    arguments = {name: more.pop(name) for name in list(more) if name.startswith("arg_")}
    return SimpleNamespace(
        **{
            "is_hybrid_swa": False,
            "is_hybrid_ssm": False,
            "is_dsa": False,
            "disable_radix_cache": False,
            "enable_hierarchical_cache": False,
            "model_config": SimpleNamespace(is_encoder_decoder=False),
            **more,
        },
        server_args=SimpleNamespace(resolved_dict=lambda: {k[4:]: v for k, v in arguments.items()}),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"is_hybrid_swa": True}, "sliding-window"),
        ({"is_hybrid_ssm": True}, "recurrent state"),
        ({"disable_radix_cache": True}, "--disable-radix-cache"),
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache"),
        ({"model_config": SimpleNamespace(is_encoder_decoder=True)}, "encoder-decoder"),
        ({"arg_speculative_algorithm": "EAGLE"}, "speculative"),
        ({"arg_pp_size": 2}, "pipeline"),
        ({"arg_enable_dp_attention": True}, "data-parallel"),
        ({"arg_disaggregation_mode": "decode"}, "disaggregation"),
        ({"arg_enable_lmcache": True}, "lmcache"),
    ],
)
def test_what_cannot_work_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checks.check_context(context(**given), Settings())


def test_mixed_chunks_that_wait_for_the_last_prefill_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks.check_context(context(arg_enable_mixed_chunk=True), Settings())
    monkeypatch.setenv("SGLANG_DISABLE_CONSECUTIVE_PREFILL_OVERLAP", "1")
    checks.check_context(context(), Settings())
    with pytest.raises(ConfigError, match="--enable-mixed-chunk with SGLANG_DISABLE"):
        checks.check_context(context(arg_enable_mixed_chunk=True), Settings())


# Arguments as they are given to SGLang, which may resolve them to others.
FLAGS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, ""),
    "mixed chunks": ({"enable_mixed_chunk": True}, ""),
    "data-parallel attention": ({"tp_size": 2, "attn_dp_size": 2}, "data-parallel attention"),
    "its old name": (
        {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True},
        "data-parallel attention",
    ),
    "pipeline": ({"pp_size": 2, "disable_overlap_schedule": True}, "pipeline parallelism"),
    "pdmux": (
        {"enable_pdmux": True, "disable_overlap_schedule": True, "chunked_prefill_size": -1},
        "--enable-pdmux",
    ),
    "disaggregation": ({"disaggregation_mode": "prefill"}, "disaggregation"),
    "lmcache": ({"enable_lmcache": True}, "--enable-lmcache"),
    "memory saver": ({"enable_memory_saver": True}, "--enable-memory-saver"),
    "routed experts": (
        {"enable_return_routed_experts": True},
        "--enable-return-routed-experts",
    ),
    "speculation": (
        {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 4},
        "speculative decoding",
    ),
}


def test_flags_are_refused_as_sglang_understands_them(scenario: Scenario) -> None:
    found = scenario("starting.flags", cases={name: case for name, (case, _) in FLAGS.items()})
    for name, (_, message) in FLAGS.items():
        assert (message in found[name]) if message else not found[name], name


def test_what_can_work_is_not_refused(scenario: Scenario) -> None:
    checks.check_context(context(arg_disaggregation_mode="null", arg_pp_size=1), Settings())
    assert scenario("starting.known") == {"kind": ""}


def test_a_policy_needs_priorities() -> None:
    with pytest.raises(ConfigError, match="--enable-priority-scheduling"):
        checks.check_context(context(), Settings(policy="random"))


@pytest.mark.parametrize("version", ["0.5.21", "0.5.24", "0.6.0", "1.0"])
def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ConfigError, match=r"0\.5\.22 up to, not including, 0\.5\.24"):
        checks.check_version()


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"host_memory": 64}, {}, "does not hold one page"),
        ({"host_memory": "4000GiB"}, {}, "does not fit"),
        ({"host_memory": "1MiB"}, {"disable_radix_cache": True}, "--disable-radix-cache"),
    ],
)
def test_a_scheduler_says_why_it_does_not_start(
    scenario: Scenario, config: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    found = scenario("starting.refused", config=config, **arguments)
    assert found["kind"] == "ConfigError"
    assert message in found["message"]


def test_another_plug_in_at_the_same_place_is_told_of(scenario: Scenario) -> None:
    found = scenario("starting.hooked", config={"host_memory": "1MiB"})
    assert found["kind"] == "ConfigError"
    assert "Scheduler.run_batch" in found["message"]

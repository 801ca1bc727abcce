"""Constants: every one has a source, models have their published size, mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvswitch.errors import ConfigError
from kvswitch.messages import Direction
from kvswitch.sim.calibration import read_calibration
from kvswitch.sim.profiles import load_profiles, read_model

PROFILES = load_profiles()


def every_profile() -> list[tuple[str, Any]]:
    groups = {"gpu": PROFILES.gpu, "link": PROFILES.link, "model": PROFILES.model}
    named = [(f"{g} {n}", p) for g, profiles in groups.items() for n, p in profiles.items()]
    return [*named, ("engine", PROFILES.engine), ("setting", PROFILES.setting)]


@pytest.mark.parametrize(("name", "profile"), every_profile())
def test_every_constant_has_a_source(name: str, profile: Any) -> None:
    fields = set(profile.__struct_fields__) - {"name", "sources"}
    assert fields
    if "all" not in profile.sources:
        assert fields == set(profile.sources), name
    assert all(len(source) > 5 for source in profile.sources.values())


@pytest.mark.parametrize(
    ("model", "parameters", "kv_bytes"),
    [("llama-8b", 8.03e9, 131072), ("qwen-32b", 32.5e9, 262144)],
)
def test_models_have_their_published_size(model: str, parameters: float, kv_bytes: int) -> None:
    profile = PROFILES.model[model]
    assert profile.weight_bytes / 2 == pytest.approx(parameters, rel=0.005)
    assert profile.kv_bytes == kv_bytes


def test_kv_capacity_is_what_the_weights_leave() -> None:
    gpu, model, engine = PROFILES.gpu["a10"], PROFILES.model["llama-8b"], PROFILES.engine
    blocks = engine.device_blocks(gpu, model)
    used = blocks * 16 * model.kv_bytes + model.weight_bytes + engine.activations * 2**30
    assert 0 <= gpu.memory * 0.9 * 2**30 - used < 16 * model.kv_bytes
    with pytest.raises(ConfigError, match=r"Qwen1.5-32B does not fit on one A10 24 GB"):
        engine.device_blocks(gpu, PROFILES.model["qwen-32b"])


def test_unknown_names_are_answered_with_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'a10'"):
        PROFILES.find_gpu("a1O")
    with pytest.raises(ConfigError, match=r"llama-8b, qwen-32b; or give a config\.json"):
        PROFILES.find_model("gpt")


def config(**changes: Any) -> dict[str, Any]:
    values = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    } | changes
    return {key: value for key, value in values.items() if value is not None}


def test_a_model_is_read_from_its_config(tmp_path: Path) -> None:
    file = tmp_path / "Meta-Llama-3-8B" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps(config()))
    model = PROFILES.find_model(str(file))
    ours = PROFILES.model["llama-8b"]
    assert model == msgspec.structs.replace(ours, name="Meta-Llama-3-8B", sources=model.sources)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (json.dumps(config(hidden_size=None)), "hidden_size must be a positive number, got None"),
        (json.dumps(config(num_hidden_layers="32")), "num_hidden_layers .* got '32'"),
        (json.dumps(config(vocab_size=0)), "vocab_size .* got 0"),
        (json.dumps(config(num_local_experts=8)), "mixtures of experts are not modelled"),
        (json.dumps(config(kv_lora_rank=512)), "MLA.* are not modelled"),
        ("[1]", "not a model's config"),
        ("{", "cannot read model"),
    ],
)
def test_a_bad_config_names_the_field(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_model(file)


def sample(way: int, nbytes: int, count: int, microseconds: float) -> dict[str, Any]:
    return {
        "direction": int(Direction.IN),
        "way": way,
        "nbytes": nbytes,
        "count": count,
        "seconds": microseconds * 1e-6,
    }


def test_a_calibrated_link_takes_its_numbers_from_the_table(tmp_path: Path) -> None:
    file = tmp_path / "copies.json"
    samples = [
        sample(0, 1 << 26, 4, (1 << 28) / 50e3),  # 50 GB/s
        sample(0, 4096, 10_000, 10_000 * (1.0 + 4096 / 50e3)),
        sample(1, 4096, 10_000, 10_000 * (3.0 + 4096 / 50e3)),
    ]
    file.write_text(json.dumps({"gpu": "H100", "driver": 13000, "samples": samples, "format": 1}))
    link = read_calibration(file, PROFILES.link["pcie4"])
    assert link.bandwidth == pytest.approx(50.0)
    assert link.copy_seconds(batch=True) == pytest.approx((1e-6, 0))
    assert link.copy_seconds(batch=False) == pytest.approx((3e-6, 0))
    assert "calibrate, H100" in link.sources["bandwidth"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{}", "gpu"), ('{"gpu": "x", "samples": []}', "samples"), ("", "no table")],
)
def test_a_bad_calibration_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    file = tmp_path / "copies.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        read_calibration(file, PROFILES.link["pcie4"])

"""Settings: what they mean, and what is said about those that cannot work."""

from __future__ import annotations

from typing import Any

import pytest

from kvswitch.config import Config, parse_bytes
from kvswitch.errors import ConfigError, KVSwitchError


def test_defaults_are_those_of_the_paper() -> None:
    config = Config()
    assert (config.first_group, config.headroom, config.reuse) == (60, 0.06, True)
    assert (config.strategy, config.preemption, config.backend) == ("adaptive", "switch", "auto")
    assert (config.host_bytes, config.window_bytes) == (4 * 2**30, None)


def test_settings_come_from_a_mapping_as_well() -> None:
    settings = {"host_memory": "60 GB", "strategy": "sync", "reuse": False}
    assert Config.from_mapping(settings) == Config(
        host_memory="60 GB", strategy="sync", reuse=False
    )
    assert Config.from_mapping({}) == Config()


def test_settings_do_not_change() -> None:
    with pytest.raises(AttributeError):
        Config().first_group = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host_memroy": "1GiB"}, "no setting 'host_memroy'; did you mean 'host_memory'?"),
        ({"xyz": 1}, "no setting 'xyz'; there are: host_memory, backend, strategy"),
        ({3: 1}, "no setting 3"),
        ({"strategy": "asynch"}, "strategy cannot be 'asynch'; did you mean 'async'?"),
        ({"strategy": "fast"}, "there are: adaptive, async, sync, serial"),
        ({"preemption": None}, "preemption cannot be None; there are: switch, recompute"),
        ({"host_memory": 0}, "host_memory must be more than 0"),
        ({"host_memory": -1}, "host_memory must not be negative, got -1"),
        ({"host_memory": "32 apples"}, "host_memory: cannot read '32 apples'"),
        ({"host_memory": 1.5}, "host_memory: .*float"),
        ({"host_memory": None}, "host_memory: "),
        ({"window": "1KiB"}, "window must be at least 4KiB"),
        ({"window": True}, "window: .*bool"),
        ({"first_group": 0}, "first_group must be at least 1 block, got 0"),
        ({"first_group": "60"}, "first_group: .*str"),
        ({"headroom": 0.6}, "headroom must lie between 0 and 0.5, got 0.6"),
        ({"headroom": -0.1}, "headroom must lie between"),
        ({"headroom": float("nan")}, "headroom must lie between"),
        ({"reuse": "no"}, "reuse: .*bool.*'no'"),
        ({"backend": 5}, "backend: .*str"),
    ],
)
def test_what_cannot_work_is_named(settings: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.from_mapping(settings)
    name = next(iter(settings))
    if name in Config.__struct_fields__:
        with pytest.raises(ConfigError, match=message):
            Config(**settings)


def test_a_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, KVSwitchError)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1024, 1024),
        ("1024", 1024),
        ("512MiB", 512 * 2**20),
        (" 1.5 gb ", 1_500_000_000),
        ("2.3GB", 2_300_000_000),
        ("4KIB", 4096),
        ("1TiB", 2**40),
        ("9007199254740993", 2**53 + 1),
        (0, 0),
    ],
)
def test_numbers_of_bytes(text: str | int, nbytes: int) -> None:
    assert parse_bytes(text, "size") == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "1.5.2GiB", "-4KiB", "4 Gibb", "1e9", "4G"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match=r"size: cannot read .*write bytes, or e.g. '32GiB'"):
        parse_bytes(text, "size")

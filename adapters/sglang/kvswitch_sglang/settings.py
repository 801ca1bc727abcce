"""Settings of kvswitch in SGLang: those of the core, and who runs next."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvswitch.config import Config
from kvswitch.errors import ConfigError

__all__ = ["VARIABLE", "Settings", "read_settings"]

VARIABLE = "KVSWITCH_CONFIG"
"""The environment variable: a JSON object, or the path of a file with one, or of a TOML file."""


class Settings(Config, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `VARIABLE` may say, beside what `Config` has.

    Attributes
    ----------
    policy : str
        How priorities change over time: "fixed" (a request keeps its own; ageing with
        ``{"ageing": epochs}``), "random", "markov", "trace", or the name of a registered one. All
        but "fixed" need ``--enable-priority-scheduling``.
    policy_settings : mapping
        That policy's own settings.
    epoch : int
        Scheduling passes between two priority updates.
    quantum : int
        Passes for which a request just switched in is not preempted for another.
    """

    policy: str = "fixed"
    policy_settings: dict[str, Any] = {}  # noqa: RUF012 - msgspec copies it
    epoch: int = 25
    quantum: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epoch < 1:
            raise ConfigError(f"epoch={self.epoch}: give 1 pass or more")
        if not 0 <= self.quantum < self.epoch:
            raise ConfigError(
                f"quantum={self.quantum} must be 0 or more and below epoch={self.epoch}: a request "
                "must be able to give way before the next priority update"
            )


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read `VARIABLE`; the defaults where it is not set.

    Raises
    ------
    ConfigError
        It is no JSON object and no readable file with one, or names a setting that does not exist
        or cannot have that value.
    """
    text = environment.get(VARIABLE, "").strip()
    if not text:
        return Settings()
    where = f"the environment variable {VARIABLE}"
    try:
        if text.startswith("{"):
            found = json.loads(text)
        else:
            where = f"{text} (from the environment variable {VARIABLE})"
            content = Path(text).read_text()
            found = tomllib.loads(content) if text.endswith(".toml") else json.loads(content)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot read {where}: {error}. It is to be a JSON object such as "
            '{"host_memory": "32GiB"}, or the path of a .json or .toml file'
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f'{where} has no JSON object, such as {{"host_memory": "32GiB"}}')
    try:
        return Settings.from_mapping(found)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error

"""Settings of a `KVSwitch`, checked when they are read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, Self, TypeAlias, get_args, get_origin

import msgspec
import msgspec.structs

from kvswitch.errors import ConfigError

__all__ = ["Config", "StrategyName", "parse_bytes"]

StrategyName: TypeAlias = Literal["adaptive", "async", "sync", "serial"]
"""`async` waits for a swap-in only when nothing else can run, `sync` always, `serial` waits for
swap-outs as well (figure 6a: everything in series); `adaptive` decides anew in each iteration."""

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a `KVSwitch`.

    Attributes
    ----------
    host_memory : str or int
        Host memory for copies, in bytes or as "32GiB". All of it is reserved at the start.
    backend : str
        "auto" (CUDA for a KV cache on a GPU, else CPU), or the name of a registered copy backend.
    strategy : {"adaptive", "async", "sync", "serial"}
        Whether a batch waits for swap-ins: decided anew each iteration, only when nothing else can
        run, always; "serial" waits for swap-outs too.
    window : str or int
        Bytes of a dispatch window: how many may be queued on the copy engine at once, for each
        direction. "auto": what suits the backend's link.
    preemption : {"switch", "recompute"}
        "recompute" sends nothing: what leaves the device is recomputed. For comparison.
    first_group : int
        Expected size of a sequence's first block group, in blocks (paper section 3.1: 60).
    headroom : float
        Share of the device blocks that admission leaves free, 0 to 0.5.
    reuse : bool
        Keep host copies after a swap-in (paper section 3.3).
    """

    host_memory: str | int = "4GiB"
    backend: str = "auto"
    strategy: StrategyName = "adaptive"
    window: str | int = "auto"
    preemption: Literal["switch", "recompute"] = "switch"
    first_group: int = 60
    headroom: float = 0.06
    reuse: bool = True

    def __post_init__(self) -> None:
        for setting in msgspec.structs.fields(self):
            _check(setting, getattr(self, setting.name))
        if self.host_bytes < 1:
            raise ConfigError("host_memory must be more than 0: without it nothing can be kept")
        if self.window_bytes is not None and self.window_bytes < 4096:
            raise ConfigError(f"window must be at least 4KiB, got {self.window!r}")
        if self.first_group < 1:
            raise ConfigError(f"first_group must be at least 1 block, got {self.first_group}")
        if not 0 <= self.headroom <= 0.5:
            raise ConfigError(f"headroom must lie between 0 and 0.5, got {self.headroom}")

    @property
    def host_bytes(self) -> int:
        """`host_memory` in bytes."""
        return parse_bytes(self.host_memory, "host_memory")

    @property
    def window_bytes(self) -> int | None:
        """`window` in bytes; None for "auto"."""
        return None if self.window == "auto" else parse_bytes(self.window, "window")

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Read settings from a mapping, e.g. parsed JSON.

        Raises
        ------
        ConfigError
            A setting does not exist, or cannot have that value.
        """
        known = cls.__struct_fields__
        for name in settings:
            if name not in known:
                raise ConfigError(f"no setting {name!r}; {_hint(name, known)}")
        return cls(**settings)


def _check(setting: msgspec.structs.FieldInfo, value: object) -> None:
    try:
        msgspec.convert(value, setting.type)
    except msgspec.ValidationError as error:
        if get_origin(setting.type) is Literal:
            hint = _hint(value, get_args(setting.type))
            raise ConfigError(f"{setting.name} cannot be {value!r}; {hint}") from error
        raise ConfigError(f"{setting.name}: {error}, {value!r}") from error


def _hint(value: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), known, 1)
    return f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"


def parse_bytes(value: str | int, name: str) -> int:
    """Read a number of bytes such as 1024, "512MiB" or "1.5 GB"; ConfigError names `name`."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ConfigError(f"{name} must not be negative, got {value}")
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if not match or match[2] not in _UNITS:
        raise ConfigError(f"{name}: cannot read {value!r}; write bytes, or e.g. '32GiB'")
    return int(Fraction(match[1]) * _UNITS[match[2]])

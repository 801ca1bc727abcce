"""A link profile from what `kvswitch calibrate` has measured on a GPU."""

from __future__ import annotations

from pathlib import Path

import msgspec

from kvswitch.errors import ConfigError
from kvswitch.sim.profiles import Link

__all__ = ["read_calibration"]

_BATCH, _LOOP = 0, 1


class _Sample(msgspec.Struct):
    """`count` pieces of `nbytes` each took `seconds`, one way in one direction."""

    direction: int
    way: int
    nbytes: int
    count: int
    seconds: float

    @property
    def bandwidth(self) -> float:
        return self.nbytes * self.count / self.seconds


class _Table(msgspec.Struct):
    gpu: str
    samples: list[_Sample]


def read_calibration(path: Path, otherwise: Link) -> Link:
    """Read a table of `kvswitch calibrate`.

    The bandwidth is that of the slower direction. What a copy costs beside its bytes is taken from
    the smallest pieces, of which many were copied at once; dispatching and copying cannot be told
    apart there, so all of it counts as dispatch.

    Parameters
    ----------
    path : Path
    otherwise : Link
        What is taken where a way has not been measured.

    Raises
    ------
    ConfigError
        The file cannot be read, or is no such table; names the field.
    """
    try:
        table = msgspec.json.decode(path.read_bytes(), type=_Table)
    except OSError as error:
        raise ConfigError(f"cannot read calibration {path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no table of `kvswitch calibrate`: {error}") from error
    samples = [s for s in table.samples if s.nbytes > 0 and s.count > 0 and s.seconds > 0]
    directions = {s.direction for s in samples}
    if not samples:
        raise ConfigError(f"{path}: samples: there is none with bytes and seconds")
    bandwidth = min(max(s.bandwidth for s in samples if s.direction == d) for d in directions)
    changes = {"bandwidth": bandwidth / 1e9}
    for name, way in (("batch", _BATCH), ("loop", _LOOP)):
        small = [s for s in samples if s.way == way]
        if small:
            least = min(small, key=lambda s: (s.nbytes, -s.count))
            extra = least.seconds / least.count - least.nbytes / bandwidth
            changes |= {f"{name}_dispatch": max(0.0, extra * 1e6), f"{name}_copy": 0.0}
    sources = otherwise.sources | dict.fromkeys(changes, f"kvswitch calibrate, {table.gpu}")
    return msgspec.structs.replace(otherwise, sources=sources, **changes)
